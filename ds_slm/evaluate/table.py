"""The rows of the table: published beside ours, with what tells whether they differ.

eval.json, a recipe's published figures --rows_of--> task, metric, published, ours, +-, chance, items, what
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_slm.recipe.schema import Recipe

CONFIDENCE = 1.96
"""Standard errors on each side of a figure that hold 95 % of what chance does to it."""
LEADERBOARD = "leaderboard/average"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    task: str
    metric: str
    published: float | None
    ours: float | None
    plus_minus: float | None
    """95 % of what another draw of as many items would give lies within this."""
    chance: float | None
    commonest: float | None
    """What always giving the commonest answer scores."""
    bits_per_byte: float | None
    """Of the right answers."""
    items: int | None
    what: str
    """`within +-`, `differs by x`, `other rows`, `first N`, or nothing where nothing is published."""


def rows_of(found: Mapping[str, Any], recipe: Recipe | None) -> list[Row]:
    """The table of what eval.json holds, in its order.

    Args:
        found: eval.json.
        recipe: whose published figures stand beside ours; those of finished models alone.
    """
    published = {
        target.metric: target.published
        for target in (recipe.targets if recipe else [])
        if target.step is None or target.step == recipe.train.steps  # pyright: ignore[reportOptionalMemberAccess]
    }
    rows = [row for name, task in found["tasks"].items() for row in _rows_of_task(name, task, published)]
    average = found.get("leaderboard")
    if average is not None:
        target = published.get(LEADERBOARD)
        what = "" if target is None else f"differs by {average - target:+.2f}"
        rows.append(Row("leaderboard", "average", target, average, None, None, None, None, None, what))
    return rows


def _rows_of_task(name: str, task: Mapping[str, Any], published: Mapping[str, float]) -> Iterator[Row]:
    figures = task["figures"]
    answer = figures.get("answer_bits_per_byte")
    for metric, figure in figures.items():
        target = published.get(f"{name}/{metric}")
        if metric == "answer_bits_per_byte" or (target is None and _is_minor(metric, figures)):
            continue
        stderr = figure["stderr"]
        plus_minus = None if stderr is None else CONFIDENCE * stderr
        yield Row(
            name, metric, target, figure["value"], plus_minus, figure["chance"], figure["commonest"],
            answer["value"] if answer and metric.startswith("acc") else None, task["items"],
            _what(task, target, figure["value"], plus_minus),
        )  # fmt: skip


def _is_minor(metric: str, figures: Mapping[str, Any]) -> bool:
    """acc where acc_norm stands beside it; ArithMark's other way of scoring."""
    return (metric == "acc" and "acc_norm" in figures) or metric == "acc_joint_mean"


def _what(task: Mapping[str, Any], target: float | None, ours: float, plus_minus: float | None) -> str:
    """Why ours is not to be held against the published figure, or how far it is away."""
    if task["limited"]:
        return f"first {task['items']:,}"
    if task["published"] is False:
        return "other rows"
    if target is None:
        return ""
    difference = ours - target
    verdict = (
        "within ±" if plus_minus is not None and abs(difference) <= plus_minus else f"differs by {difference:+.2f}"
    )
    return verdict if task["published"] else f"{verdict}, rows unchecked"
