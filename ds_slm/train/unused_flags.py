"""A launch's flags that have no effect: refused if they can only be a mistake, else named at its start."""

from collections.abc import Iterator

from ds_slm.errors import ConfigError
from ds_slm.recipe.effects import is_set
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.train.task import Options


def refuse(recipe: Recipe, options: Options) -> None:
    """Raise ConfigError if this launch never takes the steps that it is to profile."""
    end = options.last_step(recipe)
    if options.profile and options.profile[0] > end:
        raise ConfigError(
            f"--profile {_spelled(options.profile)}: this launch ends after step {end}: name steps up to that one."
        )


def warnings(
    recipe: Recipe, options: Options, world_size: int, keeping_hosts: int, held_out_rows: int
) -> Iterator[str]:
    """A line for each thing that was asked for and will not happen.

    Args:
        recipe: what is trained.
        options: the launch's flags.
        world_size: ranks of all hosts.
        keeping_hosts: hosts that have a run folder of their own.
        held_out_rows: the number of held-out rows in the data.
    """
    end, rows = options.last_step(recipe), recipe.rows_per_step

    # How far this launch goes.
    if options.max_steps is not None and options.max_steps > recipe.train.steps:
        yield f"--max-steps {options.max_steps} has no effect: the run ends after step {recipe.train.steps}"
    elif options.max_steps == 1 and not learning_rate(recipe, 0):
        yield (
            "--max-steps 1: the first step of the warm-up runs at a learning rate of 0 and changes nothing; take more, "
            "or set schedule.warmup_start_lr"
        )

    # What it looks at on the way.
    if is_set(recipe, "run", "eval_rows") and recipe.run.eval_rows > held_out_rows:
        yield f"run.eval_rows = {recipe.run.eval_rows:,}: there are only {held_out_rows:,} held-out rows"
    if options.profile and options.profile[-1] > end:
        yield f"--profile {_spelled(options.profile)}: this launch ends after step {end}, so does the profile"

    # How it is spread over devices and hosts.
    rows_per_rank = -(-rows // world_size)
    if isinstance(options.micro_batch, int) and options.micro_batch > rows_per_rank:
        yield f"--micro-batch {options.micro_batch}: a device has no more than {rows_per_rank} rows of a step's {rows}"
    if is_set(recipe, "run", "checkpoint_copies") and recipe.run.checkpoint_copies > keeping_hosts:
        yield (
            f"run.checkpoint_copies = {recipe.run.checkpoint_copies}: only {keeping_hosts} "
            f"{'host has a run folder' if keeping_hosts == 1 else 'hosts have run folders'} to keep them in"
        )


def _spelled(steps: range) -> str:
    return f"{steps[0]}:{steps[-1]}"
