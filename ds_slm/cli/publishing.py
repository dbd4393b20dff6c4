"""`ds-slm export`: a run's checkpoint as a Hugging Face folder, with the model card that its run tells."""

from dataclasses import dataclass
from pathlib import Path

from ds_slm.cli.output import print_json
from ds_slm.errors import ConfigError
from ds_slm.evaluate.benchmarks import BENCHMARKS
from ds_slm.publish import card
from ds_slm.publish.export import export_run
from ds_slm.publish.header import HubDataset
from ds_slm.recipe import schema
from ds_slm.recipe.schema import Recipe


@dataclass(frozen=True)
class Flags:
    """Those of `ds-slm export`, but for the run."""

    out: Path
    step: int | None
    best: bool
    overrides: list[str]
    as_json: bool


def run(run_folder: Path, flags: Flags) -> None:
    """Export a run. Raises UserError with all that is in the way, before anything is written."""
    problems = ["--step and --best name two checkpoints: choose one."] if flags.step is not None and flags.best else []
    problems += [
        f"--set {one}: only what the model card says can be changed here: card.license, card.language, card.base_model."
        for one in flags.overrides
        if not one.startswith("card.")
    ]
    if problems:
        raise ConfigError(problems)

    def describe(checkpoint: Path) -> dict[str, bytes]:
        recipe = _with(schema.load_recorded(run_folder), flags.overrides)
        page = card.Page(recipe.card.name, flags.out.resolve().name, datasets=_hub_datasets())
        return card.describe(run_folder, checkpoint, recipe, page)

    exported = export_run(run_folder, flags.out, step=flags.step, best=flags.best, describe=describe)
    if flags.as_json:
        print_json(exported)
    else:
        print("{folder}: {params:,} parameters of {checkpoint}, {dtype}".format(**exported))


def _with(recorded: Recipe, overrides: list[str]) -> Recipe:
    """A recorded recipe whose card says more. Raises RecipeError with every problem."""
    return schema.parse(schema.to_toml(recorded), overrides, origin="--set", recorded=True) if overrides else recorded


def _hub_datasets() -> dict[str, HubDataset]:
    return {name: HubDataset(*one.hub, one.split) for name, one in BENCHMARKS.items()}
