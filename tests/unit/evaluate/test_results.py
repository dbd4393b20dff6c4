"""From items to figures: standard errors, chance, bits per byte, hashes."""

import math
import random

import numpy as np
import pytest
from lm_eval.api.metrics import mean_stderr

from ds_slm.evaluate.results import (
    PUBLISHED,
    Figure,
    Item,
    Question,
    content_sha256,
    figures,
    is_published,
)

DRAWS = 4000


def items_of(metric: str, values: list) -> list[Item]:
    """Items of one metric; nothing else of them counts."""
    return [Item((("a text",),), "", None, (0.0,), {metric: value}) for value in values]


def bootstrap(values: np.ndarray, statistic) -> float:
    """The standard deviation of a statistic over resampled items; a seeded generator."""
    rng = np.random.default_rng(3)
    return float(np.std([statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(DRAWS)]))


def test_accuracy_in_percent_and_its_error() -> None:
    """Oracle: the harness's own closed form, and a seeded numpy bootstrap."""
    rng = random.Random(1)
    values = [float(rng.random() < 0.3) for _ in range(300)]
    figure = figures(items_of("acc_norm", values))["acc_norm"]
    assert figure.value == pytest.approx(100 * np.mean(values))
    assert figure.stderr == pytest.approx(100 * mean_stderr(values))
    assert figure.stderr == pytest.approx(100 * bootstrap(np.array(values), np.mean), rel=0.05)


def test_perplexity_and_its_error() -> None:
    """Oracle: exp of the mean, and a seeded bootstrap of it, which the delta method comes near."""
    values = (-np.random.default_rng(2).gamma(2.0, 1.0, size=400)).tolist()
    figure = figures(items_of("perplexity", values))["perplexity"]
    assert figure.value == pytest.approx(math.exp(-np.mean(values)))
    assert figure.stderr == pytest.approx(bootstrap(np.array(values), lambda one: np.exp(-one.mean())), rel=0.06)


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_ratios_over_pages_and_their_error(metric: str) -> None:
    """Oracle: the ratio of the sums, and a seeded bootstrap over the pages, which are of many sizes."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(100, 4000, size=62)
    log_probabilities = -sizes * rng.normal(0.9, 0.1, size=62)
    pairs = np.stack([log_probabilities, sizes], 1)

    def value(one: np.ndarray) -> float:
        ratio = one[:, 0].sum() / one[:, 1].sum()
        return -ratio / math.log(2) if metric == "bits_per_byte" else math.exp(-ratio)

    figure = figures(items_of(metric, [(float(a), int(b)) for a, b in pairs]))[metric]
    assert figure.value == pytest.approx(value(pairs))
    assert figure.stderr == pytest.approx(bootstrap(pairs, value), rel=0.06)


def test_ratio_errors_weigh_pages_by_their_size() -> None:
    """Oracle: by hand: R = -8 / 6; residuals -2 + 8/3, -6 + 16/3; sqrt(2 (4/9 + 4/9)) / 6."""
    figure = figures(items_of("bits_per_byte", [(-2.0, 2), (-6.0, 4)]))["bits_per_byte"]
    assert figure.value == pytest.approx(8 / 6 / math.log(2))
    assert figure.stderr == pytest.approx(math.sqrt(2 * 8 / 9) / 6 / math.log(2))


def test_one_item_has_no_error() -> None:
    """Oracle: a standard deviation needs two."""
    for metric, value in (("acc", 1.0), ("perplexity", -2.0), ("bits_per_byte", (-3.0, 4)), ("f1", 0.5)):
        assert figures(items_of(metric, [value]))[metric].stderr is None


def test_a_perplexity_beyond_floats_is_the_largest() -> None:
    """Oracle: exp(800) is larger than any float, and JSON has no infinity."""
    value = figures(items_of("perplexity", [-800.0, -800.0]))["perplexity"].value
    assert 8e307 < value < math.inf


def test_a_metric_that_is_not_ours_is_the_harness_s() -> None:
    """Oracle: the rule that is handed in; pairs are not taken for a ratio."""
    figure = figures(items_of("f1", [(0, 1), (1, 1), (1, 1)]), lambda metric, pairs: len(pairs) + len(metric))["f1"]
    assert figure == Figure(5, None)


def test_other_metrics_are_means() -> None:
    """Oracle: numpy's mean; nothing turns them into percent."""
    assert figures(items_of("brier_score", [0.25, 0.75]))["brier_score"] == Figure(0.5, 0.25)


