"""A recipe's figure in the existing runs, to stand beside the published one, or why there is none.

    RUNS/*/recipe.toml, done.json, eval.json, env.json, checkpoints/ --ours_of--> one sentence and its parts for --json

A figure counts as ours if the run is finished and its recipe and data are the library's; otherwise it is shown with a
remark on what differs. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.errors import DataError, RecipeError
from ds_slm.files import read_json
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.loading import RECIPE_FILE
from ds_slm.recipe.schema import Recipe, changes_result
from ds_slm.run import scores
from ds_slm.run.scores import LEADERBOARD, leaderboard_average, remarks_on, remarks_on_average

FIGURES = (
    ("val_bits_per_byte", "{:.4g} bits per byte"),
    ("val_card_loss", "card loss {:.4g}"),
    ("val_loss", "validation loss {:.4g}"),
)
"""Figures in done.json, the most comparable first."""
NAMED_CHANGES = 3


@dataclass(frozen=True)
class Ours:
    """A run of a recipe."""

    run: str
    step: int
    steps: int
    figures: dict[str, float]
    """Figures by their names in done.json; empty for a run that is not finished."""
    differs: list[str]
    """Why it is not a run of the library's recipe; empty if it is one."""
    scored: dict[str, str]
    """Benchmarks' figures by TASK/METRIC, each with a remark if it may not be compared with the published one."""
    headline: str | None = None
    """The metric of the recipe's first published figure."""

    @property
    def counts(self) -> bool:
        """Whether the figures are the recipe's."""
        return bool(self.figures) and not self.differs

    def __str__(self) -> str:
        if self.headline in self.scored:
            text = f"{self.headline} {self.scored[self.headline]}"
        elif not self.figures:
            text = f"step {self.step:,} of {self.steps:,}"
        else:
            text = next((form.format(self.figures[key]) for key, form in FIGURES if key in self.figures), "finished")
        return f"{text} ({'; '.join(self.differs)})" if self.differs else text


def ours_of(name: str, recipe: Recipe, runs: Path) -> Ours | None:
    """The run that says most about a recipe: one that counts, else the furthest of the runs with its name."""
    found = [run for folder in _run_folders(runs) if (run := _read(folder, name, recipe))]
    return max(found, key=lambda run: (run.counts, bool(run.figures), -len(run.differs), run.step), default=None)


def _run_folders(runs: Path) -> Iterator[Path]:
    if runs.is_dir():
        yield from sorted(folder.parent for folder in runs.glob(f"*/{RECIPE_FILE}"))


def _read(folder: Path, name: str, recipe: Recipe) -> Ours | None:
    """The run of a folder, if it was launched under this recipe's name or has exactly its content."""
    environment, done = read_json(folder / "env.json") or {}, read_json(folder / "done.json") or {}
    try:
        recorded = loading.load_recorded(folder)
    except RecipeError:  # damaged
        return None

    same = recorded.identity_sha256() == recipe.identity_sha256()
    if not same and environment.get("recipe_name", folder.name) != name:
        return None

    # Why the figures do not count for the library's recipe.
    differs = [] if same else [_differences(recipe, recorded)]
    if done and done.get("recipe_sha256") != recorded.identity_sha256():
        differs.append("done.json is of another recipe")
    if recorded.sft is None and environment.get(checkpoint_files.BASE):
        differs.append("it began with a trained model")
    replaced = environment.get("replaced_sources")
    if replaced and isinstance(replaced, list):
        differs.append(f"other data: {', '.join(map(str, replaced))}")
    elif replaced is None:
        differs.append("its data are not recorded")
    elif done and done.get("data_sha256") != environment.get("data_sha256"):
        differs.append("done.json is of other data")

    figures = {
        key: float(value)
        for key, value in done.items()
        if key.startswith("val_") and isinstance(value, int | float) and not isinstance(value, bool)
    }
    step = done["step"] if isinstance(done.get("step"), int) else max(checkpoint_files.steps(folder), default=0)
    scored = _scored(folder, recorded)
    headline = recipe.targets[0].metric if recipe.targets else None
    return Ours(str(folder), step, recorded.train.steps, figures, differs, scored, headline)


def _scored(folder: Path, recorded: Recipe) -> dict[str, str]:
    """The run's figures from `ds-slm eval`, with a remark if one may not be compared with the published one."""
    try:
        weights = checkpoint_files.model_sha256s(folder)
        found, remarks = scores.newest(folder, weights, recorded.train.steps)
    except DataError:  # eval.json is damaged, or another program's
        return {}
    if not found:
        return {}

    tasks = found["tasks"]
    scored = {
        f"{name}/{metric}": _remarked(figure["value"], [*remarks, *remarks_on(name, task)])
        for name, task in tasks.items()
        for metric, figure in task["figures"].items()
    }
    average = leaderboard_average(tasks)
    if average is not None:
        scored[LEADERBOARD] = _remarked(average, [*remarks, *remarks_on_average(tasks)])
    return scored


def _remarked(value: float, remarks: list[str]) -> str:
    return f"{value:.4g} ({', '.join(remarks)})" if remarks else f"{value:.4g}"


def _differences(recipe: Recipe, recorded: Recipe) -> str:
    changed = [
        f"{place} {_short(was)} -> {_short(now)}"
        for place, (was, now) in resume_rules.changes(recipe, recorded).items()
        if changes_result(place)
    ]
    more = f" and {len(changed) - NAMED_CHANGES} more" if len(changed) > NAMED_CHANGES else ""
    return f"another recipe: {', '.join(changed[:NAMED_CHANGES])}{more}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
