"""`ds-slm export`: a run's checkpoint as a Hugging Face folder, with a model card from its run.

flags, card --the hub's check, if asked for--> folder --upload, if asked for--> the hub
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ds_slm.checkpoint.files import BASE, read_state
from ds_slm.cli.output import print_json
from ds_slm.errors import ConfigError, DataError
from ds_slm.evaluate.benchmarks import BENCHMARKS
from ds_slm.model.kernels import DTYPES
from ds_slm.publish import hub, importing
from ds_slm.publish.card.header import HubDataset
from ds_slm.publish.card.page import README, Page
from ds_slm.publish.card.page import describe as describe_card
from ds_slm.publish.export import WeightFormat, export_run, name_of, name_of_gguf
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe


@dataclass(frozen=True)
class Flags:
    """The flags of `ds-slm export`, except the run."""

    out: Path
    step: int | None
    best: bool
    overrides: list[str]
    weights: WeightFormat
    validate: bool
    push: str | None
    """The id of the repository to upload to; None uploads nothing."""
    as_json: bool


def run(run_folder: Path, flags: Flags) -> None:
    """Export a run. Raises UserError with every problem, before anything is written.

    If the upload fails, HubError is raised: by then the folder exists, and it stays.
    """
    problems = ["--step and --best name two checkpoints: choose one."] if flags.step is not None and flags.best else []
    problems += [
        f"--set {one}: only what the model card says can be changed here, as in card.license=mit."
        for one in flags.overrides
        if not one.startswith("card.")
    ]
    if flags.weights.dtype not in DTYPES:
        problems.append(f"--dtype {flags.weights.dtype}: expected one of {', '.join(DTYPES)}.")
    if flags.push is not None and (wrong := hub.problem_of_id(flags.push)):
        problems.append(f"--push {wrong}")
    if problems:
        raise ConfigError(problems)

    def describe(checkpoint: Path) -> dict[str, bytes]:
        state = read_state(checkpoint)
        if importing.is_imported(state):
            if flags.overrides:
                raise ConfigError(
                    "--set card.KEY: an imported model that nobody trained here keeps its own model card."
                )
            return _validated(importing.describe_imported(run_folder, state), flags)

        recipe = _with(loading.load_recorded(run_folder), flags.overrides)
        if recipe.card.license is None:
            print("note: the model card states no licence: --set card.license=apache-2.0 would", file=sys.stderr)
        elif (recipe.sft is not None or state.get(BASE)) and not flags.overrides:
            print(
                f"note: licence {recipe.card.license}, language {', '.join(recipe.card.language)}: the recipe's; if "
                "the base has others: --set card.license=... and --set 'card.language=[...]'",
                file=sys.stderr,
            )
        title, name = recipe.card.name, flags.out.resolve().name
        if flags.push is not None:
            title, name = flags.push.rpartition("/")[2], flags.push
        weights = flags.weights
        gguf = name_of_gguf(flags.out, weights.gguf) if weights.gguf else None
        page = Page(title, name, name_of(DTYPES[weights.dtype]), datasets=_hub_datasets(), gguf=gguf)
        return _validated(describe_card(run_folder, checkpoint, recipe, page), flags)

    exported = export_run(
        run_folder, flags.out, step=flags.step, best=flags.best, describe=describe, weights=flags.weights
    )
    if not flags.as_json:
        print("{folder}: {params:,} parameters of {checkpoint}, {dtype}".format(**exported))
        if flags.weights.gguf:
            print("{file}: {stored}".format(**exported["gguf"]))
    if flags.push is not None:
        exported["pushed"] = hub.push(flags.out, flags.push)
    if flags.as_json:
        print_json(exported)
    elif flags.push is not None:
        print("{pushed}: uploaded; a new repository is private until its settings say otherwise".format(**exported))


def _validated(described: dict[str, bytes], flags: Flags) -> dict[str, bytes]:
    """The same files, after the hub has checked the card among them, if that is asked for."""
    if flags.validate or flags.push is not None:
        try:
            card = described[README].decode()
        except UnicodeDecodeError as error:
            raise DataError(f"the model card, {README}, is not UTF-8 ({error}): the hub takes no other.") from error
        hub.validate(card)
    return described


def _with(recorded: Recipe, overrides: list[str]) -> Recipe:
    """A recorded recipe with additions to its card. Raises RecipeError with every problem."""
    return loading.parse(loading.to_toml(recorded), overrides, origin="--set", recorded=True) if overrides else recorded


def _hub_datasets() -> dict[str, HubDataset]:
    return {name: HubDataset(*one.hub, one.split) for name, one in BENCHMARKS.items()}
