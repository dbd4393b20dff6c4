"""From conversations to rows: what `ds_slm.data` does with text, here with turns, masks and packing.

    sources --> messages as JSON --form (sft.forms)--> ids with flags --prepare--> shards, journal, manifest
    shards  --ConversationRows--> order of an epoch --pack--> rows --read--> ids, weights, document ids

A shard is a flat file of uint32: an id in the low bits and flags in the high ones. So preparing, resuming, hashing and
checking are those of pretraining.

    TRAINED      the token is a target under the recipe's mask
    ANSWER       it belongs to an assistant turn, header and newline included: what the `card` mask trains
    BEGIN, CUT   the first token of a conversation; of one that was truncated

Order: an epoch is a seeded permutation of all conversations. Packed, windows of PACK_WINDOW conversations in that order
are put into rows of seq_len + 1 tokens, longest first, each where it leaves the least room; unpacked, a row is one
conversation. Both are pure functions of seed and epoch. Held-out rows are never packed and never shuffled.

A conversation longer than a row is cut: its partial content stays, no terminator is invented, and one whose targets
were all cut off is left out and counted. With the `card` mask a target weighs 1 / targets of its conversation.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.order import RowId
from ds_slm.data.rows import Rows, Split
from ds_slm.data.shards.identity import TOKENIZER
from ds_slm.data.shards.journal import SPLITS, tell_skipped
from ds_slm.data.shards.prepare import prepare
from ds_slm.data.shards.prepared import Prepared, Tokens
from ds_slm.data.shards.writer import DocumentFormat, Encode, UnusableDocuments
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, IM_END, Tokenizer, load_tokenizer
from ds_slm.errors import DataError
from ds_slm.files import replace_text
from ds_slm.recipe.schema import Recipe, Sft
from sft import builtin
from sft.chatml import CHAT_TEMPLATE, ChatML, Encoded, problem_of
from sft.forms import EXPECTED, read_messages
from sft.older import SAMPLE, refuse_other_ids
from sft.packing import pack, shuffled
from sft.probe import refuse_other_encoding

TRAINED, BEGIN, ANSWER, CUT = (np.uint32(1 << bit) for bit in (31, 30, 29, 28))
IDS = np.uint32((1 << 28) - 1)

PACK_WINDOW = 4_096
ENCODING = {"conversations": 2}
"""In manifests: encoded as the chat template's text. Older versions, which say nothing, encoded contents alone."""
NO_TARGETS = "without a target"
SCAN_TOKENS = 1 << 24
WAY_OUT = f"expected: {EXPECTED}; mend them, or set sft.invalid = 'drop' to leave such ones out and count them."


def section(recipe: Recipe) -> Sft:
    """The recipe's [sft]. Raises DataError where it has none."""
    if recipe.sft is None:
        raise DataError(f"recipe {recipe.card.name!r} has no [sft] section: pretrain it with ds_slm/pretrain.py.")
    return recipe.sft


def conversation_format(recipe: Recipe, tokenizer_folder: Path | None = None) -> DocumentFormat:
    """How conversations are read and encoded; in the recipe's tokenizer, where no other is given."""
    settings = section(recipe)
    deciding = settings.model_dump(mode="json", include={"mask", "system_turns", "max_rows", "invalid"})
    notes: Counter[str] = Counter()
    return DocumentFormat(
        encode=lambda tokenizer: _encode(recipe, tokenizer, notes),
        tokenizer_folder=tokenizer_folder,
        expected=EXPECTED,
        notes=lambda: notes,
        builtin=lambda: [json.dumps(messages) for messages in builtin.conversations()],
        as_json=True,
        row_limit=settings.max_rows,
        dtype=np.dtype("<u4"),
        identity={"sft": {**deciding, "seq_len": recipe.data.seq_len}},
        version=ENCODING,
    )


def prepare_conversations(
    recipe: Recipe,
    name: str,
    data_root: Path,
    tokenizer_folder: Path | None,
    sources: Mapping[str, Path] | None = None,
    report: Callable[[str], None] = print,
) -> Prepared:
    """Conversations as shards, in the base's tokenizer; as `ds_slm.data.shards.prepare.prepare` does it.

    Without a `tokenizer_folder` the tokenizer is the one they were prepared with before, or the recipe's where that
    needs no training.

    Raises:
        DataError: with every problem found, a base with another tokenizer than the data were made with among them.
    """
    if tokenizer_folder is None and recipe.tokenizer.kind == "bpe" and not (data_root / name / TOKENIZER).exists():
        raise DataError(f"recipe {name!r} has a tokenizer that is trained with its base: name that one, --base MODEL.")

    document_format = conversation_format(recipe, tokenizer_folder)
    prepared = prepare(recipe, name, data_root, sources, report=report, document_format=document_format)

    ours = prepared.tokenizer_sha256
    if tokenizer_folder and ours != (theirs := load_tokenizer(tokenizer_folder).sha256):
        raise DataError(
            f"{prepared.folder} was made with the tokenizer {ours}, the base in {tokenizer_folder} has {theirs}: "
            f"name the base it was made for, another --data-root, or remove the folder."
        )

    _refuse_older_ids(prepared)

    # An export copies the tokenizer's folder, and the chat template with it.
    template = prepared.tokenizer_folder / CHAT_TEMPLATE_FILE
    if not template.is_file():
        replace_text(template, CHAT_TEMPLATE)
    return prepared


