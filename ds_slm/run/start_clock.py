"""How a launch spends the time until its first forward: a line on the terminal, and in the record of the launch.

    `deepspeed` begins --launcher--> this process begins --imports--> lap --data--> lap ... --> told, just before it

Times are this rank's. Known gap: if pdsh started this host's ranks, the launcher's time begins on this host.
"""

import contextlib
import time
from itertools import pairwise

import psutil

from ds_slm.distributed.world import LAUNCHER_MODULES

LAUNCHERS = ("deepspeed", "ds-slm train", "ds-slm sft", *LAUNCHER_MODULES)
"""The programs, or modules, between the command that a user types and a rank."""


class StartClock:
    """Splits the time since the launch was typed."""

    def __init__(self) -> None:
        own = psutil.Process()
        self.parts_s = {"launcher": own.create_time() - _launch_began_s(own)}
        """Seconds of each part of the start, in order."""
        self._last_s = time.time() - _age_s(own)

    def lap(self, what: str) -> dict[str, float]:
        """Count the time since the last call for this part; returns the parts so far."""
        now_s = time.time()
        self.parts_s[what] = self.parts_s.get(what, 0.0) + now_s - self._last_s
        self._last_s = now_s
        return self.parts_s

    def told(self, compiled: bool) -> str:
        """The line for the terminal. If blocks are compiled, it announces the pause that follows."""
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.parts_s.items())
        pause = "; it compiles the blocks, unless torch's cache holds them: that takes minutes" if compiled else ""
        return f"{sum(self.parts_s.values()):.1f} s to the first forward: {parts}{pause}"


def _age_s(own: psutil.Process) -> float:
    """Seconds that this process has run; to a hundredth if the kernel tells the time since its boot."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None:
        return time.time() - own.create_time()
    return time.clock_gettime(clock) - (own.create_time() - psutil.boot_time())


def _launch_began_s(rank: psutil.Process) -> float:
    """When the outermost launcher of a rank began, or the rank itself if nothing launched it."""
    began_s = rank.create_time()
    with contextlib.suppress(psutil.Error):  # a parent that has just ended, or is another user's
        for parent in rank.parents():
            words = [word.rpartition("/")[2] for word in parent.cmdline()[:5]]
            if not {*words, *map(" ".join, pairwise(words))} & set(LAUNCHERS):
                break
            began_s = parent.create_time()
    return began_s
