"""What one host trains with. All problems that one host can have are found before any rank waits for another.

recipe, flags, task --> Inputs.checked --> configuration, prepared data, rows, base, benchmarks; or all problems
"""

from dataclasses import dataclass

from ds_slm.checkpoint.files import BASE
from ds_slm.distributed import network, sharing
from ds_slm.distributed.rendezvous import Rendezvous
from ds_slm.engine import devices
from ds_slm.engine.row_reader import RowSource
from ds_slm.errors import UserError, attempt
from ds_slm.recipe import ds_config
from ds_slm.recipe.schema import Recipe
from ds_slm.run import folder as run_folder
from ds_slm.train import unused_flags
from ds_slm.train.task import Base, Benchmarks, Corpus, Options, Task


@dataclass(frozen=True)
class Inputs:
    """What this host trains with."""

    recipe: Recipe
    options: Options
    task: Task
    engine_config: ds_config.EngineConfig
    corpus: Corpus
    rows: RowSource
    base: Base | None
    """The model to begin with; None: the recipe's initialisation."""
    benchmarks: Benchmarks | None

    @classmethod
    def checked(cls, recipe: Recipe, options: Options, task: Task, meeting: Rendezvous) -> "Inputs":
        """Read and check the inputs of this host, before any rank waits inside a collective.

        Raises UserError with all problems, which ends the other ranks, too.
        """
        problems: list[str] = []
        world_size = meeting.world.size

        # Check what is asked for before anything is prepared.
        attempt(problems, network.refuse_unknown_interfaces)
        micro_batch_rows = None if options.micro_batch == "auto" else options.micro_batch
        engine_config = attempt(problems, lambda: joined_config(recipe, options, world_size, micro_batch_rows))
        attempt(problems, lambda: unused_flags.refuse(recipe, options))
        attempt(problems, lambda: devices.refuse_missing_precision(recipe.train.precision))
        attempt(
            problems, lambda: run_folder.refuse_foreign(options.run_dir, recipe, options.resume, options.allow_change)
        )

        # Receive data that another host has. Data that no host has are prepared on each.
        if not problems and not meeting.world.on_one_host:
            attempt(problems, lambda: sharing.share(meeting, task.needs(), recipe.identity_sha256(), task.report))

        # A base that does not fit is refused before anything is prepared.
        base = attempt(problems, task.base) if task.base and not problems else None
        if base:
            attempt(problems, lambda: run_folder.refuse_own_base(options.run_dir, base.folder))

        corpus = None if problems else attempt(problems, task.prepare)
        rows = attempt(problems, lambda: task.rows(corpus)) if corpus else None
        benchmarks = attempt(problems, lambda: task.benchmarks(corpus)) if corpus else None
        if problems or engine_config is None or corpus is None or rows is None:
            raise UserError(problems)
        return cls(recipe, options, task, engine_config, corpus, rows, base, benchmarks)

    @property
    def beginning(self) -> dict[str, str]:
        """Hashes of what a run begins with, except recipe and data: equal on all hosts, and at every resumption."""
        return {BASE: self.base.sha256} if self.base else {}

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that are equal on all hosts and, except the recipe's, at every resumption."""
        return {
            "recipe_sha256": self.recipe.identity_sha256(),
            "data_sha256": self.corpus.sha256,
            "tokenizer_sha256": self.corpus.tokenizer_sha256,
            **self.beginning,
        }


def joined_config(recipe: Recipe, options: Options, world_size: int, rows: int | None) -> ds_config.EngineConfig:
    """What DeepSpeed gets on this device, joined from the launch's ds_config, the recipe, and the rows of a forward.

    Args:
        recipe: what is trained.
        options: name the ds_config.
        world_size: ranks of the launch.
        rows: of a forward; None takes the ds_config's hint or a default.

    Raises:
        ConfigError: with everything in the ds_config that is wrong, or does not fit the recipe or the ranks.
    """
    ds_file = ds_config.read(options.ds_config)
    return ds_config.join(recipe, ds_file, world_size, devices.device_type(), rows)
