"""Rows that are read a step ahead: the same rows, errors where the rows are used, buffers that are not overwritten."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ds_slm.data.order import RowId
from ds_slm.data.rows import Rows
from ds_slm.data.skipping import Ranges
from ds_slm.engine import row_reader
from ds_slm.engine.row_reader import PageLocked, RowReader
from ds_slm.errors import DataError

STEP = 4


class Source:
    """Row n holds n's; rows of bad positions cannot be read, and `late` ones only once somebody lets them."""

    def __init__(self, bad: Sequence[int] = (), error: Exception | None = None) -> None:
        self.bad, self.error = bad, error or DataError("row 9 is damaged")
        self.read_positions: list[int] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def row_ids(self, position: int) -> list[RowId]:
        self.read_positions.append(position)
        return [RowId(0, 0, position + place) for place in range(STEP)]

    def next_position(self, position: int) -> int:
        return position + STEP

    def val_row_ids(self, limit: int | None) -> list[RowId]:
        return [RowId(0, 0, place) for place in range(limit or 6)]

    def read(self, row_ids: Sequence[RowId | None], split: str = "train") -> Rows:
        self.may_read.wait(10)
        if any(row and row.row in self.bad for row in row_ids):
            raise self.error
        ids = np.array([[row.row if row else 0] * 3 for row in row_ids])
        return Rows(ids, np.array([[float(row is not None)] * 2 for row in row_ids], np.float32))

    def describe(self, row_ids: Sequence[RowId]) -> dict[str, int]:
        return {"conversations": len(row_ids)}


def reader(source: Any, rank: int = 0, world_size: int = 2, skipped: Ranges = ()) -> RowReader:
    """Of one rank of two, a row a micro-batch, three micro-batches a step."""
    control: Any = SimpleNamespace(rank=rank, world_size=world_size)
    engine_config: Any = SimpleNamespace(micro_batch=1, accumulation_steps=3)
    return RowReader(source, control, engine_config, skipped, on_gpu=False)


def test_each_step_has_its_own_rows_whatever_was_read_ahead() -> None:
    """Oracle: by hand: rank 1 of 2 has every second row, and a filler; a step that was not foreseen is read, too."""
    source = Source()
    rows = reader(source, rank=1)
    for position in (0, 4, 8, 40):
        step = rows.of_step(position, another_follows=True)
        ids = [int(one.token_ids[0, 0]) for one in step.share.micro_batches]
        weights = [float(one.weights.sum()) for one in step.share.micro_batches]
        assert (ids, weights) == ([position + 1, position + 3, 0], [2.0, 2.0, 0.0])
        assert (step.next_position, step.contents) == (position + 4, {"conversations": 4})
        assert list(step.row_ids.items()) == [(place, RowId(0, 0, place)) for place in range(position, position + 4)]
    rows.close()


def test_the_next_step_is_read_while_this_one_trains_and_no_further() -> None:
    """Oracle: what was asked of the source, once its thread has come to rest."""
    source = Source()
    rows = reader(source)
    rows.of_step(0, another_follows=True)
    assert rows._ahead
    rows._ahead[1].result(10)
    assert source.read_positions == [0, 4]
    rows.of_step(4, another_follows=False)
    rows.close()
    assert source.read_positions == [0, 4]


def test_a_step_does_not_wait_for_the_rows_of_the_next() -> None:
    """Oracle: a source that gives no more rows until it may: the first step has its rows all the same."""
    source = Source()
    rows = reader(source)
    rows._ahead = 0, rows._thread.submit(rows._read_step, 0)
    rows._ahead[1].result(10)
    source.may_read.clear()
    assert len(rows.of_step(0, another_follows=True).share.micro_batches) == 3
    source.may_read.set()
    rows.close()


@pytest.mark.parametrize("error", [DataError("row 9 is damaged"), OSError(5, "Input/output error")])
def test_rows_that_cannot_be_read_are_told_where_they_are_used(error: Exception) -> None:
    """Oracle: the step before has its rows and no problem; a problem of the data's is returned, any other raised."""
    source = Source(bad=[9], error=error)
    rows = reader(source, rank=1)
    assert rows.of_step(4, another_follows=True).share.problems == []
    assert rows._ahead
    rows._ahead[1].exception(10)  # the thread has met it by now
    if isinstance(error, DataError):
        share = rows.of_step(8, another_follows=True).share
        assert (share.micro_batches, share.problems) == ([], ["row 9 is damaged"])
    else:
        with pytest.raises(OSError, match="Input/output error"):
            rows.of_step(8, another_follows=True)
    rows.close()


