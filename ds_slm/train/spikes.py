"""Loss spikes: printed, and kept in the records. They do not stop the run.

A spike is a loss that exceeds the median of the last SPIKE_WINDOW steps by more than SPIKE_DEVIATIONS robust standard
deviations (1.4826 x the median absolute deviation) and by more than SPIKE_SHARE of that median.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

SPIKE_WINDOW, SPIKE_LEAST_STEPS, SPIKE_DEVIATIONS, SPIKE_SHARE = 50, 20, 6.0, 0.05


class Spikes:
    """Finds losses that lie far above the losses before them."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def excess(self, loss: float) -> float | None:
        """How far a step's loss lies above the median before it, if it is a spike. Call once a step."""
        before: Sequence[float] = list(self._losses)
        self._losses.append(loss)
        if len(before) < SPIKE_LEAST_STEPS:
            return None
        median = statistics.median(before)
        above = loss - median
        if not above > SPIKE_SHARE * median or not math.isfinite(loss):
            return None
        deviation = 1.4826 * statistics.median(abs(one - median) for one in before)
        return above if above > SPIKE_DEVIATIONS * deviation else None
