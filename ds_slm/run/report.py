"""What a run reports: TensorBoard, metrics.jsonl, and a progress bar or lines on the terminal. Rank 0 alone does.

libraries' output (stdout, stderr) --> logs/rank-00000.log        (`captured_output`)
record --> metrics.jsonl, tb/ (board.py) and the terminal         (`Report`)
"""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ds_slm.files import replace_text
from ds_slm.run import launches
from ds_slm.run.board import Board
from ds_slm.run.launches import Launch

SHOWN_FACTS = (
    "hosts", "world_size", "device", "backend", "precision", "zero_stage", "optimizer", "rows_per_step",
    "accumulation_steps", "micro_batch_rows", "kernels", "generation", "begins_at_step", "warnings",
)  # fmt: skip
"""Of env.json, in TensorBoard."""
LONGEST_SILENCE_S = 60.0
"""Without a progress bar, a step at least this long after the last line gets one of its own."""


@contextlib.contextmanager
def captured_output(log: Path) -> Iterator[TextIO]:
    """Send everything this process and its libraries print to a log file; yields the terminal as it was.

    Works on file descriptors, so compilers and C++ libraries are caught as well. A traceback goes to the log and, after
    the descriptors are restored, to the terminal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()

    # The terminal stays within reach through copies of its descriptors.
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(1), "w", buffering=1)

    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield terminal
        except BaseException:
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
            raise
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()

            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            terminal.close()


class Report:
    """Writes a run's records; on any rank but 0 every method does nothing."""

    def __init__(
        self,
        folder: Path,
        terminal: TextIO,
        active: bool,
        total_steps: int,
        first_step: int = 0,
        launch: Launch | None = None,
    ) -> None:
        """Nothing is recorded once another launch than `launch` holds the folder. Raises ReplacedByNewerLaunch."""
        self.folder, self.terminal, self.active, self.total_steps = folder, terminal, active, total_steps
        self._launch = launch
        self._lost_records = False
        self._earlier: set[tuple[str, float]] = set()
        self.line_every_steps, self.spoke_at_s = max(total_steps // 20, 1), time.monotonic()

        if not active:
            return
        if launch:
            launches.refuse_replaced(folder, launch)
        self._forget_after(first_step)
        self.metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self.board = Board(folder / "tb", first_step)
        self.bar = self._progress_bar(first_step) if terminal.isatty() else None

    def _forget_after(self, step: int) -> None:
        """Drop the records of steps that a resumed run takes again; remember which are left."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                replace_text(path, "".join(kept))
            self._earlier = {(json.loads(line).get("kind"), _step_of(line)) for line in kept}

    def was_recorded(self, kind: str, step: int) -> bool:
        """Whether an earlier launch left such a record of this step. False on any rank but 0."""
        return (kind, step) in self._earlier

    def _progress_bar(self, first_step: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=Console(file=self.terminal),
        )  # fmt: skip
        self.task = bar.add_task("", total=self.total_steps, completed=first_step)
        bar.start()
        return bar

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if not self.active:
            return
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.terminal, flush=True)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in TensorBoard."""
        if self.active and self._may_write:
            with self._disk():
                self.board.text(tag, text, step)

    def describe(self, recipe: Mapping[str, Any], recipe_text: str, facts: Mapping[str, Any]) -> None:
        """What is trained, and where: a record, texts in TensorBoard, and the run's line in its table of runs."""
        step = facts["begins_at_step"]
        self.record("launch", step, {name: facts[name] for name in SHOWN_FACTS if name in facts})
        self.text("recipe", f"```toml\n{recipe_text}```", step)
        rows = "".join(f"| {name} | {_cell(facts[name])} |\n" for name in SHOWN_FACTS if name in facts)
        self.text("hosts", f"| what | of this launch |\n|---|---|\n{rows}", step)
        if self.active and self._may_write:
            with self._disk():
                self.board.compare_by(recipe)

    @property
    def _may_write(self) -> bool:
        return self._launch is None or not launches.is_replaced(self.folder, self._launch)

    def record(self, kind: str, step: int, values: Mapping[str, Any], log: bool = True) -> None:
        """One record of a step: to metrics.jsonl and TensorBoard where `log`, and to the terminal."""
        if not self.active:
            return

        if log and self._may_write:
            with self._disk():
                self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
                self.board.record(kind, step, values)

        if kind == "train":
            self._progress(step, values)
        elif kind == "benchmarks":
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
        elif kind in ("val", "eval"):
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "tokens")
            self.say(f"step {step}: {'all ' if kind == 'eval' else ''}held-out rows: {numbers}")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """A full disk costs records, not the run; one warning is printed."""
        try:
            yield
        except OSError as error:
            if not self._lost_records:
                self.say(f"RECORDS ARE LOST: {self.folder}: {error}. Training goes on.")
            self._lost_records = True

    def _progress(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = f"loss {values['loss']:.4f}, {values['tokens_per_s']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=numbers)
        elif step % self.line_every_steps == 0 or step in (1, self.total_steps) or self._silent_s() > LONGEST_SILENCE_S:
            self.spoke_at_s = time.monotonic()
            left_s = (self.total_steps - step) * values["step_s"]
            self.say(f"step {step}/{self.total_steps}: {numbers}, {left_s // 60:.0f} min {left_s % 60:.0f} s left")

    def _silent_s(self) -> float:
        return time.monotonic() - self.spoke_at_s

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            if self.bar:
                self.bar.stop()
            for file in (self.metrics, self.board):
                with self._disk():
                    file.close()


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    if isinstance(value, Mapping):
        value = [f"{key}: {one}" for key, one in value.items()]
    return ", ".join(map(str, dict.fromkeys(value))) if isinstance(value, list) else str(value)


def _step_of(line: str) -> float:
    """The step of a record; a line that was cut or damaged belongs to none that is kept."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
