"""Two models on the same items: the paired difference, far sharper than two separate errors.

    items of A, items of B --compare--> each metric: A, B, A - B with its standard error, who alone was right

Differences are taken item by item, so what both models find easy or hard cancels. For right and wrong answers, only
items on which the models differ count; McNemar's exact test gives their chance (Psychometrika 12, 1947): if the models
were equally good, each would win half of these items.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ds_slm.errors import DataError
from ds_slm.evaluate.results import ANSWER_BITS_PER_BYTE, BITS_PER_BYTE, Item, bits_per_byte, mean_stderr, right_answers


@dataclass(frozen=True)
class Difference:
    """One metric of one task, of two models."""

    task: str
    metric: str
    ours: float
    theirs: float
    difference: float
    """Ours minus theirs; accuracies in percent, bits per byte of the right answers."""
    stderr: float | None
    only_ours: int | None = None
    """Items that only our model has right."""
    only_theirs: int | None = None
    probability: float | None = None
    """The probability that equally good models differ by this much or more on these items."""
    items: int = 0


def compare(ours: Mapping[str, Sequence[Item]], theirs: Mapping[str, Sequence[Item]]) -> list[Difference]:
    """The differences in each task that both were scored on.

    Raises:
        DataError: the two models were not asked the same questions.
    """
    both = [name for name in ours if name in theirs]
    problems = [f"{name}: the two were scored on other items." for name in both if not _same(ours[name], theirs[name])]
    if problems or not both:
        raise DataError(problems or "the two have no task in common: score both on the same ones.")
    return [one for name in both for one in _differences(name, ours[name], theirs[name])]


def _same(ours: Sequence[Item], theirs: Sequence[Item]) -> bool:
    asked, other = ([(one.requests, one.gold) for one in items] for items in (ours, theirs))
    return asked == other


def _differences(task: str, ours: Sequence[Item], theirs: Sequence[Item]) -> list[Difference]:
    found = []
    for metric in ours[0].values:
        if metric.startswith("acc") or metric == "exact_match":
            pairs = [(one.values[metric], other.values[metric]) for one, other in zip(ours, theirs, strict=True)]
            found.append(_accuracy(task, metric, pairs))
    if bits := _bits_per_byte(task, ours, theirs):
        found.append(bits)
    return found


def _accuracy(task: str, metric: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    differences = [100 * (one - other) for one, other in pairs]
    only_ours, only_theirs = sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)
    first, second = (100 * fmean(column) for column in zip(*pairs, strict=True))
    chance, stderr = mcnemar(only_ours, only_theirs), mean_stderr(differences)
    return Difference(
        task, metric, first, second, first - second, stderr, only_ours, only_theirs, chance, len(pairs)
    )  # fmt: skip


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """The probability that a fair coin, thrown for each item on which two differ, falls at least this unevenly."""
    thrown, fewer = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(thrown, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**thrown) if thrown < 1000 else min(1.0, _normal_tail(thrown, fewer))


def _normal_tail(thrown: int, fewer: int) -> float:
    return math.erfc((thrown / 2 - fewer - 0.5) / math.sqrt(thrown / 2))


def _bits_per_byte(task: str, ours: Sequence[Item], theirs: Sequence[Item]) -> Difference | None:
    """The difference in bits per byte of whole texts, or of the right answers: a ratio over all items."""
    metric = BITS_PER_BYTE if BITS_PER_BYTE in ours[0].values else ANSWER_BITS_PER_BYTE
    mine, others = (
        [item.values[metric] for item in items] if metric == BITS_PER_BYTE else right_answers(items)
        for items in (ours, theirs)
    )
    if not mine:
        return None

    differences = [(one - other, size) for (one, size), (other, _) in zip(mine, others, strict=True)]
    first, second, difference = map(bits_per_byte, (mine, others, differences))
    return Difference(
        task, metric, first.value, second.value, difference.value, difference.stderr, items=len(mine)
    )  # fmt: skip
