"""What eval.json holds, and the rows of the table: published figures beside ours, and whether they differ.

RUN/eval.json, RUN/eval/step-*/eval.json --of_weights--> what was scored of these weights
eval.json, a recipe's published figures --rows_of--> task, metric, published, ours, +-, chance, items, what
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_slm.errors import DataError
from ds_slm.files import read_json
from ds_slm.recipe.schema import Recipe

EVAL_FILE = "eval.json"

CONFIDENCE = 1.96
"""An interval of this number of standard errors on each side of a figure covers 95 % of its chance variation."""
ARITHMARK, DOCUMENTATION = "arithmark2", "documentation"
"""The tasks that are not the harness's; the second is made of this installation's documentation and not published."""
LEADERBOARD = "leaderboard/average"
LEADERBOARD_METRICS = {
    "hellaswag": "acc_norm", "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "piqa": "acc_norm", ARITHMARK: "acc",
}  # fmt: skip
"""The metric that the Open SLM Leaderboard counts for each of its tasks."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    task: str
    metric: str
    published: float | None
    ours: float | None
    plus_minus: float | None
    """The figure over all such items lies within this, 19 times in 20."""
    chance: float | None
    commonest: float | None
    """The score of always giving the commonest answer."""
    bits_per_byte: float | None
    """What the right answers cost, in bits for each byte of their text."""
    items: int | None
    what: str
    """Whether ours differs from the published figure, and remarks on why the two may not be compared."""


def rows_of(found: Mapping[str, Any], recipe: Recipe | None) -> list[Row]:
    """The table of what eval.json holds, in its order.

    Args:
        found: eval.json.
        recipe: the recipe whose published figures of finished models stand beside ours.
    """
    published = {
        target.metric: target.published
        for target in (recipe.targets if recipe else [])
        if target.step is None or target.step == recipe.train.steps  # pyright: ignore[reportOptionalMemberAccess]
    }
    tasks, step = found["tasks"], found["model"].get("step")
    at_step = [f"at step {step:,}"] if recipe and published and step is not None and step != recipe.train.steps else []
    rows = [row for name, task in tasks.items() for row in _rows_of_task(name, task, published, at_step)]

    average = leaderboard_average(tasks)
    if average is not None:
        target = published.get(LEADERBOARD)
        difference = [] if target is None else [f"differs by {average - target:+.2f}"]
        what = ", ".join([*difference, *remarks_on_average(tasks), *at_step])
        rows.append(Row("leaderboard", "average", target, average, None, None, None, None, None, what))
    return rows


def is_record(found: Mapping[str, Any]) -> bool:
    """Whether this is the record that `ds-slm eval` writes."""
    model, tasks = found.get("model"), found.get("tasks")
    if not isinstance(model, Mapping) or not isinstance(tasks, Mapping):
        return False
    if not isinstance(model.get("step"), int | None):
        return False
    needed = {"items", "limited", "published", "figures"}
    return all(
        isinstance(task, Mapping) and needed <= task.keys() and _are_figures(task["figures"]) for task in tasks.values()
    )


def _are_figures(figures: Any) -> bool:
    needed = {"value", "stderr", "chance", "commonest"}
    return isinstance(figures, Mapping) and all(
        isinstance(one, Mapping) and needed <= one.keys() and isinstance(one["value"], int | float)
        for one in figures.values()
    )


def read(folder: Path) -> dict[str, Any]:
    """The earlier evaluations in eval.json; empty if there is none. Raises DataError if it is damaged."""
    path = folder / EVAL_FILE
    if not path.exists():
        return {}
    found = read_json(path)
    if found is None or not is_record(found):
        raise DataError(f"{path} is damaged, or not of `ds-slm eval`: move it away, and score the model again.")
    return found


def of_weights(run: Path, sha256: str) -> dict[str, Any]:
    """The scores of a checkpoint, whether the run or the checkpoint was named; empty if there are none.

    Args:
        run: the run folder.
        sha256: hash of the checkpoint's weights. Figures of other weights are left out.

    Raises:
        DataError: an eval.json is damaged.
    """
    folders = [run, *sorted(path.parent for path in run.glob(f"eval/*/{EVAL_FILE}"))]
    records = [found for folder in folders if (found := read(folder)) and found["model"].get("sha256") == sha256]
    merged: dict[str, Any] = {}
    for found in records:
        merged = {**found, "tasks": merge_tasks(merged.get("tasks", {}), found["tasks"])}
    return merged


