"""The order of conversations in an epoch, and which of them share a row: pure functions.

    seed, epoch, count --shuffled--> permutation;   lengths, capacity --pack--> rows

Keys: SplitMix64's finaliser, as in ds_slm.data.order. Packing: best fit decreasing.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from ds_slm.data.order import mix


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
    """A seeded permutation of range(count), another one in each epoch: the order of SplitMix64 keys."""
    with np.errstate(over="ignore"):
        keys = np.arange(count, dtype=np.uint64) + np.uint64(1)
        for salt in (seed, epoch):
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + mix(np.uint64(salt & (1 << 64) - 1) + np.uint64(1)))
    return np.argsort(keys, kind="stable")
