"""The order of rows: a permutation never stored, a mix that keeps its weights, steps, the ledger."""

import hashlib
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.data.order import (
    BLOCK,
    LastBatch,
    Order,
    RowId,
    extend_ledger,
    ledger_text,
    next_step_position,
    permute,
    splitmix64,
    step_at,
    step_row_ids,
)


def permuted(seed: int, epoch: int, count: int, first: int | None = None) -> list[int]:
    """The rows at the first places of an epoch, or at all."""
    places = np.arange(first or count)
    return permute(seed, np.full(len(places), epoch), places, count).tolist()


def by_hand(seed: int, epoch: int, place: int, count: int) -> int:
    """One row's, in whole numbers without an array: walk until it lies in the range."""
    bits = max((count - 1).bit_length(), 2)
    digest = hashlib.blake2b(f"ds_slm order {seed} {epoch}".encode(), digest_size=48).digest()
    while True:
        low_bits, high_bits = bits // 2, bits - bits // 2
        high, low = place >> low_bits, place % 2**low_bits
        for number in range(6):
            key = int.from_bytes(digest[8 * number : 8 * number + 8], "little")
            high, low = low, high ^ splitmix64(low ^ key) % 2**high_bits
            high_bits, low_bits = low_bits, high_bits
        place = (high << low_bits) + low
        if place < count:
            return place


@given(seed=st.integers(0, 2**64), count=st.integers(1, 10**12), places=st.lists(st.integers(0, 10**12), min_size=1))
def test_rows_of_many_epochs_at_once_are_those_of_each(seed: int, count: int, places: list[int]) -> None:
    """Oracle: `by_hand`: Python's whole numbers, one row at a time."""
    found = permute(seed, np.arange(len(places)) % 3, np.array(places) % count, count)
    assert found.tolist() == [by_hand(seed, at % 3, place % count, count) for at, place in enumerate(places)]


def test_the_order_knows_no_blocks() -> None:
    """Oracle: rows beside the border of two blocks: of an order that begins there, and of one that came to it."""
    places = [*range(1020, 1030), 10**12]
    along = Order(3, [7, 10**9], [2, 3])
    passed = [along.sample(place) for place in range(2100)]
    for place in places:
        alone = Order(3, [7, 10**9], [2, 3]).sample(place)
        assert alone == along.sample(place) and all(type(one) is int for one in alone)
        assert place > 2100 or passed[place] == alone


@given(seed=st.integers(0, 2**64), epoch=st.integers(0, 9), count=st.integers(1, 700))
def test_permutation_is_a_bijection(seed: int, epoch: int, count: int) -> None:
    """Oracle: the set of all rows."""
    assert sorted(permuted(seed, epoch, count)) == list(range(count))