def newest(run: Path, weights: Sequence[str], last_step: int) -> tuple[dict[str, Any], list[str]]:
    """The figures of the newest checkpoint that was scored, and remarks on why they are not the finished run's.

    A run folder that was trained anew still holds the figures of its former weights: they are not figures of the run.

    Args:
        run: the run folder.
        weights: hashes of its checkpoints' weights, the newest first (`checkpoint.files.model_sha256s`). If there are
            none, nothing can be compared, and a remark says so.
        last_step: the last step of the whole run.

    Raises:
        DataError: for a damaged eval.json.
    """
    if weights:
        found = next((found for sha256 in weights if (found := of_weights(run, sha256))), {})
    else:
        found = read(run)

    step = found["model"].get("step") if found else None
    remarks = [] if weights else ["weights unchecked"]
    return found, remarks if step in (None, last_step) else [f"at step {step:,}", *remarks]


def merge_tasks(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of two evaluations of the same weights, the new ones over the earlier ones.

    A task that was scored whole stays: a later trial with a limit does not replace it.
    """
    whole = {name for name, task in before.items() if not task["limited"]}
    return {**before, **{name: task for name, task in new.items() if not (task["limited"] and name in whole)}}


def leaderboard_average(tasks: Mapping[str, Any]) -> float | None:
    """(HellaSwag + (ARC-Easy + ARC-Challenge) / 2 + PIQA + ArithMark) / 4, if all were scored whole.

    Args:
        tasks: the tasks of eval.json.
    """
    if any(name not in tasks or tasks[name]["limited"] for name in LEADERBOARD_METRICS):
        return None
    values = {name: tasks[name]["figures"][metric]["value"] for name, metric in LEADERBOARD_METRICS.items()}
    arc = (values["arc_easy"] + values["arc_challenge"]) / 2
    return (values["hellaswag"] + arc + values["piqa"] + values[ARITHMARK]) / 4


def remarks_on_average(tasks: Mapping[str, Any]) -> list[str]:
    """Why the average may not be compared with the published one: rows of a part are different, or unknown."""
    published = [tasks[name]["published"] for name in LEADERBOARD_METRICS]
    return ["other rows"] if False in published else ["rows unchecked"] if None in published else []


def remarks_on(name: str, task: Mapping[str, Any]) -> list[str]:
    """Why a figure may not be compared with the published one."""
    if task["limited"]:
        return [f"first {task['items']:,}"]
    if task["published"] is False:
        return ["other rows"]
    return ["rows unchecked"] if task["published"] is None and name != DOCUMENTATION else []


def _rows_of_task(
    name: str, task: Mapping[str, Any], published: Mapping[str, float], at_step: list[str]
) -> Iterator[Row]:
    figures = task["figures"]
    answer = figures.get("answer_bits_per_byte")
    for metric, figure in figures.items():
        target = published.get(f"{name}/{metric}")
        if metric == "answer_bits_per_byte" or (target is None and _is_minor(metric, figures)):
            continue

        stderr, remarks = figure["stderr"], remarks_on(name, task)
        plus_minus = None if stderr is None else CONFIDENCE * stderr
        comparable = target is not None and remarks in ([], ["rows unchecked"])
        verdict = [_verdict(figure["value"] - target, plus_minus)] if comparable and target is not None else []
        yield Row(
            name, metric, target, figure["value"], plus_minus, figure["chance"], figure["commonest"],
            answer["value"] if answer and metric.startswith("acc") else None, task["items"],
            ", ".join([*verdict, *remarks, *at_step]),
        )  # fmt: skip


def _is_minor(metric: str, figures: Mapping[str, Any]) -> bool:
    """Whether a metric is secondary: acc beside acc_norm, or ArithMark's other way of scoring."""
    return (metric == "acc" and "acc_norm" in figures) or metric == "acc_joint_mean"


def _verdict(difference: float, plus_minus: float | None) -> str:
    within = plus_minus is not None and abs(difference) <= plus_minus
    return "within ±" if within else f"differs by {difference:+.2f}"
