"""The rows of a step, read in a thread while the step before trains.

    position --> rows of the step, without skipped ones --share--> this rank's micro-batches --read--> StepRows
    a GPU copies from page-locked memory while the CPU goes on (`PageLocked`)

Which rows a step has is a pure function of its position, so they can be read early. A row that cannot be read is
reported where it is used, on all ranks at once, and never stops the step before. One thread reads all rows, so a
source need not be thread-safe.

Known gap: memory holds the rows of two steps at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ds_slm.data.order import RowId, ledger_text
from ds_slm.data.rows import Rows, Split, share
from ds_slm.data.skipping import Ranges, draw
from ds_slm.distributed.ranks import Control
from ds_slm.errors import DataError
from ds_slm.recipe.ds_config import EngineConfig

PATIENCE_S = 1.0
"""How long a step waits for the rows of the next one, to tell the other ranks of them in the same message."""
ALIGNMENT = 64
"""An array begins at a multiple of this many bytes in a buffer."""

Hold = Callable[[Rows], Rows]
"""Puts rows into the memory from which they are used."""


class RowSource(Protocol):
    """Where rows come from; the same protocol for pretraining and fine-tuning."""

    def row_ids(self, position: int) -> list[RowId]:
        """Rows of the step that begins at a global position."""
        ...

    def next_position(self, position: int) -> int:
        """Where the next step begins."""
        ...

    def val_row_ids(self, limit: int | None) -> list[RowId]:
        """Held-out rows: always the same `limit` ones, or all."""
        ...

    def read(self, row_ids: Sequence[RowId | None], split: Split = "train") -> Rows:
        """The rows themselves; None is a filler row of weight 0."""
        ...

    def notes(self) -> list[str]:
        """Lines on what these rows do that is as it should be, such as a second epoch."""
        ...

    def warnings(self) -> list[str]:
        """A line for each thing that a user may not expect of these rows."""
        ...

    def summary(self) -> dict[str, Any]:
        """What all rows hold, for env.json."""
        ...

    def describe(self, row_ids: Sequence[RowId]) -> dict[str, int]:
        """What a step's rows hold, for its record."""
        ...

    @property
    def measures(self) -> Mapping[str, Split]:
        """Ways of counting the held-out loss: the prefix of a value's name -> the split to `read`."""
        ...


@dataclass(frozen=True)
class Share:
    """This rank's micro-batches of some rows."""

    micro_batches: list[Rows]
    problems: list[str]
    """Why rows could not be read; then there are no micro-batches."""
    weight: float = field(init=False)
    """Sum of the loss weights of its targets."""
    count: float = field(init=False)
    """Number of its targets with a weight above 0."""

    def __post_init__(self) -> None:
        weights = [rows.weights for rows in self.micro_batches]
        object.__setattr__(self, "weight", sum(float(one.sum()) for one in weights))
        object.__setattr__(self, "count", sum(float(np.count_nonzero(one > 0)) for one in weights))


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimiser step."""

    next_position: int
    """The position at which the next step begins."""
    row_ids: dict[int, RowId]
    """All ranks' rows by global position, without skipped ones."""
    share: Share
    contents: Mapping[str, int]
    """What the rows hold, for the step's record."""
    ledger_text: str
    """What the ledger says of all ranks' rows."""


