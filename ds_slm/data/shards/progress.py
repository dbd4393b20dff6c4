"""The progress of preparing: a bar on a terminal, elsewhere a line now and then.

advance(tokens, bytes) --> MB/s, tokens/s, time left --> rich, or `report`

The time left is estimated from the tokens that are asked for or, if the source may end before that, from the bytes of
its files. The length of a compressed file's text is unknown until its end.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

REPORT_EVERY_S = 10.0


class Amount(NamedTuple):
    """An amount of one source's text."""

    tokens: float
    text_bytes: int | None
    """Bytes of text; None if unknown."""


NOTHING = Amount(0, 0)


class Progress:
    """Progress of one source; a context manager."""

    def __init__(
        self,
        name: str,
        total: Amount,
        report: Callable[[str], None],
        done: Amount = NOTHING,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            name: the source's name.
            total: the most tokens that are asked for, and the approximate bytes of the source's text.
            report: takes a line every REPORT_EVERY_S if no bar is drawn.
            done: the amount that an interrupted run had done.
            bar: whether to draw a bar; None draws one if stderr is a terminal.
            clock: gives the time in seconds.
        """
        self._name, self._total, self._first = name, total, done
        self._report, self._clock = report, clock
        self._tokens, self._bytes = done.tokens, done.text_bytes or 0
        self._begin_s = self._told_s = clock()
        self._bar = _bar(name) if (sys.stderr.isatty() if bar is None else bar) else None

    def __enter__(self) -> Self:
        """Draw the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar:
            self._bar.stop()

    def advance(self, tokens: int, text_bytes: int) -> None:
        """Add to what is done."""
        self._tokens += tokens
        self._bytes += text_bytes
        now_s = self._clock()
        if now_s - self._told_s >= (0.2 if self._bar else REPORT_EVERY_S):
            self._told_s = now_s
            if self._bar:
                self._bar.update(
                    self._bar.task_ids[0], completed=self._fraction(self._tokens, self._bytes), rates=self.line()
                )
            else:
                self._report(f"{self._name}: {self.line()}")

    def line(self) -> str:
        """A line with what is done, the speeds and the time left."""
        elapsed_s = max(self._clock() - self._begin_s, 1e-9)
        mb_per_s = (self._bytes - (self._first.text_bytes or 0)) / elapsed_s / 1e6
        tokens_per_s = (self._tokens - self._first.tokens) / elapsed_s
        done = f"{self._bytes / 1e6:,.0f} MB, {self._tokens / 1e6:,.1f} M tokens"
        return f"{done}, {mb_per_s:.1f} MB/s, {tokens_per_s:,.0f} tokens/s, {self._left(elapsed_s)}"

    def _left(self, elapsed_s: float) -> str:
        done = self._fraction(self._tokens, self._bytes)
        gained = done - self._fraction(self._first.tokens, self._first.text_bytes or 0)
        if gained <= 0:
            return "time left unknown"
        minutes, seconds = divmod(int(elapsed_s * (1 - done) / gained), 60)
        return f"{minutes} min {seconds} s left"

    def _fraction(self, tokens: float, text_bytes: int) -> float:
        by_bytes = text_bytes / self._total.text_bytes if self._total.text_bytes else 0.0
        return min(max(tokens / self._total.tokens, by_bytes), 1.0)


def _bar(name: str) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"), console=Console(stderr=True)
    )
    bar.add_task(name, total=1.0, rates="")
    return bar
