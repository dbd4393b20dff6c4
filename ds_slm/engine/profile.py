"""Where a step's time goes: --profile A:B.

    steps A to B --torch.profiler--> RUN/profile/steps-A-B-rank-00000.trace.json   (chrome://tracing, Perfetto)
                 --Watch--> seconds of data, forward, loss, backward, reduce, optimiser, other: they add up to the step

Functions are wrapped while a profiled step runs and restored after it, so the step's own code does not change. Each
part counts only its own time: the loss is subtracted from the forward pass that contains it, a collective from the
backward pass or the optimiser's step. On a GPU each part waits for the device, so what would overlap no longer does.

Data is the time that a step waits for its rows, which are read while the step before trains.

Known gaps: the profiler itself takes time, most of all on a CPU; a forward pass repeated by gradient checkpointing
counts as backward.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_slm.engine.deepspeed_workarounds import replaced
from ds_slm.engine.engine import Engine
from ds_slm.engine.row_reader import RowReader
from ds_slm.model import decoder

PARTS = ("data", "forward", "loss", "backward", "reduce", "optimiser", "other")
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_fn", "reduce_scatter_tensor",
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "allgather_fn", "broadcast",
)  # fmt: skip
"""Functions of deepspeed.comm that its optimisers call, in hooks of the backward pass and in their steps."""


class Watch:
    """Adds up the time of named parts; a part does not count the parts within it."""

    def __init__(self, synchronise: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._synchronise, self._clock = synchronise, clock
        self._open: list[str] = []
        self._since_s = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time from here to the end of the block belongs to this part."""
        self._turn()
        self._open.append(name)
        try:
            with torch.profiler.record_function(f"ds_slm.{name}"):
                yield
        finally:
            self._turn()
            self._open.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def _turn(self) -> None:
        self._synchronise()
        now_s = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now_s - self._since_s
        self._since_s = now_s


class Profile:
    """Profiles a range of steps on every rank; rank 0 prints the table."""

    def __init__(self, steps: range, folder: Path, say: Callable[[str], None]) -> None:
        self.steps, self.folder, self._say = steps, folder, say
        self._torch: Any = None
        self._watch: Watch | None = None
        self._taken = 0

    @contextmanager
    def step(self, number: int, engine: Engine, reader: RowReader) -> Iterator[None]:
        """Profile the step that runs in the `with` block, if it is in the range."""
        if number not in self.steps:
            yield
            return
        if self._watch is None:
            self._torch = torch.profiler.profile()
            self._torch.start()
            self._watch = Watch(torch.cuda.synchronize if engine.device.type == "cuda" else lambda: None)
        with _wrapped(self._watch, engine, reader), self._watch.part("other"):
            yield
        self._taken += 1
        if number == self.steps[-1]:
            self.finish(engine.control.rank)

    def finish(self, rank: int) -> None:
        """Write the trace and print the table; once, and also if the run ends early."""
        if self._watch is None:
            return
        self._torch.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps-{self.steps[0]}-{self.steps[-1]}-rank-{rank:05d}.trace.json"
        self._torch.export_chrome_trace(str(path))
        self._say("\n".join(table(self._watch.seconds, self._taken)))
        self._say(f"trace: {path}")
        self._watch = None


def table(seconds: dict[str, float], steps: int) -> Iterator[str]:
    """Lines with the seconds and the share of each part in the mean step."""
    total_s = sum(seconds.values())
    yield f"a step of {total_s / steps:.3f} s, under the profiler, mean of {steps}:"
    for name, part_s in seconds.items():
        yield f"  {name:<10}{part_s / steps:>9.3f} s{part_s / total_s:>8.1%}"


@contextmanager
def _wrapped(watch: Watch, engine: Engine, reader: RowReader) -> Iterator[None]:
    import deepspeed

    wrapped = [
        (reader, "of_step", "data"),
        (reader, "following", "data"),
        (engine.deepspeed, "forward", "forward"),
        (decoder, "chunked_loss", "loss"),
        (engine.deepspeed, "backward", "backward"),
        (engine.deepspeed, "allreduce_gradients", "reduce"),
        *((deepspeed.comm, name, "reduce") for name in COLLECTIVES),
        (engine.deepspeed, "step", "optimiser"),
    ]

    with ExitStack() as patches:
        for owner, name, part in wrapped:
            patches.enter_context(replaced(owner, name, watch.wrap(part, getattr(owner, name))))
        yield