class RowReader:
    """Reads rows for one rank."""

    def __init__(
        self, source: RowSource, control: Control, engine_config: EngineConfig, skipped: Ranges, on_gpu: bool
    ) -> None:
        """Reading starts with the first step.

        Args:
            source: where rows come from.
            control: the connection of the rank whose share is read.
            engine_config: how a step is divided.
            skipped: global positions of rows that are left out.
            on_gpu: whether rows are put into page-locked memory.
        """
        self._source, self._control, self._config, self._skipped = source, control, engine_config, skipped
        self._hold: Hold = PageLocked().hold if on_gpu else lambda rows: rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._ahead: tuple[int, Future[StepRows]] | None = None

    def of_step(self, position: int, another_follows: bool) -> StepRows:
        """Rows of the step that begins at a global position; the thread then begins to read the next step's rows.

        The memory of rows that a GPU copies is not reused until the second step after this one is asked for.
        """
        begun, self._ahead = self._ahead, None
        if begun and begun[0] == position:
            rows = begun[1].result()
        else:
            rows = self._thread.submit(self._read_step, position).result()

        if another_follows:
            self._ahead = rows.next_position, self._thread.submit(self._read_step, rows.next_position)
        return rows

    def following(self) -> Share | None:
        """This rank's share of the next step; None if none follows, or if it is not read yet.

        It has usually been read long ago; a slow disk is given PATIENCE_S, for this step must be applied whether the
        next one can be read or not. A failure is raised where the rows are used.
        """
        if self._ahead is None:
            return None
        wait([self._ahead[1]], PATIENCE_S)
        if not self._ahead[1].done() or self._ahead[1].exception() is not None:
            return None
        return self._ahead[1].result().share

    def held_out(self, limit: int | None, split: Split) -> Share:
        """Held-out rows: always the same `limit` ones, or all."""
        return self._thread.submit(lambda: self._read_share(self._source.val_row_ids(limit), split)).result()

    def whole(self, row_ids: Sequence[RowId]) -> Rows:
        """Training rows of all ranks as one batch."""
        return self._thread.submit(self._source.read, row_ids).result()

    def close(self) -> None:
        """Forget what was read ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _read_step(self, position: int) -> StepRows:
        begin, rows = draw(self._source, position, self._skipped)
        row_ids = list(rows.values())
        own = self._read_share(row_ids, "train", self._config.accumulation_steps, self._hold)
        contents = self._source.describe(row_ids)
        return StepRows(self._source.next_position(begin), rows, own, contents, ledger_text(row_ids))

    def _read_share(
        self, row_ids: Sequence[RowId], split: Split, count: int = 0, hold: Hold = lambda rows: rows
    ) -> Share:
        """This rank's micro-batches, filled up to `count`: a short last step has the same number of forwards."""
        shares = share(row_ids, self._control.rank, self._control.world_size, self._config.micro_batch)
        size = len(shares[0])
        shares += [[None] * size] * (count - len(shares))

        # Read all micro-batches at once: otherwise each would be allocated, filled and checked separately.
        try:
            rows = hold(self._source.read([row_id for ids in shares for row_id in ids], split))
        except DataError as error:
            return Share([], error.problems)
        return Share([rows.part(begin, begin + size) for begin in range(0, len(shares) * size, size)], [])


class PageLocked:
    """Rows in two page-locked buffers in turn: one is copied to the device while the other is filled."""

    def __init__(self, allocate: Callable[[int], np.ndarray] | None = None) -> None:
        """`allocate` makes a buffer of a number of bytes (uint8)."""
        self._allocate = allocate or _page_locked_bytes
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def hold(self, rows: Rows) -> Rows:
        """The same rows, in the buffer that was not filled most recently."""
        arrays = rows.token_ids, rows.weights, rows.document_ids
        sizes = [0 if array is None else -(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
        buffer = self._buffers.pop(0)
        if len(buffer) < sum(sizes):
            buffer = self._allocate(sum(sizes))
        self._buffers.append(buffer)

        copies: list[Any] = []
        begin = 0
        for array, size in zip(arrays, sizes, strict=True):
            copies.append(None if array is None else _copied(array, buffer[begin : begin + array.nbytes]))
            begin += size
        return Rows(*copies)


def _page_locked_bytes(size: int) -> np.ndarray:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def _copied(array: np.ndarray, place: np.ndarray) -> np.ndarray:
    view = place.view(array.dtype).reshape(array.shape)
    np.copyto(view, array)  # not torch's copy, which would start threads of its own
    return view
