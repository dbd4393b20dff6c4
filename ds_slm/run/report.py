"""What a run reports: to its records, and as a progress bar or lines on the terminal of rank 0.

libraries' output (stdout, stderr) --> logs/rank-00000.log                            (`captured_output`)
record --> metrics.jsonl and tb/ of every host that keeps records, the terminal       (`Report`, records.py)
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ds_slm.run.records import Records

SHOWN_FACTS = (
    "hosts", "world_size", "device", "backend", "precision", "zero_stage", "optimizer", "rows_per_step",
    "accumulation_steps", "micro_batch_rows", "kernels", "generation", "begins_at_step", "base", "start_s", "warnings",
)  # fmt: skip
"""Facts of env.json that TensorBoard shows."""
LONGEST_SILENCE_S = 60.0
"""Without a progress bar, a step gets a line if the last line is at least this long ago."""


@contextlib.contextmanager
def captured_output(log: Path) -> Iterator[TextIO]:
    """Send everything this process and its libraries print to a log file; yields the terminal as it was.

    Works on file descriptors, so compilers and C++ libraries are caught as well. A traceback goes to the log and, after
    the descriptors are restored, to the terminal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()

    # Copies of its descriptors keep the terminal reachable.
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
    """Sends what a run reports to its records, and on rank 0 to the terminal."""

    def __init__(self, terminal: TextIO | None, records: Records | None, total_steps: int, first_step: int = 0) -> None:
        """`terminal` is None on all ranks except 0, `records` on ranks that keep none."""
        self.terminal, self.records, self.total_steps = terminal, records, total_steps
        self.line_every_steps, self.spoke_at_s = max(total_steps // 20, 1), time.monotonic()
        self.bar = self._progress_bar(first_step) if terminal and terminal.isatty() else None

    @property
    def is_heard(self) -> bool:
        """Whether anything keeps or prints a record here; on most ranks nothing does."""
        return self.records is not None or self.terminal is not None

    def is_replaced(self) -> bool:
        """Whether another launch holds this host's run folder. False on ranks that keep no records."""
        return self.records is not None and self.records.is_replaced()

    def was_recorded(self, kind: str, step: int) -> bool:
        """Whether an earlier launch left a record of this kind and step here. False on hosts that keep none."""
        return self.records is not None and self.records.were_made(kind, step)

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
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.terminal:
            print(text, file=self.terminal, flush=True)

    def describe(self, recipe: Mapping[str, Any], recipe_text: str, facts: Mapping[str, Any]) -> None:
        """Report what is trained, and where: a record, texts in TensorBoard, and a line in its table of runs."""
        step = facts["begins_at_step"]
        self.record("launch", step, {name: facts[name] for name in SHOWN_FACTS if name in facts})
        if self.records:
            rows = "".join(f"| {name} | {_cell(facts[name])} |\n" for name in SHOWN_FACTS if name in facts)
            self.records.text("recipe", f"```toml\n{recipe_text}```", step)
            self.records.text("hosts", f"| what | of this launch |\n|---|---|\n{rows}", step)
            self.records.compare_by(recipe)

    def record(self, kind: str, step: int, values: Mapping[str, Any], log: bool = True) -> None:
        """Report one record of a step: to the records if `log`, and to the terminal."""
        if self.records and log:
            self.records.write(kind, step, values)
        if not self.terminal:
            return

        if kind == "train":
            self._progress(step, values)
        elif kind == "benchmarks":
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
        elif kind in ("val", "eval"):
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "tokens")
            self.say(f"step {step}: {'all ' if kind == 'eval' else ''}held-out rows: {numbers}")

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
        if self.bar:
            self.bar.stop()
        if self.records:
            self.records.close()


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    if isinstance(value, Mapping):
        value = [f"{key}: {one}" for key, one in value.items()]
    return ", ".join(map(str, dict.fromkeys(value))) if isinstance(value, list) else str(value)
