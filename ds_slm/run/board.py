"""TensorBoard: which value stands under which tag, in which chart, and what a run is compared by.

    record --TAGS--> scalars; the recipe's values and LAST --hparams--> one line of a table of runs
    CHARTS --> the tab "custom scalars": losses first, then rates, then the machine

DeepSpeed's own TensorBoard is not used: it writes rates against samples, and no loss.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_slm.run.event_file import EventFile

TAGS = {
    "train": {
        "loss": "train/loss", "z_loss": "train/z_loss", "lr": "train/lr", "grad_norm": "train/grad_norm",
        "tokens": "train/tokens", "loss_spike": "train/loss_spike", "loss_scale": "train/loss_scale",
        "tokens_per_s": "perf/tokens_per_s",
        "mfu": "perf/mfu", "step_s": "perf/step_s", "peak_memory_gb": "perf/peak_memory_gb",
        "conversations": "rows/conversations", "real": "rows/real_tokens", "supervised": "rows/supervised_tokens",
        "padded": "rows/padded_tokens",
    },
    "val": {
        "loss": "val/loss", "perplexity": "val/perplexity", "bits_per_byte": "val/bits_per_byte",
        "card_loss": "val/card_loss", "card_perplexity": "val/card_perplexity",
    },
    "eval": {
        "loss": "val/all_rows_loss", "perplexity": "val/all_rows_perplexity",
        "bits_per_byte": "val/all_rows_bits_per_byte",
        "card_loss": "val/all_rows_card_loss", "card_perplexity": "val/all_rows_card_perplexity",
    },
    "save": {"wait_s": "perf/save_wait_s"},
}  # fmt: skip
"""Kind of record -> field -> tag. `eval` is recorded once, at the end of a run, over all held-out rows."""
PREFIXES = {"benchmarks": "eval", "layers": "layers"}
"""Kinds whose fields have names of their own, which stand behind this."""

CHARTS = {
    "1 loss": {
        "training and held-out loss": ["Multiline", [r"^train/loss$", r"^val/loss$"]],
        "held-out bits per byte": ["Multiline", [r"^val/bits_per_byte$"]],
    },
    "2 rates": {
        "learning rate": ["Multiline", [r"^train/lr$"]],
        "gradient norm": ["Multiline", [r"^train/grad_norm$"]],
    },
    "3 machine": {
        "tokens per second": ["Multiline", [r"^perf/tokens_per_s$"]],
        "seconds per step": ["Multiline", [r"^perf/step_s$", r"^perf/save_wait_s$"]],
        "peak memory in GB": ["Multiline", [r"^perf/peak_memory_gb$"]],
    },
    "4 layers, where run.layers_every_steps is set": {
        "gradient norm": ["Multiline", [r"^layers/grad_norm/"]],
        "weight norm": ["Multiline", [r"^layers/weight_norm/"]],
    },
}
"""The tab's categories and charts; a chart's lines are named by patterns of tags."""

COMPARED_BY = ("model", "optimizer", "schedule", "train")
"""Sections of the recipe whose values are columns of the table of runs."""
LAST = ("train/loss", "val/loss", "val/all_rows_loss", "val/all_rows_bits_per_byte", "perf/tokens_per_s")
"""Scalars whose last values are."""


class Board:
    """A run's event files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """A resumed run hides the events of steps that it takes again, those after `first_step`."""
        from torch.utils.tensorboard.summary import custom_scalars

        self._kept: tuple[list[str], Any] = [], None
        """The tags of the last scalars, and their event: the next record mostly has the same tags."""
        self._file = EventFile(folder, hidden_from_step=first_step + 1)
        self._file.add(summary=custom_scalars(CHARTS))

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """The scalars of one record, in one event, or the texts of samples; of other kinds nothing."""
        if kind == "samples":
            for prompt, continuation in values["continuations"].items():
                self.text(f"samples/{prompt}", continuation, step)

        tags = TAGS.get(kind, {})
        if kind in PREFIXES:
            tags = {field: f"{PREFIXES[kind]}/{field}" for field in values}
        scalars = {tag: values[field] for field, tag in tags.items() if values.get(field) is not None}
        if scalars:
            self._scalars(scalars, step)
        if kind != "train":  # an evaluation or a save: it may take long until the next record
            self._file.flush()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag in one event: one of each by itself would cost a tiny model's step several times as much."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        tags, event = self._kept
        if tags != list(values):
            tags, event = self._kept = list(values), Event(summary={"value": [{"tag": tag} for tag in values]})

        event.step = step
        for scalar, value in zip(event.summary.value, values.values(), strict=True):
            scalar.simple_value = value
        self._file.add_event(event)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, in Markdown."""
        from torch.utils.tensorboard import summary

        self._file.add(step=step, summary=summary.text(tag, text))

    def compare_by(self, recipe: Mapping[str, Any]) -> None:
        """Put the run into the table of runs.

        Args:
            recipe: section -> key -> value.
        """
        from torch.utils.tensorboard.summary import hparams

        columns = {
            f"{section}.{key}": value
            for section in COMPARED_BY
            for key, value in recipe[section].items()
            if isinstance(value, bool | int | float | str)
        }
        # The third summary says how a session ended, which is known only later.
        for summary in hparams(columns, dict.fromkeys(LAST))[:2]:
            self._file.add(summary=summary)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