def _refuse_older_ids(prepared: Prepared) -> None:
    """Raises DataError where an older version has prepared conversations with other ids than the template's."""

    def sample(name: str) -> Iterator[list[int]]:
        part = replace(prepared, manifests={name: prepared.manifests[name]})
        for split in SPLITS:
            found = Conversations(part.tokens(split))
            for number in range(0, len(found), max(len(found) // SAMPLE, 1)):
                yield (found[number] & IDS).tolist()

    if older := [name for name, manifest in prepared.manifests.items() if not ENCODING.items() <= manifest.items()]:
        tokenizer = load_tokenizer(prepared.tokenizer_folder)
        refuse_other_ids(tokenizer, {str(prepared.folder / name): sample(name) for name in older})


def tell(summary: Mapping[str, Any]) -> str:
    """What a user should know of the conversations, in one line."""
    train, val = summary["train"], summary["val"]
    return (
        f"conversations: {train['conversations']:,} to train on ({train['truncated']:,} truncated), "
        f"{val['conversations']:,} held out; dropped: {tell_skipped(summary['dropped']) or 'none'}; "
        f"{summary['supervised_share']:.1%} of {train['tokens']:,} tokens are targets"
    )


def _encode(recipe: Recipe, tokenizer: Tokenizer, notes: Counter[str]) -> Encode:
    settings, chatml = section(recipe), ChatML(tokenizer)
    refuse_other_encoding(tokenizer)
    limit = recipe.data.seq_len + 1

    def encode(texts: list[str]) -> list[np.ndarray | str]:
        read = [read_messages(json.loads(text), notes) for text in texts]
        conversations = [messages for messages, _ in read]
        problems = [unclear or problem_of(messages) for messages, unclear in read]

        if settings.invalid == "refuse" and any(problems):
            told = enumerate(zip(texts, problems, strict=True))
            wrong = {place: f"a conversation has {why}: {text[:200]}" for place, (text, why) in told if why}
            raise UnusableDocuments(wrong, WAY_OUT)

        sound = [
            _turns(messages, settings) for messages, problem in zip(conversations, problems, strict=True) if not problem
        ]
        encoded = iter(chatml.encode_batch(sound, settings.mask))
        return [problem or flagged(next(encoded), limit) for problem in problems]

    return encode


def _turns(messages: list[dict[str, Any]], settings: Sft) -> list[dict[str, Any]]:
    keep = settings.system_turns == "keep"
    return [message for message in messages if keep or message["role"] != "system"]


def flagged(conversation: Encoded, limit: int) -> np.ndarray | str:
    """A conversation's ids with their flags, cut to `limit` tokens; or why it is left out."""
    ids, trained, answers = (array[:limit] for array in (conversation.ids, conversation.trained, conversation.answers))
    if not trained[1:].any():
        return NO_TARGETS
    flags = np.where(trained, TRAINED, 0) | np.where(answers, ANSWER, 0)
    flags[0] |= BEGIN | (CUT if len(conversation.ids) > limit else 0)
    return ids.astype(np.uint32) | flags.astype(np.uint32)


class Conversations:
    """The conversations of one split, of all sources one after the other."""

    def __init__(self, sources: Sequence[Tokens]) -> None:
        """Reads every token once, to find where conversations begin."""
        self._sources = sources
        begins, lengths = [], []
        for number, tokens in enumerate(sources):
            found = np.concatenate([_places(tokens, begin) for begin in range(0, len(tokens), SCAN_TOKENS)])
            begins.append(np.stack([np.full_like(found, number), found]))
            lengths.append(np.diff(found, append=len(tokens)))
        self._begins = np.concatenate(begins, axis=1)
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """The flagged ids of one."""
        source, begin = self._begins[:, number]
        return self._sources[source][int(begin) : int(begin + self.lengths[number])]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Tokens, targets and cut conversations."""
        totals = dict.fromkeys(("tokens", "supervised_tokens", "truncated"), 0)
        for tokens in self._sources:
            for begin in range(0, len(tokens), SCAN_TOKENS):
                block = tokens[begin : begin + SCAN_TOKENS]
                totals["tokens"] += len(block)
                totals["supervised_tokens"] += int(np.count_nonzero(block & TRAINED))
                totals["truncated"] += int(np.count_nonzero(block & CUT))
        return {"conversations": len(self), **totals}

    def first_unterminated(self, ending: Sequence[int]) -> int | None:
        """The first conversation in which a trained answer does not end with `ending` although it was not cut."""
        reach = len(ending) - 1
        for source, tokens in enumerate(self._sources):
            begins = self._begins[1, self._begins[0] == source]
            for begin in range(0, len(tokens), SCAN_TOKENS):
                # A block begins earlier, so that an ending across its border is seen whole.
                first = max(begin - reach, 0)
                block = tokens[first : begin + SCAN_TOKENS + 1]  # one more, to see whether an answer goes on

                # Where answers end within this block.
                trained = np.append(block & TRAINED, 0) != 0
                ends = np.flatnonzero(trained[:-1] & ~trained[1:])
                ends = ends[(ends >= begin - first) & (ends < begin - first + SCAN_TOKENS)]

                found = np.stack([block[np.maximum(ends - back, 0)] & IDS for back in range(reach, -1, -1)])
                wrong = (found != np.array(ending)[:, None]).any(axis=0)

                # The last answer of a cut conversation may lack its ending.
                for place in ends[wrong] + first:
                    number = int(np.searchsorted(begins, place, side="right")) - 1
                    last = begins[number + 1] - 1 if number + 1 < len(begins) else len(tokens) - 1
                    if not (place == last and tokens[begins[number] : begins[number] + 1] & CUT):
                        return number + int((self._begins[0] < source).sum())
        return None


def _places(tokens: Tokens, begin: int) -> np.ndarray:
    return np.flatnonzero(tokens[begin : begin + SCAN_TOKENS] & BEGIN) + begin


class ConversationRows:
    """Rows of conversations, in the recipe's order: what the loop trains on."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        """Raises DataError where the masks cannot be right, or the recipe asks for what rows of conversations lack."""
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

        if recipe.train.last_batch != "wrap":
            raise DataError("train.last_batch: rows of conversations always run on into the next epoch, use 'wrap'.")
        if any(source.weight != 1 for source in recipe.data.source):
            raise DataError("data.source.weight: conversations of all sources are pooled, leave every weight at 1.")

        chatml = ChatML(load_tokenizer(prepared.tokenizer_folder))
        check_masks(self._splits["train"], self._sft.mask, chatml.ending(self._sft.mask))

    @property
    def training(self) -> Conversations:
        """The conversations of the training split."""
        return self._splits["train"]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The conversations of each row of an epoch."""
        while len(self._epochs) <= epoch:
            conversations = self._splits["train"]
            order = shuffled(self._recipe.train.seed, len(self._epochs), len(conversations))

            if not self._sft.packing:
                self._epochs.append([[int(number)] for number in order])
                continue

            rows: list[list[int]] = []
            for begin in range(0, len(order), PACK_WINDOW):
                window = order[begin : begin + PACK_WINDOW]
                packed = pack(conversations.lengths[window].tolist(), self._seq_len + 1)
                # rows opened early hold the longest: put them back into the order of their earliest conversation
                packed = sorted((sorted(row) for row in packed), key=lambda row: row[0])
                rows += [[int(window[item]) for item in row] for row in packed]
            self._epochs.append(rows)

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

        `val` is weighted as the recipe trains, but each token alike; `val_card` counts as the published card does: the
        whole assistant segment, the mean of each conversation.
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
            targets = (tokens[1:] & flag) != 0  # its first token is predicted by nothing of its own
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

    def warnings(self) -> list[str]:
        """What a user may not expect of these rows, a line each."""
        rows, steps = len(self._epoch(0)), self._recipe.train.steps
        lines = []
        if steps * self._rows_per_step > rows:
            step = rows // self._rows_per_step + 1
            lines.append(
                f"the {rows:,} rows run out: from step {step:,} of {steps:,} on they come again, in another order"
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """Kept, truncated and dropped conversations, and the supervised share, of both splits."""
        dropped: dict[str, int] = {}
        for manifest in self._manifests.values():
            for reason, count in manifest["skipped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        counts = {split: conversations.counts for split, conversations in self._splits.items()}
        train = counts["train"]
        return {**counts, "dropped": dropped, "supervised_share": train["supervised_tokens"] / train["tokens"]}


def check_masks(conversations: Conversations, mask: str, ending: Sequence[int]) -> None:
    """Refuse data whose masks cannot be meant: all zero, all one, or a finished answer without its terminator.

    Raises:
        DataError: with what is wrong.
    """
    counts = conversations.counts
    share = f"{counts['supervised_tokens']:,} of {counts['tokens']:,} tokens are targets"
    if counts["supervised_tokens"] == 0:
        raise DataError(f"sft.mask = {mask!r}: nothing is trained, {share}. Are there assistant turns?")
    if mask == "all":
        return
    if counts["supervised_tokens"] >= counts["tokens"] - counts["conversations"]:
        raise DataError(f"sft.mask = {mask!r}: everything is trained, prompts too, {share}. Use 'all' to do so.")
    if (number := conversations.first_unterminated(ending)) is not None:
        raise DataError(
            f"conversation {number}: a trained answer ends without {IM_END}: a model taught that way never stops. "
            "Remove the prepared folder and prepare again."
        )
