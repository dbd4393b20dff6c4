"""The rows of an epoch: the order of its conversations, and which of them share a row. Pure functions.

    seed, epoch, count --shuffled--> permutation of all conversations --pack, a window at a time--> rows

Packed, windows of PACK_WINDOW conversations in that order are put into rows, longest first, each where it leaves the
least room; unpacked, a row is one conversation.

Keys: SplitMix64's finaliser, as in ds_slm.data.order. Packing: best fit decreasing.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from ds_slm.data.order import splitmix64

PACK_WINDOW = 4_096
"""Number of conversations that are packed together."""


def rows_of_epoch(lengths: np.ndarray, capacity: int | None, seed: int, epoch: int) -> list[list[int]]:
    """The conversations of each row of an epoch.

    Args:
        lengths: tokens of each conversation.
        capacity: tokens of a row; None puts each conversation into a separate row.
        seed: the recipe's seed.
        epoch: the number of the epoch, from 0.
    """
    order = shuffled(seed, epoch, len(lengths))
    if capacity is None:
        return [[int(number)] for number in order]

    rows: list[list[int]] = []
    for begin in range(0, len(order), PACK_WINDOW):
        window = order[begin : begin + PACK_WINDOW]
        packed = pack(lengths[window].tolist(), capacity)
        # rows opened early hold the longest: put them back into the order of their earliest conversation
        packed = sorted((sorted(row) for row in packed), key=lambda row: row[0])
        rows += [[int(window[item]) for item in row] for row in packed]
    return rows


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items into rows of a capacity, longest first, each into the fullest row that still has room (best fit).

    Returns:
        The items of each row, in the order in which the rows were opened.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room left, row; sorted
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(open_rows, (lengths[item], -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        if room > lengths[item]:
            insort(open_rows, (room - lengths[item], row))
    return rows


def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """A seeded permutation of range(count), different in each epoch: the order of SplitMix64 keys."""
    with np.errstate(over="ignore"):
        keys = np.arange(count, dtype=np.uint64) + np.uint64(1)
        for salt in (seed, epoch):
            hashed_salt = splitmix64(np.uint64(salt & (1 << 64) - 1) + np.uint64(1))
            keys = splitmix64(keys * np.uint64(0x9E3779B97F4A7C15) + hashed_salt)
    return np.argsort(keys, kind="stable")