def test_permutation_shuffles() -> None:
    """Oracle: a random permutation has about one fixed point, keeps one neighbourhood in a thousand, and every epoch
    and seed has its own.
    """
    count = 5_000
    orders = {(seed, epoch): tuple(permuted(seed, epoch, count)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    for order in orders.values():
        assert sum(row == index for index, row in enumerate(order)) < 8
        assert sum(abs(one - two) == 1 for one, two in pairwise(order)) < 16
        mean_of_first_half = sum(order[: count // 2]) / (count // 2)
        assert abs(mean_of_first_half - count / 2) < 0.03 * count


def test_permutation_needs_no_table() -> None:
    """Oracle: rows of a corpus of 10 trillion tokens, at once; at least 20,000 a second on any machine."""
    count = 10**10
    begin_s = time.process_time()
    rows = permuted(7, 0, count, first=2_000)
    assert time.process_time() - begin_s < 0.1 * 5
    assert len(set(rows)) == len(rows) and all(0 <= row < count for row in rows)


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_weights_hold_at_every_prefix(weights: list[int]) -> None:
    """Oracle: exact fractions; every source within one row of its share, and exact after a cycle."""
    total = sum(weights)
    order = Order(0, [10_000] * len(weights), weights)
    drawn: Counter[int] = Counter()
    for prefix in range(1, 2 * total + 1):
        drawn[order.sample(prefix - 1).source] += 1
        for source, weight in enumerate(weights):
            assert abs(drawn[source] - Fraction(prefix * weight, total)) < 1
    assert [drawn[source] for source in range(len(weights))] == [2 * weight for weight in weights]


def test_a_source_that_runs_out_starts_another_epoch_in_another_order() -> None:
    """Oracle: each epoch of a source holds each of its rows once, in an order of its own."""
    order = Order(5, [12, 40], [3, 2])
    draws = [row for row in map(order.sample, range(60)) if row.source == 0]
    epochs = [[row.row for row in draws[begin : begin + 12]] for begin in (0, 12, 24)]
    assert [row.epoch for row in draws] == [place // 12 for place in range(36)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_an_epoch_of_a_mix_ends_before_the_first_repeated_row() -> None:
    """Oracle: a search for the first row of a second epoch."""
    for rows, weights in (([12, 40], [3, 2]), ([9], [4]), ([100, 7, 31], [5, 1, 1])):
        order = Order(1, rows, weights)
        assert order.epoch_rows == next(index for index in range(10**6) if order.sample(index).epoch)


@pytest.mark.parametrize(
    ("last_batch", "lengths", "beginnings"),
    [
        ("wrap", [4, 4, 4, 4, 4], [0, 4, 8, 12, 16]),
        ("keep", [4, 4, 2, 4, 4], [0, 4, 8, 10, 14]),
        ("drop", [4, 4, 4, 4, 4], [0, 4, 10, 14, 20]),
    ],
)
def test_last_batch(last_batch: str, lengths: list[int], beginnings: list[int]) -> None:
    """Oracle: ten rows in steps of four, worked out by hand."""
    order = Order(0, [10], [1])
    position, steps, positions = 0, [], []
    for _ in lengths:
        positions.append(position)
        steps.append(step_row_ids(order, position, 4, last_batch, 10))  # type: ignore[arg-type]
        position = next_step_position(position, 4, last_batch, 10)  # type: ignore[arg-type]
    assert [len(step) for step in steps] == lengths
    assert positions == beginnings
    assert all(step[0] == order.sample(position) for step, position in zip(steps, positions, strict=True))
    if last_batch == "keep":
        assert sorted(row.row for step in steps[:3] for row in step) == list(range(10))


@pytest.mark.parametrize("last_batch", ["wrap", "keep", "drop"])
@given(total_rows=st.integers(5, 40), rows_per_step=st.integers(1, 5))
def test_step_of_a_position(last_batch: LastBatch, total_rows: int, rows_per_step: int) -> None:
    """Oracle: taking the steps one after the other until one has the position."""
    position, order = 0, Order(0, [total_rows], [1])
    for step in range(1, 30):
        for taken in range(len(step_row_ids(order, position, rows_per_step, last_batch, total_rows))):
            assert step_at(position + taken, rows_per_step, last_batch, total_rows) == step
        position = next_step_position(position, rows_per_step, last_batch, total_rows)


@given(st.integers(0, 5 * BLOCK), st.integers(0, 3 * BLOCK))
def test_rows_of_many_positions_are_those_of_each(begin: int, count: int) -> None:
    """Oracle: one position at a time, across the borders of blocks."""
    order = Order(7, [1_000, 300], [3, 1])
    assert order.samples(begin, count) == [order.sample(begin + offset) for offset in range(count)]


def test_order_is_pinned() -> None:
    """Oracle: rows drawn when the order was fixed; a change would retrain every published run on other data."""
    order = Order(42, [1_000, 300], [3, 1])
    drawn = [tuple(order.sample(index)) for index in (0, 1, 2, 3, 1_500)]
    assert drawn == [(0, 0, 979), (0, 0, 196), (0, 0, 893), (1, 0, 127), (0, 1, 801)]


def test_ledger_chains() -> None:
    """Oracle: the same rows in the same steps give the same ledger, any other none; sha256 written out."""
    one, two = ledger_text([RowId(0, 0, 5), RowId(1, 2, 3)]), ledger_text([RowId(0, 0, 7)])
    turned = ledger_text([RowId(1, 2, 3), RowId(0, 0, 5)])
    expected = hashlib.sha256(b"abc\n0/0/5 1/2/3").hexdigest()
    assert extend_ledger("abc", one) == expected
    ledgers = {
        extend_ledger(extend_ledger("", one), two),
        extend_ledger(extend_ledger("", two), one),
        extend_ledger("", f"{one} {two}"),
        extend_ledger(extend_ledger("", turned), two),
    }
    assert len(ledgers) == 4