def test_the_share_that_follows_is_that_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the very object that the next step is given; its sums by hand; None where none follows or reading failed.

    Problems of the data are the share's, on the way to all ranks; a failure of another kind is raised where it is used.
    """
    monkeypatch.setattr(row_reader, "PATIENCE_S", 60.0)  # a busy machine is slow
    rows = reader(Source(bad=[9]), rank=1)
    rows.of_step(0, another_follows=True)
    following = rows.following()
    assert following is not None and (following.weight, following.count) == (4.0, 4.0)
    assert rows.of_step(4, another_follows=True).share is following

    damaged = rows.following()
    assert damaged is not None and (damaged.problems, damaged.weight) == (["row 9 is damaged"], 0.0)
    rows.of_step(8, another_follows=False)
    assert rows.following() is None
    rows.close()

    rows = reader(Source(bad=[9], error=OSError(5, "Input/output error")), rank=1)
    rows.of_step(4, another_follows=True)
    assert rows.following() is None
    rows.close()


def test_skipped_rows_leave_a_shorter_step_or_none() -> None:
    """Oracle: by hand: rows 2 to 9 left out: two rows at 0, none at 4, two at 8."""
    rows = reader(Source(), world_size=1, skipped=((2, 10),))
    first = rows.of_step(0, another_follows=True)
    second = rows.of_step(first.next_position, another_follows=True)
    assert ([*first.row_ids], first.next_position, len(first.share.micro_batches)) == ([0, 1], 4, 3)
    assert ([*second.row_ids], second.next_position) == ([10, 11], 12)
    rows.close()


def test_held_out_rows_and_whole_steps_are_read_in_the_same_thread() -> None:
    """Oracle: the one thread that every read was seen in."""
    seen = set()

    class Seen(Source):
        def read(self, row_ids: Sequence[RowId | None], split: str = "train") -> Rows:
            seen.add(threading.current_thread().name)
            return super().read(row_ids, split)

    rows = reader(Seen())
    step = rows.of_step(0, another_follows=True)
    assert len(rows.held_out(5, "val").micro_batches) == 3
    assert rows.whole(list(step.row_ids.values())).token_ids[:, 0].tolist() == [0, 1, 2, 3]
    rows.close()
    assert len(seen) == 1 and threading.current_thread().name not in seen


def some_rows(seed: int, packed: bool, size: int = 3) -> Rows:
    """Drawn values."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, 9, (size, 7), dtype=np.int32)
    weights = rng.random((size, 7), dtype=np.float32)
    return Rows(rng.integers(0, 1000, (size, 8)), weights, documents if packed else None)


@pytest.mark.parametrize("packed", [False, True])
def test_page_locked_rows_are_the_rows_and_outlive_the_next_ones(packed: bool) -> None:
    """Oracle: the arrays as they were read; two buffers in all, one more where rows have grown."""
    sizes: list[int] = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return np.full(size, 255, np.uint8)

    pages = PageLocked(allocate)
    read = [some_rows(seed, packed) for seed in range(4)]
    held: list[Rows] = []
    for number, rows in enumerate(read):
        held.append(pages.hold(rows))
        for ours, theirs in zip(held[-2:], read[: number + 1][-2:], strict=True):
            assert np.array_equal(ours.token_ids, theirs.token_ids) and ours.token_ids.dtype == np.int64
            assert np.array_equal(ours.weights, theirs.weights) and ours.weights.dtype == np.float32
            assert (ours.document_ids is None) == (not packed)
            assert not packed or np.array_equal(ours.document_ids, theirs.document_ids)
            assert not np.shares_memory(ours.token_ids, theirs.token_ids)
    assert len(sizes) == 2
    pages.hold(some_rows(9, packed, size=5))
    assert len(sizes) == 3 and sizes[2] > sizes[0]


def test_rows_that_are_slow_do_not_hold_up_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a source that gives no rows until it may: the next step's share is not there, then it is."""
    monkeypatch.setattr(row_reader, "PATIENCE_S", 0.01)
    source = Source()
    rows = reader(source)
    rows.of_step(0, another_follows=False)
    source.may_read.clear()
    rows._ahead = 4, rows._thread.submit(rows._read_step, 4)
    assert rows.following() is None
    source.may_read.set()
    rows._ahead[1].result(10)
    assert rows.following() is rows.of_step(4, another_follows=False).share
    rows.close()
