"""Which row stands at each position of a run: a pure function of the seed, never stored.

    position --> source (by the weights) --> n-th draw from it --> epoch, place --> permuted row
    step     --> its positions           --> RowIds            --> ledger (a chain of hashes)

Rank, world size and resumption do not matter, so every topology trains on the same rows in the same order.

Mix: earliest-deadline-first over pseudo-deadlines. The j-th draw of a source of weight w out of W may happen from
position floor(j W / w) on and before ceil((j + 1) W / w); at full utilisation of one server that schedule always exists
and keeps every source within one row of its share at every prefix (Baruah, Cohen, Plaxton and Varvel, "Proportionate
progress: a notion of fairness in resource allocation", Algorithmica 15, 1996).
Permutation: a Feistel network over the smallest power of two that holds the range, cycle-walking back into it (Black
and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); its round function is SplitMix64's finaliser
(Steele, Lea and Flood, OOPSLA 2014). Good shuffling, not cryptography.

Known gaps: the pattern of the mix is held in memory, with one entry per unit of total weight.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.uint64, np.ndarray)
LastBatch = Literal["wrap", "keep", "drop"]

BLOCK = 1024
"""Positions whose rows are computed at once, as arrays; computing them one by one takes Python ten times as long."""
FEISTEL_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


class RowId(NamedTuple):
    """A row of the data: the source's place in the recipe, the pass over that source, the row within it."""

    source: int
    epoch: int
    row: int


