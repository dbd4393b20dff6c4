"""Two models on the same items."""

import math
import random
from statistics import fmean, stdev

import pytest

from ds_slm.errors import DataError
from ds_slm.evaluate.comparison import compare, mcnemar
from ds_slm.evaluate.results import Item


def items(answers: list[float], log_probabilities: list[float]) -> list[Item]:
    """Items of two choices, the first of them right, whose answer has nine bytes behind its space."""
    asked = (("Question:", " an answer"), ("Question:", " another"))
    return [
        Item((("Question:" + str(index), asked[0][1]), asked[1]), 0, 0, (log_probability, -9.0), {"acc": right})
        for index, (right, log_probability) in enumerate(zip(answers, log_probabilities, strict=True))
    ]


def test_a_difference_counts_only_what_the_two_answer_differently() -> None:
    """Oracle: by hand. 3 items that ours alone has right, 1 that theirs alone has; a coin falls so unevenly or more
    with probability 2 (1 + 4) / 16.
    """
    ours, theirs = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    accuracy, bits = compare({"t": items(ours, [-2.0] * 6)}, {"t": items(theirs, [-3.0] * 6)})
    assert (accuracy.only_ours, accuracy.only_theirs, accuracy.probability) == (3, 1, 10 / 16)
    assert accuracy.difference == pytest.approx(100 * (fmean(ours) - fmean(theirs)))
    assert accuracy.stderr == pytest.approx(
        100 * stdev(one - other for one, other in zip(ours, theirs, strict=True)) / 6**0.5
    )
    assert bits.difference == pytest.approx(-1.0 / math.log(2) / 9) and bits.stderr == pytest.approx(0.0, abs=1e-12)


def test_paired_errors_are_smaller_than_separate_ones() -> None:
    """Oracle: the standard deviation of the difference over 2,000 draws of the same 200 items, seeded."""
    rng = random.Random(3)
    hard = [rng.gauss(-5.0, 3.0) for _ in range(200)]
    ours, theirs = [one + rng.gauss(0.3, 0.5) for one in hard], [one + rng.gauss(0.0, 0.5) for one in hard]
    *_, bits = compare({"t": items([1.0] * 200, ours)}, {"t": items([1.0] * 200, theirs)})

    draws = []
    for _ in range(2000):
        drawn = [rng.randrange(200) for _ in range(200)]
        draws.append(fmean(theirs[index] - ours[index] for index in drawn) / math.log(2) / 9)
    assert bits.stderr == pytest.approx(stdev(draws), rel=0.1)
    alone = stdev(ours) / math.sqrt(200) / math.log(2) / 9
    assert bits.stderr < alone / 3


@pytest.mark.parametrize(("ours", "theirs", "probability"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (1, 0, 1.0)])
def test_mcnemar_is_a_fair_coin(ours: int, theirs: int, probability: float) -> None:
    """Oracle: the binomial distribution, by hand."""
    assert mcnemar(ours, theirs) == pytest.approx(probability)


def test_mcnemar_of_many_is_the_normal_distribution() -> None:
    """Oracle: the exact sum, which the approximation meets within 1 % at 1,000 items."""
    exact = 2 * sum(math.comb(1000, count) for count in range(471)) / 2**1000
    assert mcnemar(530, 470) == pytest.approx(exact, rel=0.01)


def test_other_items_are_refused() -> None:
    """Oracle: the sentence; an item less, and no task in common."""
    whole = items([1.0, 0.0], [-1.0, -2.0])
    with pytest.raises(DataError, match="scored on other items"):
        compare({"t": whole}, {"t": whole[:1]})
    with pytest.raises(DataError, match="no task in common"):
        compare({"t": whole}, {"u": whole})
