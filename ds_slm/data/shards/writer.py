"""From documents, or ready-made ids, to the shards of one source.

    documents --split_documents--> batches --encoded, one batch ahead--> train or val, an EOS after each document
    .bin files, padding cut off ----------blocks-----------------------> the same, the end held out

Reading and writing run beside the encoding of the next batch, which uses all cores. With or without a resumption,
batches end at the same documents, so the bytes are the same.

Known gap: for ready-made token files the bytes of the training text are unknown, because only the held-out part is
decoded.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.background import in_background, result_of
from ds_slm.data.shards.journal import SPLITS, ShardsInProgress, Split, id_dtype, tell_skipped
from ds_slm.data.shards.progress import Progress
from ds_slm.data.sources.builtin import builtin_documents
from ds_slm.data.sources.documents import DocumentStream
from ds_slm.data.sources.token_files import PADDING, TokenFiles
from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.data_sections import Data

BATCH_DOCUMENTS = 4_096
BATCH_CHARACTERS = 4_000_000
JOURNAL_TOKENS = 1 << 25
"""A kill costs at most the work for this number of tokens, and a batch."""
DRAWS = 1 << 20
"""Rows whose draws are held at a time."""
HASHES = 1 << 64
"""Number of values of a document's keyed hash."""
EMPTY = "empty or unreadable"
NAMED_PROBLEMS = 10
SHOWN_CHARACTERS = 400
"""Characters of a document that a message shows."""


Ids = Sequence[int] | np.ndarray
Encode = Callable[[list[str]], Sequence[Ids | str]]
"""From documents to the ids that are written for each, or to the reason for leaving it out."""


class UnusableDocuments(Exception):
    """Raised by an `Encode` if unusable documents must not be left out: problems by the places in the list."""

    def __init__(self, problems: Mapping[int, str], way_out: str) -> None:
        """`way_out` is printed once, after the problems."""
        super().__init__(way_out)
        self.problems, self.way_out = problems, way_out


