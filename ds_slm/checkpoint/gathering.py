"""From what every rank holds to whole tensors on the writers: a window of values at a time, in the order of a file.

    all tensors by name, one after the other:  |- window -|- window -|- window -|
    each window:  every rank packs its part of it --send--> each writer puts the parts in place --> its file

A writer needs a few windows of memory, however large the model, and allocates all of it before anything is sent. A rank
that fails later goes on sending and receiving, so that the others need not wait, and reports the failure at the end.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_slm import pulse
from ds_slm.checkpoint.tensor_file import in_file_order
from ds_slm.distributed.ranks import Control
from ds_slm.engine.partitions import Snapshot, absmax_notes
from ds_slm.recipe.sizes import SAVE_WINDOW_VALUES as WINDOW_VALUES

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Span:
    """Contiguous values: `numel` from `start`, counted over all tensors in the order of the file."""

    start: int
    numel: int
    read: Callable[[int, int], Tensor]
    """fp32 values from the first index to before the second, counted from the span's start."""


def spans_of_kind(own: Snapshot, kind: str) -> list[Span]:
    """This rank's part of all weights, or of one of their moments."""
    starts = _starts(own.shapes)
    return [
        Span(starts[part.name] + part.param_start, part.numel, _reader(stored.decoded, part.flat_start))
        for fragments, stored in zip(own.fragments, own.stored[kind], strict=True)
        for part in fragments
    ]


def notes_of(own: Snapshot, control: Control) -> tuple[Shapes, list[Span]]:
    """Shapes of all ranks' block scales, and this rank's scales; empty without 8-bit states. Collective."""
    mine = absmax_notes(own, control.rank)
    sizes = control.gather({name: note.numel() for name, note in mine.items()})
    shapes = {name: [numel] for theirs in sizes for name, numel in theirs.items()}
    starts = _starts(shapes)
    return shapes, [Span(starts[name], note.numel(), _reader(_slice(note), 0)) for name, note in mine.items()]


def _reader(read: Callable[[int, int], Tensor], first: int) -> Callable[[int, int], Tensor]:
    return lambda begin, end: read(first + begin, first + end)


def _slice(values: Tensor) -> Callable[[int, int], Tensor]:
    return lambda begin, end: values[begin:end]


def _starts(shapes: Shapes) -> dict[str, int]:
    """Where the values of each tensor begin."""
    starts, end = {}, 0
    for name in in_file_order(shapes):
        starts[name] = end
        end += math.prod(shapes[name])
    return starts


class Gathering:
    """Brings values of all ranks to the writers. Allocating its memory may fail; then nothing was sent."""

    def __init__(self, writers: list[int], control: Control) -> None:
        self._writers, self._control = writers, control
        self._packed = _empty(WINDOW_VALUES)
        if control.rank in writers:
            self._received, self._window = _empty(WINDOW_VALUES), _empty(WINDOW_VALUES)
        self.problem: str | None = None
        """Why this rank sent other values than it holds."""

    def stream(self, shapes: Shapes, own: list[Span], write: Callable[[Tensor], None] | None) -> None:
        """Give all values of some tensors to `write` on the writers, window after window. Collective.

        Args:
            shapes: the shapes of all tensors, by name; the same on all ranks.
            own: this rank's part of them.
            write: takes a flat tensor, which it must not keep; never raises. None on ranks that do not write.
        """
        own = sorted((span for span in own if span.numel), key=lambda span: span.start)
        layout = [[tuple(pair) for pair in theirs] for theirs in self._control.gather([_place(one) for one in own])]
        total = sum(math.prod(shape) for shape in shapes.values())
        if not _covers(layout, total):
            self.problem = "the ranks' partitions do not make up the whole model: nothing of it is saved"
            return
        for begin in range(0, total, WINDOW_VALUES):
            end = min(begin + WINDOW_VALUES, total)
            self._exchange(layout, own, begin, end)
            if write:
                write(self._window[: end - begin])
            pulse.beat()

    def _exchange(self, layout: list[list[tuple[int, int]]], own: list[Span], begin: int, end: int) -> None:
        rank, control = self._control.rank, self._control
        mine = self._pack(own, list(_overlaps(layout[rank], begin, end)))
        for writer in self._writers:
            if rank != writer:
                if mine.numel():
                    control.send(mine, writer)
                continue
            for sender, spans in enumerate(layout):
                parts = list(_overlaps(spans, begin, end))
                count = sum(numel for _, _, numel in parts)
                if count:
                    values = mine if sender == rank else control.receive(self._received[:count], sender)
                    self._unpack(values, spans, parts, begin)

    def _pack(self, own: list[Span], parts: list[tuple[int, int, int]]) -> Tensor:
        """This rank's values of a window, one part after the other."""
        filled = 0
        for index, first, numel in parts:
            try:
                self._packed[filled : filled + numel] = own[index].read(first, first + numel)
            except (MemoryError, RuntimeError) as error:  # no memory to decode them
                self.problem = f"{type(error).__name__}: {error}"
            filled += numel
        return self._packed[:filled]

    def _unpack(
        self, values: Tensor, spans: list[tuple[int, int]], parts: list[tuple[int, int, int]], begin: int
    ) -> None:
        """Put a sender's values where they belong in the window."""
        taken = 0
        for index, first, numel in parts:
            at = spans[index][0] + first - begin
            self._window[at : at + numel] = values[taken : taken + numel]
            taken += numel


def _empty(numel: int) -> Tensor:
    return torch.empty(numel, dtype=torch.float32)


def _place(span: Span) -> tuple[int, int]:
    return span.start, span.numel


def _overlaps(spans: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The parts of sorted spans that lie in a window: (index of the span, first value within it, number of values)."""
    index = max(bisect_right(spans, begin, key=lambda span: span[0]) - 1, 0)
    while index < len(spans) and spans[index][0] < end:
        start, numel = spans[index]
        first, last = max(begin - start, 0), min(end - start, numel)
        if first < last:
            yield index, first, last - first
        index += 1


def _covers(layout: Iterable[Iterable[tuple[int, int]]], total: int) -> bool:
    """Whether the spans of all ranks hold every value exactly once."""
    end = 0
    for start, numel in sorted(span for theirs in layout for span in theirs):
        if start != end:
            return False
        end += numel
    return end == total
