"""Mistakes of a training command that this machine finds before DeepSpeed starts a process for each device.

The programs check the same again: they may be started without `ds-slm`, and on hosts that have other files.
"""

import argparse
from pathlib import Path

from ds_slm.cli.flags import parse_sources
from ds_slm.cluster.launch import own_cores
from ds_slm.errors import CheckpointError, ConfigError, RecipeError, UserError, attempt
from ds_slm.recipe import ds_config, loading
from ds_slm.recipe.schema import Recipe

MOST_RANKS_PER_CORE = 4
"""More ranks than this on a CPU must be a mistake: each of them loads Python and torch first."""


def refuse_recipe(args: argparse.Namespace, recipe: Recipe, world_size: int, fine_tunes: bool) -> None:
    """Raise UserError if the verb does not train this recipe, or the ds_config does not fit it.

    Args:
        args: the command line.
        recipe: the recipe that it names.
        world_size: devices over all hosts.
        fine_tunes: whether the verb fine-tunes.
    """
    problems: list[str] = []
    attempt(problems, lambda: _refuse_other_verb(args.recipe_name, recipe, fine_tunes))
    rows = args.micro_batch if isinstance(args.micro_batch, int) else None
    attempt(problems, lambda: ds_config.join(recipe, ds_config.read(args.ds_config), world_size, "cuda", rows))
    if problems:
        raise UserError(problems)


def refuse_files(args: argparse.Namespace, recipe: Recipe, run_folder: Path) -> None:
    """Raise UserError if this machine's files are not suitable: the run folder, the base, or the named sources.

    Reads only names, neither weights nor text.
    """
    from ds_slm.data.shards.prepare import refuse_wrong_sources
    from ds_slm.run import folder

    problems: list[str] = []
    data = args.data_root / loading.recipe_path(args.recipe_name).stem
    attempt(problems, lambda: refuse_wrong_sources(recipe, data, parse_sources(args.source)))
    if args.base is not None:
        from ds_slm.publish.models import refuse_no_model

        attempt(problems, lambda: refuse_no_model(args.base))
        attempt(problems, lambda: folder.refuse_own_base(run_folder, args.base))

    before = len(problems)
    attempt(problems, lambda: folder.refuse_foreign(run_folder, recipe, args.resume, args.allow_change))
    if len(problems) == before:
        attempt(problems, lambda: folder.refuse_unusable(run_folder), f"--run-dir {run_folder}")
        attempt(problems, lambda: _refuse_nothing_to_resume(args.resume, run_folder))
    if problems:
        raise UserError(problems)


def refuse_devices(devices: int, cuda_devices: int) -> str | None:
    """A warning if a machine has fewer CPU cores than ranks; None if all is well.

    Args:
        devices: ranks on this machine.
        cuda_devices: GPUs that it shows; 0: the ranks share its CPU.

    Raises:
        ConfigError: this number of devices must be a mistake.
    """
    if cuda_devices:
        if devices > cuda_devices:
            raise ConfigError(
                f"--devices {devices}: this machine shows {cuda_devices} CUDA devices: name that number, or a smaller "
                "one."
            )
        return None

    cores = own_cores()
    if devices > MOST_RANKS_PER_CORE * cores:
        raise ConfigError(
            f"--devices {devices}: this machine has no GPU, and this process may use {cores} of its CPU cores, on "
            f"which each device is one process: name {cores} or fewer."
        )
    if devices > cores:
        return f"--devices {devices}: {cores} CPU cores are shared by more ranks, which is slower than {cores} of them"
    return None


def _refuse_other_verb(name: str, recipe: Recipe, fine_tunes: bool) -> None:
    if recipe.sft is not None and not fine_tunes:
        raise RecipeError(f"recipe {name!r} fine-tunes a base: `ds-slm sft {name} --base MODEL` does that.")
    if recipe.sft is None and fine_tunes:
        raise RecipeError(f"recipe {name!r} has no [sft] section, it pretrains: `ds-slm train {name}` does that.")


def _refuse_nothing_to_resume(resume: str, run_folder: Path) -> None:
    from ds_slm.checkpoint import files

    if resume == "must" and not files.steps(run_folder):
        raise CheckpointError(f"--resume must: {run_folder} holds no checkpoint; leave it out to begin a run.")
