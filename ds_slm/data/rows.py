"""The rows of a step, for one rank: token ids and the loss weight of every target.

    position --> RowIds of the step --share--> this rank's micro-batches --read--> Rows

With seq_len T, training row r of a source covers its tokens [r T, r T + T]: T inputs, T targets, and the border token
shared with the next row. Held-out row r has the targets [r T, r T + T) and one token of context before them; the very
first context is an EOS, so every held-out token is a target exactly once.

Known gaps: up to T - 1 training tokens at the end of each source are never drawn. Rows cross document borders, as the
published recipes do, so `document_ids` is None here; packed rows of fine-tuning carry them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from ds_slm.data.order import LastBatch, Order, RowId, next_step_position, step_at, step_row_ids
from ds_slm.data.shards.prepared import Prepared
from ds_slm.errors import DataError
from ds_slm.recipe.own_text import EPOCHS
from ds_slm.recipe.schema import Recipe

Split = Literal["train", "val", "val_card"]
"""The split to read; `val_card` is held-out conversations, counted as a published card counts them (sft)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """B rows of T targets each."""

    token_ids: np.ndarray
    """int64 [B, T + 1]."""
    weights: np.ndarray
    """float32 [B, T]: the loss weight of each target; 0 for a target that is not learned."""
    document_ids: np.ndarray | None = None
    """int32 [B, T]: inputs with equal ids may see each other; None if the rows are not packed."""

    @property
    def input_ids(self) -> np.ndarray:
        """int64 [B, T]."""
        return self.token_ids[:, :-1]

    @property
    def target_ids(self) -> np.ndarray:
        """int64 [B, T]: the token after each input."""
        return self.token_ids[:, 1:]

    def part(self, begin: int, end: int) -> "Rows":
        """Some of the rows, in the same memory."""
        documents = None if self.document_ids is None else self.document_ids[begin:end]
        return Rows(self.token_ids[begin:end], self.weights[begin:end], documents)

    @property
    def document_count(self) -> int | None:
        """Documents (runs of equal ids) in all rows; None if the rows are not packed."""
        if self.document_ids is None:
            return None
        return len(self.document_ids) + int(np.count_nonzero(np.diff(self.document_ids)))


class Repeat(NamedTuple):
    """Rows that run out during a run."""

    line: str
    """When they come again."""
    times: float
    """About how many times the run reads them."""


def repeat_notes(repeats: Iterable[Repeat]) -> list[str]:
    """A line for all rows that are read no more than EPOCHS times."""
    return [line for line, times in repeats if round(times) <= EPOCHS]


def repeat_warnings(repeats: Iterable[Repeat]) -> list[str]:
    """A line for all rows that are read more than EPOCHS times."""
    return [
        f"{line}; {times:.0f} times in all, and beyond {EPOCHS} little more is learned"
        for line, times in repeats
        if round(times) > EPOCHS
    ]


