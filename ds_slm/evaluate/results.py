"""From items to figures: each metric with its standard error, chance, and the score of always choosing the same.

    items of a task --figures--> {metric: Figure} --> eval.json, the table        questions --content_sha256--> a hash

Standard errors are closed forms, from the items alone:

    a mean of values x_i                        s(x) / sqrt(n)
    exp(-mean of log-probabilities l_i)         the value times s(l) / sqrt(n)                      (delta method)
    a ratio R = sum l_i / sum w_i, and exp(-R)  sqrt(n / (n - 1) sum (l_i - R w_i)^2) / sum w_i     (over the pages)

s is the standard deviation with n - 1. The harness draws 100,000 bootstrap samples for the second, and has none for the
third.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

PUBLISHED = {
    "hellaswag": (10_042, "56529d0cbf3d7beb0b19e2f6c724d26eb0e83529fe61fd40070bfed2db489ea0"),
    "piqa": (1_838, "3fb22e87c1891744ab30ab208425bb5f4139713bc8dd2516e3cec27822f9056d"),
    "winogrande": (1_267, "02b0e8af05b1745f2c3e5171f43c7b22eb668dd28a993f20e8aa186556ca3624"),
    "lambada_openai": (5_153, "3508f2985e14b4da48772497e3d747a9157cdb25a8414c7e193dbc3704e85b83"),
    "arc_easy": (2_376, "532afdc7a879aa20b593d51a336fe41e6deab589374d522b39f289e751abea3d"),
    "arc_challenge": (1_172, "123ef06e6f9c5d77225deb2049da87847d27d63ecbbf4ede78f4c875732448e3"),
}
"""Number of items in the sets that the harness scores, and their content's hash."""
BITS_PER_BYTE, ANSWER_BITS_PER_BYTE = "bits_per_byte", "answer_bits_per_byte"
"""For whole texts: a metric of the harness. For the right answers: our metric."""
RATIO_PERPLEXITIES = ("word_perplexity", "byte_perplexity")
"""Metrics to which, as to bits per byte, an item adds a log-probability and a divisor."""


class Question(NamedTuple):
    """The question of one item, and the right answer."""

    requests: tuple[tuple[str, ...], ...]
    """Context and continuation of each choice; only a text if a whole text is scored."""
    gold: Any


class Item(NamedTuple):
    """One item, answered."""

    requests: tuple[tuple[str, ...], ...]
    gold: Any
    right: int | None
    """The number of the right request; None if no request is the right one."""
    log_probabilities: tuple[float, ...]
    """The log-probability of each request, in nats."""
    values: dict[str, Any]
    """The item's contribution to each metric."""


@dataclass(frozen=True)
class Figure:
    """One metric of one task."""

    value: float
    """Accuracies in percent."""
    stderr: float | None
    """Its standard error; None for a single item, or for a metric that is not known here."""
    chance: float | None = None
    """The score of guessing: the mean of one over the number of choices, in percent."""
    commonest: float | None = None
    """The score of always giving the commonest answer, in percent."""


def content_sha256(questions: Sequence[Question]) -> str:
    """One hash of the questions, whatever file they came from: the hash of their sorted JSON lines."""
    lines = sorted(
        json.dumps([[list(pair) for pair in one.requests], one.gold], ensure_ascii=False) for one in questions
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_published(task: str, questions: Sequence[Question]) -> bool | None:
    """Whether these are the published items; None if their hash is not known."""
    if task not in PUBLISHED:
        return None
    return (len(questions), content_sha256(questions)) == PUBLISHED[task]


def figures(items: Sequence[Item], aggregate: Callable[[str, Sequence[Any]], float] | None = None) -> dict[str, Figure]:
    """Every metric of a task.

    Args:
        items: the task's answered items.
        aggregate: the task's own rule: a metric's value from its name and all items' values; None takes the mean.
    """
    chance, commonest = _chance(items), _commonest(items)
    found = {}
    for name in items[0].values:
        values = [item.values[name] for item in items]
        if name == "perplexity":
            perplexity = _exp(-fmean(values))
            found[name] = Figure(perplexity, _scaled(perplexity, mean_stderr(values)))
        elif name == BITS_PER_BYTE:
            found[name] = bits_per_byte(values)
        elif name in RATIO_PERPLEXITIES:
            ratio, stderr = _ratio(values)
            found[name] = Figure(_exp(-ratio), _scaled(_exp(-ratio), stderr))
        else:
            value = aggregate(name, values) if aggregate else fmean(values)
            found[name] = _mean_or_other(name, values, value, chance, commonest)

    if answers := right_answers(items):
        found[ANSWER_BITS_PER_BYTE] = bits_per_byte(answers)
    return found


def _mean_or_other(
    name: str, values: Sequence[Any], value: float, chance: float | None, commonest: float | None
) -> Figure:
    """A metric by the task's own rule; if that is the mean, with its error; accuracies in percent."""
    numbers = all(isinstance(one, int | float) for one in values)
    if not numbers or not math.isclose(value, fmean(values), rel_tol=1e-9, abs_tol=1e-12):
        return Figure(value, None)
    if name.startswith("acc") or name == "exact_match":
        return Figure(100 * value, _scaled(100, mean_stderr(values)), chance, commonest)
    return Figure(value, mean_stderr(values))


def mean_stderr(values: Sequence[float]) -> float | None:
    """The standard error of the mean of some values; None for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def bits_per_byte(pairs: Sequence[tuple[float, float]]) -> Figure:
    """Bits per byte from log-probabilities in nats, each with its text's bytes, or from their differences."""
    ratio, stderr = _ratio(pairs)
    return Figure(-ratio / math.log(2), _scaled(1 / math.log(2), stderr))


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """The sum of the first values over the sum of the second, and its standard error; None for a single pair."""
    total, n = sum(weight for _, weight in pairs), len(pairs)
    ratio = sum(value for value, _ in pairs) / total
    if n < 2:
        return ratio, None
    squares = sum((value - ratio * weight) ** 2 for value, weight in pairs)
    return ratio, math.sqrt(n / (n - 1) * squares) / total


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, 709.0))  # the largest that a float holds: JSON has no infinity


def _scaled(factor: float, stderr: float | None) -> float | None:
    return None if stderr is None else factor * stderr


def _chance(items: Sequence[Item]) -> float | None:
    if any(len(item.requests) < 2 for item in items):
        return None
    return 100 * fmean(1 / len(item.requests) for item in items)


def _commonest(items: Sequence[Item]) -> float | None:
    """The score of always giving the commonest answer; None unless all items offer the same answers, as yes and no."""
    if any(len(item.requests) < 2 or item.right is None for item in items):
        return None
    if len({tuple(one[-1] for one in item.requests) for item in items}) > 1:
        return None
    return 100 * Counter(item.right for item in items).most_common(1)[0][1] / len(items)


def right_answers(items: Sequence[Item]) -> list[tuple[float, int]]:
    """The log-probability and the bytes of each right answer, without the space before it.

    Empty if an item has no right answer, or if an answer is a whole text or only a space.
    """
    pairs = []
    for item in items:
        if item.right is None or len(item.requests[item.right]) < 2:
            return []
        answer = item.requests[item.right][1].removeprefix(" ")
        pairs.append((item.log_probabilities[item.right], len(answer.encode())))
    return pairs if all(size for _, size in pairs) else []