def permute(seed: int, epochs: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """The rows, uint64 [N], at places [N] of epochs [N]: a seeded bijection on range(count), new in each epoch."""
    bits = max((count - 1).bit_length(), 2)
    low_bits = bits // 2
    each, index = np.unique(epochs, return_inverse=True)
    keys = np.array([_round_keys(seed, int(epoch)) for epoch in each], np.uint64)[index].T

    # Walk until a place lies in the range: at most half of the 2^bits places lie outside (three quarters if the count
    # is 1), so two rounds are enough on average.
    rows, outside = places.astype(np.uint64), np.arange(len(places))
    while len(outside):
        rows[outside] = _feistel(rows[outside], bits - low_bits, low_bits, keys[:, outside])
        outside = outside[rows[outside] >= count]
    return rows


def _feistel(values: np.ndarray, high_bits: int, low_bits: int, keys: np.ndarray) -> np.ndarray:
    """Values [N], uint64, after the rounds of their keys [rounds, N]."""
    high, low = values >> low_bits, values & ((1 << low_bits) - 1)
    # In each round the halves, and so their widths, are swapped.
    for key in keys:
        high, low = low, high ^ (splitmix64(low ^ key) & ((1 << high_bits) - 1))
        high_bits, low_bits = low_bits, high_bits
    return high << low_bits | low


def splitmix64(value: Integers) -> Integers:
    """SplitMix64's finaliser on a whole number below 2^64 or a uint64 array: a bijection that looks random."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"ds_slm order {seed} {epoch}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


class Order:
    """The endless sequence of rows that a run draws from its sources."""

    def __init__(self, seed: int, rows_per_source: Sequence[int], weights: Sequence[int]) -> None:
        """Rows and integer weights in the recipe's order of sources; every source has at least one row."""
        assert len(rows_per_source) == len(weights) and min(rows_per_source) > 0 and min(weights) > 0
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._rows = list(rows_per_source)
        self._seeds = [_source_seed(seed, source) for source in range(len(weights))]
        self._pattern = _mix_pattern(self._weights)
        self._slots = np.array(self._pattern)
        self._block = lru_cache(maxsize=8)(self._rows_of_block)

    def sample(self, index: int) -> RowId:
        """The row at global position `index`."""
        return self._block(index // BLOCK)[index % BLOCK]

    def samples(self, begin: int, count: int) -> list[RowId]:
        """The rows at `count` global positions from `begin` on."""
        end, found = begin + count, []
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            first = number * BLOCK
            found += self._block(number)[max(begin - first, 0) : end - first]
        return found

    def _rows_of_block(self, number: int) -> list[RowId]:
        cycles, slots = np.divmod(np.arange(number * BLOCK, (number + 1) * BLOCK), len(self._slots))
        sources, draws_before = self._slots[slots].T
        draws = cycles * np.array(self._weights)[sources] + draws_before
        epochs, places = np.divmod(draws, np.array(self._rows)[sources])

        rows = np.empty(BLOCK, np.uint64)
        for source in np.unique(sources).tolist():
            own = sources == source
            rows[own] = permute(self._seeds[source], epochs[own], places[own], self._rows[source])
        return list(map(RowId, sources.tolist(), epochs.tolist(), rows.tolist()))

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch: the longest run of draws from the start in which no row occurs twice.

        For a single source these are all its rows; a mix ends its epoch when the first source runs out.
        """
        return min(self.first_repeat(source) for source in range(len(self._rows)))

    def rows_of(self, source: int) -> int:
        """Rows of one epoch of a source."""
        return self._rows[source]

    def sources_before(self, position: int) -> Counter[int]:
        """Draws of each source, by its place, at all global positions before this one."""
        cycles, slots = divmod(position, len(self._pattern))
        drawn = Counter({source: cycles * weight for source, weight in enumerate(self._weights)})
        return drawn + Counter(source for source, _ in self._pattern[:slots])

    def first_repeat(self, source: int) -> int:
        """The position at which a source has run out and begins its second epoch, in another order."""
        cycle, draws_before = divmod(self._rows[source], self._weights[source])
        return cycle * len(self._pattern) + self._pattern.index((source, draws_before))


def _source_seed(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"ds_slm source {seed} {source}".encode(), digest_size=8).digest(), "little")


def _mix_pattern(weights: list[int]) -> list[tuple[int, int]]:
    """One cycle of the mix, as (source, draws of that source before this one)."""
    total = sum(weights)
    drawn = [0] * len(weights)
    pattern = []

    for slot in range(total):
        # Among sources whose next draw may happen by now, take the one that is due first; if equal, the first one.
        deadlines = {}
        for source, weight in enumerate(weights):
            released = drawn[source] * total // weight
            if released <= slot:
                deadlines[source] = -(-(drawn[source] + 1) * total // weight)  # rounded up
        chosen = min(deadlines, key=deadlines.__getitem__)

        pattern.append((chosen, drawn[chosen]))
        drawn[chosen] += 1

    return pattern


def step_row_ids(
    order: Order, position: int, rows_per_step: int, last_batch: LastBatch, rows_per_epoch: int
) -> list[RowId]:
    """The rows of the step that begins at a global position.

    wrap: always `rows_per_step` rows, going on into the next epoch. keep: the last step of an epoch is short. drop:
    like wrap, because `next_step_position` leaves out the rest of an epoch that does not fill a step.
    """
    left_in_epoch = rows_per_epoch - position % rows_per_epoch
    count = min(rows_per_step, left_in_epoch) if last_batch == "keep" else rows_per_step
    return order.samples(position, count)


def next_step_position(position: int, rows_per_step: int, last_batch: LastBatch, rows_per_epoch: int) -> int:
    """Where the step after the one at `position` begins."""
    left_in_epoch = rows_per_epoch - position % rows_per_epoch
    if last_batch == "keep":
        return position + min(rows_per_step, left_in_epoch)

    # This step takes its rows. If the epoch then has no whole step left, the next epoch follows.
    if last_batch == "drop" and left_in_epoch - rows_per_step < rows_per_step:
        return position + left_in_epoch
    return position + rows_per_step


def step_at(position: int, rows_per_step: int, last_batch: LastBatch, rows_per_epoch: int) -> int:
    """The step, counted from 1, that takes the row at a global position; the next step if `drop` leaves the row out."""
    if last_batch == "wrap":
        return position // rows_per_step + 1
    epoch, place = divmod(position, rows_per_epoch)
    steps_per_epoch = rows_per_epoch // rows_per_step if last_batch == "drop" else -(-rows_per_epoch // rows_per_step)
    return epoch * steps_per_epoch + min(place // rows_per_step, steps_per_epoch) + 1


def ledger_text(row_ids: Iterable[RowId]) -> str:
    """The ledger's text for a step's rows: source/epoch/row of each."""
    return " ".join([f"{source}/{epoch}/{row}" for source, epoch, row in row_ids])


def extend_ledger(previous_hex: str, text: str) -> str:
    """The ledger after a step: sha256 over the ledger before it and the text of the rows it trained on, in order."""
    return hashlib.sha256(f"{previous_hex}\n{text}".encode()).hexdigest()