class PretrainRows:
    """Rows of prepared token shards, in the recipe's order."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        """Raises DataError, which names every source that is too small for the recipe."""
        self._seq_len = recipe.data.seq_len
        self._rows_per_step = recipe.rows_per_step
        self._last_batch: LastBatch = recipe.train.last_batch
        self._steps = recipe.train.steps
        self._prepared = prepared
        self._tokens = {"train": prepared.tokens("train"), "val": prepared.tokens("val")}
        rows_per_source = self._training_rows(recipe)
        self._order = Order(recipe.train.seed, rows_per_source, [source.weight for source in recipe.data.source])
        self.epoch_rows = self._order.epoch_rows
        if self._last_batch == "drop" and self.epoch_rows < self._rows_per_step:
            raise DataError(
                f"train.last_batch = 'drop' leaves no step: an epoch has {self.epoch_rows} rows and a step needs "
                f"{self._rows_per_step}; lower train.global_batch_tokens, or use 'wrap'."
            )

    def _training_rows(self, recipe: Recipe) -> list[int]:
        rows_per_source = [(len(tokens) - 1) // self._seq_len for tokens in self._tokens["train"]]
        problems = [
            f"source {source.name!r} has {len(tokens)} training tokens, fewer than one row of data.seq_len + 1 = "
            f"{self._seq_len + 1}: shorten the rows or add text."
            for source, tokens, rows in zip(recipe.data.source, self._tokens["train"], rows_per_source, strict=True)
            if rows < 1
        ]
        if problems:
            raise DataError(problems)
        return rows_per_source

    def notes(self) -> list[str]:
        """A line for each source that begins another epoch during the run, as often as text may be repeated."""
        return repeat_notes(self._repeats())

    def warnings(self) -> list[str]:
        """A line for each source that is read so often that little more is learned."""
        return repeat_warnings(self._repeats())

    def _repeats(self) -> Iterator[Repeat]:
        """The sources that begin another epoch during the run."""
        for place, name in enumerate(self._prepared.manifests):
            first = self._order.first_repeat(place)
            step = step_at(first, self._rows_per_step, self._last_batch, self.epoch_rows)
            if step <= self._steps:
                line = (
                    f"source {name} runs out after {self._order.rows_of(place):,} rows: from step {step:,} of "
                    f"{self._steps:,} on its rows come again, in another order"
                )
                yield Repeat(line, self._steps * self._rows_per_step / first)

    measures: Mapping[str, Split] = MappingProxyType({"": "val"})
    """Ways of counting the held-out loss: prefix of a value's name -> the split to `read`."""

    def summary(self) -> dict[str, Any]:
        """Tokens of both splits, and how many rows each source has to train on."""
        rows = {name: self._order.rows_of(place) for place, name in enumerate(self._prepared.manifests)}
        train = {"tokens": self._prepared.train_tokens, "rows": rows}
        return {"train": train, "val": {"tokens": self._prepared.val_tokens}}

    def describe(self, row_ids: Sequence[RowId]) -> dict[str, int]:
        """Nothing, because rows of pretraining are full."""
        return {}

    def row_ids(self, position: int) -> list[RowId]:
        """The rows of the step that begins at a global position."""
        return step_row_ids(self._order, position, self._rows_per_step, self._last_batch, self.epoch_rows)

    def next_position(self, position: int) -> int:
        """Where the step after the one at `position` begins."""
        return next_step_position(position, self._rows_per_step, self._last_batch, self.epoch_rows)

    def val_row_ids(self, limit: int | None = None) -> list[RowId]:
        """The held-out rows, always the same ones: all of them, or `limit` spread evenly over all sources."""
        every = [
            RowId(source, 0, row)
            for source, tokens in enumerate(self._tokens["val"])
            for row in range(math.ceil(len(tokens) / self._seq_len))
        ]
        if limit is None or limit >= len(every):
            return every
        return [every[(2 * place + 1) * len(every) // (2 * limit)] for place in range(limit)]

    def read(self, row_ids: Sequence[RowId | None], split: Split = "train") -> Rows:
        """The rows with these ids; None is a filler row of padding with weight 0.

        Raises:
            DataError: a shard holds an id beyond the vocabulary; names the shard and the position.
        """
        token_ids = np.full((len(row_ids), self._seq_len + 1), self._prepared.pad_id, dtype=np.int64)
        weights = np.zeros((len(row_ids), self._seq_len), dtype=np.float32)
        for place, row_id in enumerate(row_ids):
            if row_id is not None:
                self._fill(token_ids[place], weights[place], row_id, split)

        if token_ids.max() >= self._prepared.vocab_size:
            self._refuse_id(row_ids, token_ids, split)
        return Rows(token_ids, weights)

    def _fill(self, token_ids: np.ndarray, weights: np.ndarray, row_id: RowId, split: Split) -> None:
        begin = self._begin(row_id, split)
        ids = self._tokens[split][row_id.source][max(begin, 0) : begin + self._seq_len + 1]
        skip = int(begin < 0)
        token_ids[:skip] = self._prepared.eos_id
        token_ids[skip : skip + len(ids)] = ids
        weights[: skip + len(ids) - 1] = 1.0

    def _begin(self, row_id: RowId, split: Split) -> int:
        """The place in its source where a row's tokens begin; a held-out row starts with its context."""
        return row_id.row * self._seq_len - (split == "val")

    def _refuse_id(self, row_ids: Sequence[RowId | None], token_ids: np.ndarray, split: Split) -> None:
        row, column = np.argwhere(token_ids >= self._prepared.vocab_size)[0].tolist()
        row_id = row_ids[row]
        assert row_id is not None, "padding is in the vocabulary"
        path, place = self._tokens[split][row_id.source].place(self._begin(row_id, split) + column)
        raise DataError(
            f"{path} holds id {token_ids[row, column]} at position {place}, beyond the vocabulary of "
            f"{self._prepared.vocab_size}: it is damaged or of another tokenizer; remove {self._prepared.folder} and "
            "prepare again."
        )


def share(row_ids: Sequence[RowId], rank: int, world_size: int, micro_batch: int) -> list[list[RowId | None]]:
    """This rank's micro-batches of a step's rows, at most `micro_batch` rows each.

    All ranks get the same number of micro-batches of one size, filled up with None, so that every world size works and
    every rank runs the same number of forwards. The size is the smallest that keeps this number, for fewer fillers.
    """
    rows_per_rank = math.ceil(len(row_ids) / world_size)
    count = math.ceil(rows_per_rank / micro_batch)
    size = math.ceil(rows_per_rank / count)
    mine: list[RowId | None] = list(row_ids[rank::world_size])
    mine += [None] * (count * size - len(mine))
    return [mine[begin : begin + size] for begin in range(0, len(mine), size)]
