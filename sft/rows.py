"""From shards of conversations to rows for training, in the recipe's order.

    shards --Conversations--> one by one --sft.packing--> rows of an epoch --read--> ids, weights, document ids

An epoch is a seeded permutation of all conversations, packed into rows of seq_len + 1 tokens or one a row: a pure
function of seed and epoch. Held-out rows are never packed and never shuffled. With the `card` mask a target weighs
1 / (number of targets in its conversation).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ds_slm.data.order import RowId
from ds_slm.data.rows import Repeat, Rows, Split, repeat_notes, repeat_warnings
from ds_slm.data.shards.journal import tell_skipped
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.recipe.schema import Recipe
from sft.chatml import ChatML
from sft.checks import refuse_unfit_settings, refuse_wrong_masks, section
from sft.packing import rows_of_epoch
from sft.shards import ANSWER, IDS, TRAINED, Conversations


class ConversationRows:
    """Rows of conversations, in the recipe's order: what the loop trains on."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        """Raises DataError if the masks cannot be right, or the recipe asks for what rows of conversations lack."""
        self._recipe, self._sft = recipe, section(recipe)
        self._seq_len, self._rows_per_step = recipe.data.seq_len, recipe.rows_per_step
        self._pad_id = prepared.pad_id

        # under `all` a conversation need not have an answer for the card's measure to count
        self.measures: Mapping[str, Split] = (
            {"": "val"} if self._sft.mask == "all" else {"": "val", "card_": "val_card"}
        )

        self._splits = {
            "train": Conversations(prepared.tokens("train")),
            "val": Conversations(prepared.tokens("val")),
        }
        self._manifests = prepared.manifests
        self._epochs: list[list[list[int]]] = []

        refuse_unfit_settings(recipe)
        chatml = ChatML(load_tokenizer(prepared.tokenizer_folder))
        refuse_wrong_masks(self._splits["train"], self._sft.mask, chatml.ending(self._sft.mask))

    @property
    def training(self) -> Conversations:
        """The conversations of the training split."""
        return self._splits["train"]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The conversations of each row of an epoch."""
        capacity = self._seq_len + 1 if self._sft.packing else None
        while len(self._epochs) <= epoch:
            lengths, seed = self._splits["train"].lengths, self._recipe.train.seed
            self._epochs.append(rows_of_epoch(lengths, capacity, seed, len(self._epochs)))
        return self._epochs[epoch]

    def row_ids(self, position: int) -> list[RowId]:
        """The rows of the step that begins at a global position."""
        found: list[RowId] = []
        epoch, begin = 0, 0
        while len(found) < self._rows_per_step:
            rows = len(self._epoch(epoch))
            first = max(position + len(found) - begin, 0)
            found += [RowId(0, epoch, row) for row in range(first, min(first + self._rows_per_step - len(found), rows))]
            begin, epoch = begin + rows, epoch + 1
        return found

    def next_position(self, position: int) -> int:
        """Where the step after the one at `position` begins."""
        return position + self._rows_per_step

    def val_row_ids(self, limit: int | None = None) -> list[RowId]:
        """Held-out conversations, always the same ones: all of them, or `limit` spread evenly."""
        count = len(self._splits["val"])
        if limit is None or limit >= count:
            return [RowId(0, 0, number) for number in range(count)]
        return [RowId(0, 0, (2 * place + 1) * count // (2 * limit)) for place in range(limit)]

    def read(self, row_ids: Sequence[RowId | None], split: Split = "train") -> Rows:
        """The rows with these ids; None is a filler row of weight 0.

        `val` is weighted as in training, but with equal weights for all targets; `val_card` counts as the published
        card does: the whole assistant segment, the mean of each conversation.
        """
        token_ids = np.full((len(row_ids), self._seq_len + 1), self._pad_id, dtype=np.int64)
        weights = np.zeros((len(row_ids), self._seq_len), dtype=np.float32)
        document_ids = np.full((len(row_ids), self._seq_len), -1, dtype=np.int32)
        for place, row_id in enumerate(row_ids):
            if row_id is not None:
                numbers = self._epoch(row_id.epoch)[row_id.row] if split == "train" else [row_id.row]
                self._fill(token_ids[place], weights[place], document_ids[place], numbers, split)
        packed = split == "train" and self._sft.packing
        return Rows(token_ids, weights, document_ids if packed else None)

    def _fill(
        self, token_ids: np.ndarray, weights: np.ndarray, document_ids: np.ndarray, numbers: list[int], split: str
    ) -> None:
        conversations = self._splits["train" if split == "train" else "val"]
        flag = ANSWER if split == "val_card" else TRAINED
        mean = split == "val_card" or (split == "train" and self._sft.mask == "card")
        begin = 0
        for document, number in enumerate(numbers):
            tokens = conversations[number]
            end = begin + len(tokens)
            token_ids[begin:end] = tokens & IDS
            document_ids[begin : min(end, self._seq_len)] = document
            targets = (tokens[1:] & flag) != 0  # no token of the conversation predicts its first one
            share = 1.0 / max(int(targets.sum()), 1) if mean else 1.0
            weights[begin : end - 1] = targets * np.float32(share)
            begin = end

    def describe(self, row_ids: Sequence[RowId]) -> dict[str, int]:
        """What a step's rows hold: conversations, real, supervised and padded tokens."""
        conversations = self._splits["train"]
        numbers = [number for row_id in row_ids for number in self._epoch(row_id.epoch)[row_id.row]]
        real = int(conversations.lengths[numbers].sum())
        supervised = sum(int(np.count_nonzero(conversations[number][1:] & TRAINED)) for number in numbers)
        padded = len(row_ids) * (self._seq_len + 1) - real
        return {"conversations": len(numbers), "real": real, "supervised": supervised, "padded": padded}

    def notes(self) -> list[str]:
        """A line if the rows run out and come again, as often as text may be repeated."""
        return repeat_notes(self._repeats())

    def warnings(self) -> list[str]:
        """A line if the rows are read so often that little more is learned."""
        return repeat_warnings(self._repeats())

    def _repeats(self) -> Iterator[Repeat]:
        """All rows, if they run out during the run."""
        rows, steps = len(self._epoch(0)), self._recipe.train.steps
        if steps * self._rows_per_step > rows:
            step = rows // self._rows_per_step + 1
            line = f"the {rows:,} rows run out: from step {step:,} of {steps:,} on they come again, in another order"
            yield Repeat(line, steps * self._rows_per_step / rows)

    def summary(self) -> dict[str, Any]:
        """Kept, truncated and dropped conversations, and the supervised share, of both splits."""
        dropped: dict[str, int] = {}
        for manifest in self._manifests.values():
            for reason, count in manifest["skipped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        counts = {split: conversations.counts for split, conversations in self._splits.items()}
        train = counts["train"]
        return {**counts, "dropped": dropped, "supervised_share": train["supervised_tokens"] / train["tokens"]}


def summary_line(summary: Mapping[str, Any]) -> str:
    """One line on the conversations, for the user."""
    train, val = summary["train"], summary["val"]
    return (
        f"conversations: {train['conversations']:,} to train on ({train['truncated']:,} truncated), "
        f"{val['conversations']:,} held out; dropped: {tell_skipped(summary['dropped']) or 'none'}; "
        f"{summary['supervised_share']:.1%} of {train['tokens']:,} tokens are targets"
    )
