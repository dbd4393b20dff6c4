"""The program that step_cost.py launches: a checkout's own pretrain.py, whose CPU time is split while it trains.

    step begins --> CPU of the main thread within DeepSpeed's forward, backward and step --> next step begins
                    the rest of the main thread, and the other Python threads: our code's share of a step

CPU time is counted, because ranks that share cores wait for each other. DeepSpeed's calls contain torch's arithmetic
and our model's forward pass. Threads of gloo and of torch are not Python threads: only `process` includes them. The
checkout is the one whose interpreter runs this file; every rank writes a file into the folder $STEP_PARTS.
"""

import functools
import json
import os
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_STEPS = 20
"""Steps that are not counted."""


class Parts:
    """CPU time of this rank's steps, split in two."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._deepspeed_s, self._start_s = 0.0, 0.0
        self._beside_s = 0.0, 0.0
        """CPU seconds of the other Python threads, and of the whole process, when the steps that count began."""
        self._steps: list[tuple[float, float, float]] = []
        """For each step: CPU seconds of the main thread, those in DeepSpeed's calls, and wall-clock seconds."""
        self._last: tuple[float, float, float] | None = None

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted as DeepSpeed's."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._deepspeed_s += time.thread_time() - begin_s

        return call

    def step_ended(self) -> None:
        """An optimiser step has just been taken: the time since the last one is a step."""
        now = time.thread_time(), self._deepspeed_s, time.perf_counter()
        if self._last is None:
            self._start_s = time.process_time()
        else:
            self._steps.append((now[0] - self._last[0], now[1] - self._last[1], now[2] - self._last[2]))
        self._last = now
        if len(self._steps) == WARM_STEPS:
            self._beside_s = other_threads_s(), time.process_time()

    def write(self) -> None:
        """Write medians of the main thread's parts, and means of the other threads and the process, in milliseconds."""
        steps = self._steps[WARM_STEPS:]
        beside_s = other_threads_s(), time.process_time()
        threads_s, process_s = (
            (now_s - then_s) / len(steps) for now_s, then_s in zip(beside_s, self._beside_s, strict=True)
        )
        found = {
            "start": self._start_s,
            "step": statistics.median(wall_s for _, _, wall_s in steps),
            "process": process_s,
            "deepspeed": statistics.median(deepspeed_s for _, deepspeed_s, _ in steps),
            "ours_main": statistics.median(main_s - deepspeed_s for main_s, deepspeed_s, _ in steps),
            "ours_threads": threads_s,
        }
        self._path.write_text(json.dumps({name: 1e3 * seconds for name, seconds in found.items()}))


def other_threads_s() -> float:
    """CPU seconds so far of this process's Python threads, except the calling one."""
    return sum(
        int(Path(f"/proc/self/task/{one.native_id}/schedstat").read_text().split()[0]) / 1e9
        for one in threading.enumerate()
        if one is not threading.current_thread() and one.native_id
    )


def watch(engine_type: Any, parts: Parts, last_step: int) -> None:
    """Let every engine of this class count its time; the file is written after its last step."""
    initialise = engine_type.__init__

    @functools.wraps(initialise)
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        inner = self.deepspeed
        for name in ("forward", "backward"):
            setattr(inner, name, parts.counted(getattr(inner, name)))
        step = parts.counted(inner.step)

        def step_and_tell(*given: Any, **named: Any) -> None:
            before = inner.global_steps
            step(*given, **named)
            if inner.global_steps != before:
                parts.step_ended()
                if inner.global_steps == last_step:
                    parts.write()

        inner.step = step_and_tell

    engine_type.__init__ = counted


def main() -> None:
    """Run the checkout's program."""
    sys.path.pop(0)  # this folder: the checkout is found through its own installation
    from ds_slm.engine.engine import Engine

    program = Path(sys.modules["ds_slm"].__file__ or "").parent / "pretrain.py"
    folder, last_step = Path(os.environ["STEP_PARTS"]), int(os.environ["STEP_PARTS_LAST"])
    watch(Engine, Parts(folder / f"rank-{os.environ['RANK']}.json"), last_step)
    sys.argv[0] = str(program)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