def choice(right: int, count: int, answer: str = " red", log_probability: float = -1.0) -> Item:
    """An item of some choices, answered right."""
    requests = tuple(("which?", answer if number == right else " other") for number in range(count))
    scores = tuple(log_probability if number == right else -9.0 for number in range(count))
    return Item(requests, right, right, scores, {"acc": 1.0})


def test_the_commonest_answer() -> None:
    """Oracle: BoolQ's validation set: 2,033 of 3,270 answers are yes, the other 37.83 % no; chance is half."""
    asked = (("is it?", " no"), ("is it?", " yes"))
    yes, no = (Item(asked, right, right, (-1.0, -2.0), {"acc": 1.0}) for right in (1, 0))
    items = [yes] * 2033 + [no] * 1237
    figure = figures(items)["acc"]
    assert figure.chance == 50
    assert figure.commonest == pytest.approx(62.17, abs=0.005)
    assert 100 - (figure.commonest or 0) == pytest.approx(37.83, abs=0.005)


def test_chance_of_items_of_three_four_and_five_choices() -> None:
    """Oracle: the mean of 1/3, 1/4, 1/4 and 1/5. Their answers are not the same ones, so none is the commonest."""
    found = figures([choice(0, 3), choice(1, 4), choice(1, 4), choice(4, 5)])["acc"]
    assert found.chance == pytest.approx(100 * (1 / 3 + 1 / 4 + 1 / 4 + 1 / 5) / 4)
    assert found.commonest is None


def test_a_single_continuation_has_no_chance() -> None:
    """Oracle: lambada's items: nothing is chosen."""
    item = Item((("The sky is", " blue"),), " blue", 0, (-1.0,), {"acc": 1.0})
    found = figures([item, item])["acc"]
    assert (found.chance, found.commonest) == (None, None)


def test_bits_per_byte_of_the_answers() -> None:
    """Oracle: by hand: 3 and 5 nats over `red` and `Łódź`, 3 and 7 bytes, without the space before them."""
    items = [choice(0, 2, " red", -3.0), choice(1, 2, " Łódź", -5.0)]
    found = figures(items)["answer_bits_per_byte"]
    assert found.value == pytest.approx(8 / 10 / math.log(2))
    residuals = (-3 + 0.8 * 3) ** 2 + (-5 + 0.8 * 7) ** 2
    assert found.stderr == pytest.approx(math.sqrt(2 * residuals) / 10 / math.log(2))


def test_no_bits_per_byte_where_an_item_has_no_right_answer_or_text() -> None:
    """Oracle: whole texts have no answer, an empty one no bytes."""
    assert "answer_bits_per_byte" not in figures(items_of("acc", [1.0, 0.0]))
    assert "answer_bits_per_byte" not in figures([choice(0, 2, " "), choice(0, 2)])


def test_the_hash_does_not_depend_on_the_order_of_items_but_on_every_letter() -> None:
    """Oracle: the sha256 of the sorted lines, by hashlib; backwards; one letter, gold or choice changed."""
    import hashlib

    asked = [Question((("Why?", " yes"), ("Why?", " nó")), 1), Question((("a", " b"),), "c")]
    lines = ['[[["Why?", " yes"], ["Why?", " nó"]], 1]', '[[["a", " b"]], "c"]']
    assert content_sha256(asked) == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert content_sha256(asked[::-1]) == content_sha256(asked)
    others = [
        [Question((("Why!", " yes"), ("Why?", " nó")), 1), asked[1]],
        [Question(asked[0].requests, 0), asked[1]],
        [Question(asked[0].requests[::-1], 1), asked[1]],
        asked[:1],
        [*asked, asked[0]],
    ]
    assert len({content_sha256(one) for one in [asked, *others]}) == 6


def test_published_needs_the_very_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the table: unknown tasks give None, other items False, those of the hash True."""
    asked = [Question((("a", " b"),), "c")]
    assert is_published("boolq", asked) is None
    assert is_published("piqa", asked) is False
    monkeypatch.setitem(PUBLISHED, "piqa", (1, content_sha256(asked)))
    assert is_published("piqa", asked) is True
