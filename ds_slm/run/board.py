"""TensorBoard: the tag and chart of each value, and the columns by which runs are compared.

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
"""Kind of record -> prefix of its tags, for kinds whose fields name themselves."""

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
"""The tab's categories and charts; patterns of tags name the lines of a chart."""

COMPARED_BY = ("model", "optimizer", "schedule", "train")
"""Sections of the recipe whose values are columns of the table of runs."""
LAST = ("train/loss", "val/loss", "val/all_rows_loss", "val/all_rows_bits_per_byte", "perf/tokens_per_s")
"""Scalars whose last values are columns of the table of runs."""


class Board:
    """A run's event files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """A resumed run hides the events after `first_step`, because it takes these steps again."""
        from torch.utils.tensorboard.summary import custom_scalars

        self._kept: tuple[list[str], Any] = [], None
        """The tags of the last scalars, and their event: most often the next record has the same tags."""
        self._file = EventFile(folder, hidden_from_step=first_step + 1)
        self._file.add(summary=custom_scalars(CHARTS))

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the scalars of one record, in one event, or the texts of samples; nothing for other kinds."""
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
        """Write values by tag in one event: an event for each would cost a tiny model's step several times more."""
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
        # The third summary says how a session ended, which is not known yet.
        for summary in hparams(columns, dict.fromkeys(LAST))[:2]:
            self._file.add(summary=summary)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
