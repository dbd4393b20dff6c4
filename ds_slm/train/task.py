"""What a launch is asked for (its flags, and the differences between pretraining and fine-tuning), and its run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ds_slm.checkpoint.manager import Checkpoints
from ds_slm.checkpoint.resume import State
from ds_slm.distributed.ranks import Control
from ds_slm.engine.engine import Engine
from ds_slm.engine.profile import Profile
from ds_slm.engine.row_reader import RowReader, RowSource
from ds_slm.files import NeededFolder
from ds_slm.recipe.plan import flops_per_token
from ds_slm.recipe.schema import Recipe
from ds_slm.run.report import Report
from ds_slm.train.spikes import Spikes


class Corpus(Protocol):
    """What a launch needs to know of the prepared data."""

    @property
    def sha256(self) -> str:
        """One hash of everything that decides which rows are read."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's content."""
        ...

    @property
    def older_sha256s(self) -> Mapping[str, str]:
        """What an older version called the same data and tokenizer; see `ds_slm.data.shards.prepared.Prepared`."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer folder."""
        ...

    @property
    def replaced_sources(self) -> list[str]:
        """Sources that were read from other local files than the recipe names."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The --max-tokens that a source was cut at when it was prepared."""
        ...


@dataclass(frozen=True)
class Options:
    """A launch's flags, read and checked."""

    run_dir: Path
    ds_config: Path
    recipe_name: str = ""
    """The name under which prepared data are kept."""
    resume: str = "auto"
    max_steps: int | None = None
    micro_batch: int | Literal["auto"] | None = None
    """Rows of a forward; None takes the ds_config's hint or a default, "auto" measures."""
    allow_change: bool = False
    allow_mixed: bool = False
    """Train together on hosts whose code or libraries differ."""
    profile: range | None = None
    """Steps that are profiled."""
    skip_rows: tuple[range, ...] = ()
    """Global positions of rows to leave out, in addition to the recorded ones; an empty range forgets the latter."""
    grace_s: float = 25.0
    """Seconds from a signal that stops the run to the end of its processes."""

    def last_step(self, recipe: Recipe) -> int:
        """The step after which this launch ends."""
        return recipe.train.steps if self.max_steps is None else min(self.max_steps, recipe.train.steps)


class Base(Protocol):
    """A trained model to begin with."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def folder(self) -> Path:
        """The checkpoint or Hugging Face folder that holds it."""
        ...

    @property
    def sha256(self) -> str:
        """One hash of all weights."""
        ...

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Names and fp32 weights, one at a time."""
        ...


Benchmarks = Callable[[nn.Module, Control, Callable[[], None]], tuple[Mapping[str, float], str]]
"""A function of the model, the ranks and a vote on signals. On rank 0 it returns figures by TASK/METRIC, or why they
could not be scored. Called on every rank."""


@dataclass(frozen=True)
class Task:
    """What differs between pretraining and fine-tuning."""

    prepare: Callable[[], Corpus]
    """Prepare the data on this host, or find it prepared."""
    rows: Callable[[Any], RowSource]
    """Rows of the prepared data."""
    sample: Callable[[Any], Callable[[nn.Module], dict[str, str]]]
    """Makes, from prepared data, a function that continues the recipe's prompts."""
    val_tokens_per_byte: Callable[[Any], float | None]
    needs: Callable[[], Sequence[NeededFolder]] = list
    """Folders that every host must have; a host that lacks one receives it before it prepares anything."""
    report: Callable[[str], None] = print
    """Takes lines about the data."""
    benchmarks: Callable[[Any], Benchmarks | None] = lambda corpus: None
    """Makes, from prepared data, a function that scores the recipe's `[eval]` tasks; None if it names none."""
    base: Callable[[], Base] | None = None
    """Opens the model that a run begins with; None: it begins with the recipe's initialisation."""


@dataclass
class Run:
    """Everything that the loop needs."""

    folder: Path
    recipe: Recipe
    engine: Engine
    rows: RowSource
    report: Report
    state: State
    stop_at_step: int
    checkpoints: Checkpoints
    identity: dict[str, Any]
    """Hashes of recipe, data and tokenizer: stored in every checkpoint."""
    peak_flops: float | None
    """Peak FLOP/s of one device."""
    sample: Callable[[nn.Module], dict[str, str]]
    """Prompt -> continuation, called on every rank at each evaluation."""
    benchmarks: Benchmarks | None = None
    """Scores the recipe's `[eval]` tasks."""
    val_tokens_per_byte: float | None = None
    evaluate_first: bool = False
    """Whether to evaluate before the first step."""
    val_loss: float = math.inf
    """The loss of the last evaluation."""
    profile: Profile | None = None
    spikes: Spikes = field(default_factory=Spikes)
    reader: RowReader = field(init=False)

    @cached_property
    def flops_per_token(self) -> int:
        """FLOPs that the model needs for a token of training."""
        return flops_per_token(self.recipe.model, self.recipe.data.seq_len)

    def __post_init__(self) -> None:
        engine, on_gpu = self.engine, self.engine.device.type == "cuda"
        self.reader = RowReader(self.rows, engine.control, engine.engine_config, self.state.skipped_rows, on_gpu)