def encode_text(tokenizer: Tokenizer) -> Encode:
    """Encodes a text as its ids followed by an EOS."""
    return lambda texts: [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


@dataclass(frozen=True)
class DocumentFormat:
    """What a source's documents are, and how they are encoded. By default they are text, written as ids."""

    encode: Callable[[Tokenizer], Encode] = encode_text
    tokenizer_folder: Path | None = None
    """The folder of the tokenizer that encodes them; None takes the recipe's tokenizer."""
    tokenizer_of_base: Path | None = None
    """The folder of a tokenizer with which the recipe's must agree on every text's ids. None: the recipe's is free."""
    builtin: Callable[[], Sequence[str]] = builtin_documents
    """The documents of a built-in source."""
    as_json: bool = False
    """Whether documents are lists or tables, as JSON, rather than text."""
    row_limit: int | None = None
    """The most documents to read of each source."""
    expected: str = "text in the column that data.source.column names"
    """What a document must be, for the message to users with other documents."""
    notes: Callable[[], Mapping[str, int]] = dict
    """Notes on how documents were read, each with its count among all documents encoded so far."""
    dtype: np.dtype | None = None
    """The type of the written values; None takes the type of the tokenizer's ids."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Everything that decides the encoding, except the recipe's data and tokenizer."""
    version: Mapping[str, Any] = field(default_factory=dict)
    """How documents are encoded, if older versions did it in another way; written into the manifest too."""


TEXT = DocumentFormat()


def split_of(text: str, row: int, data: Data) -> Split:
    """The split of a document.

    hash: a hash of its text, keyed with the seed, is compared with the held-out fraction. draw: numpy's legacy
    generator gives one draw for each row.
    """
    if data.held_out == "draw":
        held_out = _draws(data.split_seed, row // DRAWS)[row % DRAWS] < data.val_fraction
    else:
        held_out = hash_position(text, data.split_seed) < data.val_fraction * HASHES
    return "val" if held_out else "train"


def hash_position(text: str, split_seed: int) -> int:
    """A document's keyed hash, from 0 to HASHES: documents below `val_fraction` of this range are held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(split_seed).encode()).digest()
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=2)
def _draws(seed: int, block: int) -> np.ndarray:
    generator = np.random.RandomState(seed)
    for _ in range(block):
        generator.rand(DRAWS)
    return generator.rand(DRAWS)


def split_documents(
    texts: Iterable[str], data: Data, first_row: int = 0, cut_single: bool = True
) -> Iterator[tuple[Split, str]]:
    """Each document with its split, including empty ones; a source of one single document is cut in two.

    Args:
        texts: the documents from `first_row` on.
        data: how to split.
        first_row: if it is not 0, the source is known to hold more than one document.
        cut_single: whether a document can be cut, as text can.
    """
    remaining = iter(texts)
    first_two = [] if first_row else list(islice(remaining, 2))
    if len(first_two) == 1 and cut_single:
        border = int(len(first_two[0]) * (1 - data.val_fraction))
        yield "train", first_two[0][:border]
        yield "val", first_two[0][border:]
        return
    for row, text in enumerate(chain(first_two, remaining), start=first_row):
        yield split_of(text, row, data), text


@dataclass
class _Batch:
    documents: list[tuple[Split, str]]
    """The documents that are not empty."""
    places: list[int]
    """The place of each of them in the source, from 0 on."""
    rows: int
    """Number of documents read, including empty ones."""
    position: dict[str, Any] | None
    """Where the source goes on after it; None if another document was already read, or at the source's end."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """The format's notes after this batch was encoded, and before the next one was."""


@dataclass(frozen=True)
class Destination:
    """Where the ids of one source go, and how far it is read."""

    name: str
    """The source's name, for errors."""
    shards: ShardsInProgress
    """The shards; writing goes on from their position."""
    tokenizer: Tokenizer
    data: Data
    """How to split."""
    token_limit: float
    """Training tokens to stop at."""
    progress: Progress
    """Gets the amounts that are written."""


def write_documents(
    to: Destination,
    documents: Callable[[dict[str, Any] | None], DocumentStream],
    document_format: DocumentFormat = TEXT,
) -> dict[str, Any]:
    """Write documents as ids into training and validation shards; returns what the manifest says about them.

    Empty documents are counted and skipped. Reading stops when there are `token_limit` training tokens and at least one
    held-out document.

    Args:
        to: where the ids go.
        documents: opens the source at a position.
        document_format: what the documents are, and how they are encoded.
    """
    whole = True
    unsaved_tokens = 0
    first_unusable = ""
    shards, totals = to.shards, to.shards.totals
    noted_before = Counter(totals.noted)

    # Reading goes on where the journal stands.
    stream = documents(shards.position)
    texts = (
        iter(stream)
        if document_format.row_limit is None
        else islice(stream, document_format.row_limit - totals.rows_read)
    )
    split = split_documents(texts, to.data, totals.rows_read, cut_single=not document_format.as_json)

    for batch, encoded in _encoded(
        _batches(split, stream, totals.rows_read), document_format, to.tokenizer, lambda: documents(None)
    ):
        totals.rows_read += batch.rows
        totals.noted = dict(noted_before + Counter(batch.notes))
        totals.skip(EMPTY, batch.rows - len(batch.documents))

        for (split, text), ids in zip(batch.documents, encoded, strict=True):
            if isinstance(ids, str):
                totals.skip(ids)
                first_unusable = first_unusable or text
                continue

            # Once there is enough to train on, only held-out documents are needed.
            if split == "train" and shards.tokens("train") >= to.token_limit:
                whole = False
                if shards.tokens("val"):
                    break
                continue

            shards.add(split, ids)
            shards.end_document(split)
            content = text.encode()
            totals.add_content(content)
            totals.documents[split] += 1
            totals.text_bytes[split] += len(content)
            unsaved_tokens += len(ids)
            to.progress.advance(len(ids), len(content))
        else:
            # The journal does not record `whole`, so it is not written once that is false.
            if whole and batch.position is not None and unsaved_tokens >= JOURNAL_TOKENS:
                shards.save(batch.position)
                unsaved_tokens = 0
            continue

        # The limit is reached and a document is held out: stop reading.
        break

    _refuse_unusable(to.name, shards, document_format, first_unusable)
    notes = [f"{count:,} {note}" for note, count in sorted(totals.noted.items())]
    return _finished(to) | {"whole": whole, "made_from": stream.made_from, "notes": notes}


def _batches(split: Iterable[tuple[Split, str]], stream: DocumentStream, first_row: int) -> Iterator[_Batch]:
    documents: list[tuple[Split, str]] = []
    places: list[int] = []
    rows = characters = 0

    for side, text in split:
        rows += 1
        characters += len(text)
        if text:
            documents.append((side, text))
            places.append(first_row + rows - 1)

        if rows == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            # splitting reads two documents ahead at the start
            yield _Batch(documents, places, rows, stream.position() if rows > 1 or first_row else None)
            first_row += rows
            documents, places, rows, characters = [], [], 0, 0

    yield _Batch(documents, places, rows, None)


def _encoded(
    batches: Iterable[_Batch],
    document_format: DocumentFormat,
    tokenizer: Tokenizer,
    reopen: Callable[[], DocumentStream],
) -> Iterator[tuple[_Batch, Sequence[Ids | str]]]:
    """Each batch with its ids; while one is consumed, the next is read and encoded.

    Raises DataError for documents that must not be left out, with their places: `reopen` gives all from the first.
    """
    encode = document_format.encode(tokenizer)
    encoding: tuple[_Batch, Future[Sequence[Ids | str]]] | None = None

    def finished(batch: _Batch, future: Future[Sequence[Ids | str]]) -> tuple[_Batch, Sequence[Ids | str]]:
        try:
            encoded = result_of(future)
            batch.notes = dict(document_format.notes())
            return batch, encoded
        except UnusableDocuments as error:
            raise DataError(_told_with_places(error, batch, reopen())) from None

    for batch in batches:
        encoded = None if encoding is None else finished(*encoding)
        encoding = batch, in_background(partial(encode, [text for _, text in batch.documents]))
        if encoded is not None:
            yield encoded
    if encoding is not None:
        yield finished(*encoding)


def _told_with_places(error: UnusableDocuments, batch: _Batch, stream: DocumentStream) -> list[str]:
    """The first of the problems with files and rows, and how many more there are."""
    first = list(error.problems)[:NAMED_PROBLEMS]
    where = stream.find([batch.places[number] for number in first])
    more = len(error.problems) - len(first)
    among = f"and {more:,} more among these {len(batch.documents):,}; " if more else ""
    named = zip(where, first, strict=True)
    return [*(f"{place}: {error.problems[number]}" for place, number in named), f"{among}{error.way_out}"]


def _refuse_unusable(name: str, shards: ShardsInProgress, document_format: DocumentFormat, first: str) -> None:
    """Raise DataError if no document of many can be used, with the first as it was read, and what is expected."""
    totals = shards.totals
    if not totals.rows_read or any(totals.documents.values()):
        return
    shown = f" The first one as it was read: {first[:SHOWN_CHARACTERS]}" if first else ""
    shown += "..." if len(first) > SHOWN_CHARACTERS else ""
    raise DataError(
        f"source {name!r}: none of the {totals.rows_read:,} documents can be used ({tell_skipped(totals.skipped)})."
        f"{shown} Expected: {document_format.expected}."
    )


def _finished(to: Destination) -> dict[str, Any]:
    """The content of the manifest. Raises DataError if one of the two splits would be empty."""
    shards = to.shards
    if empty := [split for split in SPLITS if not shards.tokens(split)]:
        skipped = tell_skipped(shards.totals.skipped)
        raise DataError(
            f"source {to.name!r}: nothing is left for {' and '.join(empty)}"
            f"{f' (skipped: {skipped})' if skipped else ''}; it needs more text, or another --set "
            f"data.val_fraction=... than {to.data.val_fraction}."
        )

    totals = shards.totals
    return {
        "documents": totals.documents,
        "bytes": totals.text_bytes,
        "skipped": totals.skipped,
        "content_sha256": totals.content_sha256,
        "shards": shards.finish(),
    }


def write_token_files(to: Destination, files: Sequence[Path], file_dtype: np.dtype) -> dict[str, Any]:
    """Copy ready-made token files into shards; returns what the manifest says.

    The documents that begin in the last `val_fraction` are held out; if none begins there, the tokens themselves.
    Padding at the end of a file is cut off and counted.

    Raises:
        DataError: as in `TokenFiles`, or the held-out part is mostly not text.
    """
    shards, tokenizer = to.shards, to.tokenizer
    ids = TokenFiles(files, file_dtype, tokenizer)
    if ids.padding:
        shards.totals.skipped[PADDING] = ids.padding

    border = ids.held_out_border(to.data.val_fraction)
    train_tokens = int(min(border, to.token_limit))

    # Copying goes on where the journal stands.
    begin = shards.position["token"] if shards.position else 0
    ids.long_run = shards.position.get("long_run") if shards.position else None
    unsaved_tokens = 0

    for block in ids.blocks(begin):
        shards.totals.add_content(block.tobytes())

        parts: dict[Split, np.ndarray] = {
            "train": block[: max(train_tokens - begin, 0)],
            "val": block[max(border - begin, 0) :],
        }
        for split, part in parts.items():
            if len(part):
                shards.add(split, part)
                shards.end_document(split)

        begin += len(block)
        unsaved_tokens += len(block)
        to.progress.advance(len(block), block.nbytes)
        if unsaved_tokens >= JOURNAL_TOKENS:
            shards.save({"token": begin, "long_run": ids.long_run})
            unsaved_tokens = 0

    written = _finished(to)

    # The bytes of the held-out text turn a loss per token into one per byte.
    paths = [shards.folder / shard["file"] for shard in written["shards"]["val"]]
    held_out = np.concatenate([np.fromfile(path, id_dtype(tokenizer.vocab_size)) for path in paths])
    val_bytes = len(decode_documents(tokenizer, held_out).encode())

    # A loss on control tokens would say nothing about text.
    of_no_text = int(np.isin(held_out, sorted(ids.no_text)).sum())
    if not val_bytes or 2 * of_no_text > len(held_out):
        raise DataError(
            f"source {to.name!r}: of its end, the {len(held_out):,} ids that are held out, {of_no_text:,} are no text "
            f"but control tokens, the last one id {held_out[-1]}: cut them off, or hold out more with --set "
            "data.val_fraction=..."
        )

    notes = [ids.long_run] if ids.long_run else []
    unknown = {"documents": None, "bytes": {"train": None, "val": val_bytes}}
    return written | unknown | {"whole": train_tokens == border, "made_from": None, "notes": notes}


def decode_documents(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of whole documents, one after the other, without their EOS tokens."""
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return "".join(tokenizer.decode(document.tolist(), skip_special=True) for document in np.split(ids, ends))
