"""Packing and the order of an epoch, as pure functions."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.packing import pack, shuffled


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing, looking at every row for each item."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        room_left = {
            place: left
            for place, row in enumerate(rows)
            if (left := capacity - sum(lengths[other] for other in row) - lengths[item]) >= 0
        }
        if room_left:
            rows[min(room_left, key=lambda place: (room_left[place], place))].append(item)
        else:
            rows.append([item])
    return rows


@settings(max_examples=300)
@given(capacity=st.integers(1, 40), data=st.data())
def test_pack_is_best_fit(capacity: int, data: st.DataObject) -> None:
    """Oracle: a search through all rows for every item; capacity is never exceeded, every item is in one row."""
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    rows = pack(lengths, capacity)
    assert rows == naive_best_fit(lengths, capacity) == pack(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= capacity for row in rows)
    sums = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(one + other > capacity for one, other in pairwise(sums))  # no two would fit in one


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    """Oracle: every number once; another seed or epoch, another order."""
    orders = [shuffled(seed, epoch, count) for seed in (0, 1, -1, 1337, 2**40) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)
    if count > 100:
        assert len({str(order.tolist()) for order in orders}) == len(orders)
        correlations = np.abs(np.corrcoef([*orders, np.arange(count)]) - np.eye(len(orders) + 1))
        assert correlations.max() < 5 / np.sqrt(count)


def test_shuffled_never_changes() -> None:
    """Oracle: pinned: a run that was begun must go on in the same order with a later version."""
    assert shuffled(5, 0, 10).tolist() == [0, 6, 1, 8, 5, 3, 2, 7, 4, 9]
    assert shuffled(5, 1, 10).tolist() == [1, 5, 2, 9, 3, 0, 6, 4, 7, 8]
    assert int(shuffled(1337, 0, 199_807)[:1000].sum()) == 100_771_354
