"""From documents, or ready-made ids, to the shards of one source.

    documents --split_documents--> batches --encoded, one batch ahead--> train or val, an EOS after each document
    .bin files, padding cut off ----------blocks-----------------------> the same, the end held out

Reading and writing run beside the encoding of the next batch, which uses all cores. Batches end at the same documents
after a resumption as without one, so the bytes are the same.

Known gap: the training text's bytes stay unknown for ready-made token files, for only their held-out part is decoded.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.background import in_background, result_of
from ds_slm.data.corpus import DocumentStream
from ds_slm.data.embedded import embedded_documents
from ds_slm.data.journal import SPLITS, ShardsInProgress, Split, id_dtype, tell_skipped
from ds_slm.data.progress import Progress
from ds_slm.data.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Data

BATCH_DOCUMENTS = 4_096
BATCH_CHARACTERS = 4_000_000
COPY_TOKENS = 1 << 24
"""Ids of a ready-made token file copied at a time."""
JOURNAL_TOKENS = 1 << 25
"""A kill costs at most this much work and a batch."""
WIDE_IDS = 32
"""So many ids of which each is followed by a 0 are ids of twice their width."""
PADDING_IDS = 64
"""More than so many equal ids at a file's end, of 0, EOS or the padding token, are no text."""
PADDING = "ids of padding at the end of a file"
NUMPY = b"\x93NUMPY"
DRAWS = 1 << 20
"""Rows whose draws are held at a time."""
EMPTY = "empty or unreadable"
SHOWN_CHARACTERS = 400
"""Of a document, in a message."""


Ids = Sequence[int] | np.ndarray
Encode = Callable[[list[str]], Sequence[Ids | str]]
"""Documents to the ids that are written for each, or to the reason why one is left out."""


def encode_text(tokenizer: Tokenizer) -> Encode:
    """Text to its ids with an EOS behind them."""
    return lambda texts: [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


@dataclass(frozen=True)
class Form:
    """What a source's documents are, and how they become what is written. By default text, and its ids."""

    encode: Callable[[Tokenizer], Encode] = encode_text
    embedded: Callable[[], Sequence[str]] = embedded_documents
    """The documents of an embedded source."""
    as_json: bool = False
    """Whether documents are lists or tables, as JSON, rather than text."""
    row_limit: int | None = None
    """Documents to read of each source at most."""
    expected: str = "text in the column that data.source.column names"
    """What a document must be, for those who have another kind."""
    notes: Callable[[], Sequence[str]] = tuple
    """What a user should know of how the documents were read, once they are encoded."""
    dtype: np.dtype | None = None
    """Of what is written; None: that of the tokenizer's ids."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides the encoding, beside the recipe's data and tokenizer."""


TEXT = Form()


def split_of(text: str, row: int, data: Data) -> Split:
    """Where a document belongs.

    hash: by a hash of its text, keyed with the seed, against the fraction that is held out. draw: by the draw of its
    row, one from numpy's legacy generator for each.
    """
    if data.held_out == "draw":
        held_out = _draws(data.split_seed, row // DRAWS)[row % DRAWS] < data.val_fraction
    else:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(data.split_seed).encode()).digest()
        held_out = int.from_bytes(digest, "little") < data.val_fraction * 2**64
    return "val" if held_out else "train"


@lru_cache(maxsize=2)
def _draws(seed: int, block: int) -> np.ndarray:
    generator = np.random.RandomState(seed)
    for _ in range(block):
        generator.rand(DRAWS)
    return generator.rand(DRAWS)


def split_documents(
    texts: Iterable[str], data: Data, first_row: int = 0, cut_single: bool = True
) -> Iterator[tuple[Split, str]]:
    """Each document with its split, empty ones included; a source of one single document is cut in two.

    Args:
        texts: the documents from `first_row` on.
        data: how to split.
        first_row: a source that is read from another row on is known to hold more than one document.
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
    """Those that are not empty."""
    rows: int
    """All that were read."""
    position: dict[str, Any] | None
    """Where the source goes on behind it; None where a document more was already read, or the source is at its end."""


def write_documents(
    name: str,
    shards: ShardsInProgress,
    documents: Callable[[dict[str, Any] | None], DocumentStream],
    tokenizer: Tokenizer,
    data: Data,
    token_limit: float,
    progress: Progress,
    form: Form = TEXT,
) -> dict[str, Any]:
    """Write documents as ids into training and validation shards; returns what the manifest says about them.

    Empty documents are counted and skipped. Reading stops when there are `token_limit` training tokens and at least one
    held-out document.

    Args:
        name: the source's, for errors.
        shards: where to write; goes on from its position.
        documents: opens the source at a position.
        tokenizer: whose ids are written.
        data: how to split.
        token_limit: training tokens to stop at.
        progress: told of every document.
        form: what the documents are, and how they are encoded.
    """
    whole = True
    unsaved_tokens = 0
    first_unusable = ""
    totals = shards.totals
    stream = documents(shards.position)
    texts = iter(stream) if form.row_limit is None else islice(stream, form.row_limit - totals.rows_read)
    split = split_documents(texts, data, totals.rows_read, cut_single=not form.as_json)
    for batch, encoded in _encoded(_batches(split, stream, totals.rows_read), form.encode(tokenizer)):
        totals.rows_read += batch.rows
        totals.skip(EMPTY, batch.rows - len(batch.documents))
        for (split, text), ids in zip(batch.documents, encoded, strict=True):
            if isinstance(ids, str):
                totals.skip(ids)
                first_unusable = first_unusable or text
                continue
            if split == "train" and shards.tokens("train") >= token_limit:
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
            progress.advance(len(ids), len(content))
        else:
            if whole and batch.position is not None and unsaved_tokens >= JOURNAL_TOKENS:
                shards.save(batch.position)
                unsaved_tokens = 0
            continue
        break
    _refuse_unusable(name, shards, form, first_unusable)
    notes = list(form.notes())
    return _finished(name, shards, data) | {"whole": whole, "made_from": stream.made_from, "notes": notes}


def _batches(split: Iterable[tuple[Split, str]], stream: DocumentStream, first_row: int) -> Iterator[_Batch]:
    documents: list[tuple[Split, str]] = []
    rows = characters = 0
    for side, text in split:
        rows += 1
        characters += len(text)
        if text:
            documents.append((side, text))
        if rows == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            # splitting reads two documents ahead at the start
            yield _Batch(documents, rows, stream.position() if rows > 1 or first_row else None)
            first_row += rows
            documents, rows, characters = [], 0, 0
    yield _Batch(documents, rows, None)


def _encoded(batches: Iterable[_Batch], encode: Encode) -> Iterator[tuple[_Batch, Sequence[Ids | str]]]:
    """Each batch with its ids; while one is consumed, the next is read and encoded."""
    encoding: tuple[_Batch, Future[Sequence[Ids | str]]] | None = None
    for batch in batches:
        encoded = None if encoding is None else (encoding[0], result_of(encoding[1]))
        encoding = batch, in_background(partial(encode, [text for _, text in batch.documents]))
        if encoded is not None:
            yield encoded
    if encoding is not None:
        yield encoding[0], result_of(encoding[1])


def _refuse_unusable(name: str, shards: ShardsInProgress, form: Form, first: str) -> None:
    """Raises DataError where no document of many can be used: with the first as it was read, and what is expected."""
    totals = shards.totals
    if not totals.rows_read or any(totals.documents.values()):
        return
    shown = f" The first one as it was read: {first[:SHOWN_CHARACTERS]}" if first else ""
    shown += "..." if len(first) > SHOWN_CHARACTERS else ""
    raise DataError(
        f"source {name!r}: none of the {totals.rows_read:,} documents can be used ({tell_skipped(totals.skipped)})."
        f"{shown} Expected: {form.expected}."
    )


def _finished(name: str, shards: ShardsInProgress, data: Data) -> dict[str, Any]:
    """What the manifest says. Raises DataError where one of the two splits would be empty."""
    if empty := [split for split in SPLITS if not shards.tokens(split)]:
        skipped = tell_skipped(shards.totals.skipped)
        raise DataError(
            f"source {name!r}: nothing is left for {' and '.join(empty)}"
            f"{f' (skipped: {skipped})' if skipped else ''}; it needs more text, or another --set "
            f"data.val_fraction=... than {data.val_fraction}."
        )
    totals = shards.totals
    return {
        "documents": totals.documents,
        "bytes": totals.text_bytes,
        "skipped": totals.skipped,
        "content_sha256": totals.content_sha256,
        "shards": shards.finish(),
    }


def write_token_files(
    name: str,
    shards: ShardsInProgress,
    files: Sequence[Path],
    file_dtype: np.dtype,
    tokenizer: Tokenizer,
    data: Data,
    token_limit: float,
    progress: Progress,
) -> dict[str, Any]:
    """Copy ready-made token files into shards; returns what the manifest says.

    Held out are the documents that begin in the last `val_fraction`; without a document's border there, those tokens.
    Padding at the end of a file is cut off and counted.

    Raises:
        DataError: for a file that is no whole number of ids, holds nothing but padding or an id beyond the vocabulary,
            or looks as if its ids were wider than `file_dtype`; for a held-out part without text.
    """
    ids = _TokenFiles(files, file_dtype, tokenizer)
    if ids.padding:
        shards.totals.skipped[PADDING] = ids.padding
    border = ids.held_out_border(data.val_fraction)
    train_tokens = int(min(border, token_limit))
    begin = shards.position["token"] if shards.position else 0
    unsaved_tokens = 0
    for block in ids.blocks(begin):
        shards.totals.add_content(block.tobytes())
        parts: dict[Split, np.ndarray] = {
            "train": block[: max(train_tokens - begin, 0)],
            "val": block[max(border - begin, 0) :],
        }
        for split, ids in parts.items():
            if len(ids):
                shards.add(split, ids)
                shards.end_document(split)
        begin += len(block)
        unsaved_tokens += len(block)
        progress.advance(len(block), block.nbytes)
        if unsaved_tokens >= JOURNAL_TOKENS:
            shards.save({"token": begin})
            unsaved_tokens = 0
    written = _finished(name, shards, data)
    paths = [shards.folder / shard["file"] for shard in written["shards"]["val"]]
    held_out = np.concatenate([np.fromfile(path, id_dtype(tokenizer.vocab_size)) for path in paths])
    val_bytes = len(decode_documents(tokenizer, held_out).encode())
    if not val_bytes or np.isin(held_out, (tokenizer.eos_id, tokenizer.pad_id)).all():
        raise DataError(
            f"source {name!r}: its end, the {len(held_out):,} ids that are held out, is no text, only control tokens "
            f"such as id {held_out[-1]}: cut them off, or hold out more with --set data.val_fraction=..."
        )
    unknown = {"documents": None, "bytes": {"train": None, "val": val_bytes}}
    return written | unknown | {"whole": train_tokens == border, "made_from": None}


class _TokenFiles:
    """The ids of several raw files, one after the other."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype, tokenizer: Tokenizer) -> None:
        self._files, self._dtype, self._tokenizer = files, dtype, tokenizer
        self._counts = [path.stat().st_size // dtype.itemsize for path in files]
        problems = [
            f"{path} has {path.stat().st_size} bytes, no whole number of {8 * dtype.itemsize}-bit ids: it was cut "
            "short, or is of another type (data.source.dtype); get an intact copy."
            for path in files
            if path.stat().st_size % dtype.itemsize
        ]
        problems += [
            f"{path} is a file of numpy's own format: write its ids alone, with array.tofile(...)."
            for path in files
            if _begins_with(path, NUMPY)
        ]
        if problems:
            raise DataError(problems)

        paddings = [self._padding_of(path, count) for path, count in zip(files, self._counts, strict=True)]
        self.padding = sum(paddings)
        """Ids that are cut off at the ends of the files."""
        self._counts = [count - padding for count, padding in zip(self._counts, paddings, strict=True)]
        problems = [
            f"{path} holds nothing but one id that is no text: get an intact copy."
            for path, count, padding in zip(files, self._counts, paddings, strict=True)
            if padding and count <= 1
        ]
        if problems:
            raise DataError(problems)

    def _padding_of(self, path: Path, count: int) -> int:
        """Ids at a file's end that are padding; an EOS, which ends the last document, is left."""
        run, last = 0, None
        while run < count:
            begin = max(count - run - COPY_TOKENS, 0)
            block = np.fromfile(path, self._dtype, count=count - run - begin, offset=begin * self._dtype.itemsize)
            last = block[-1] if last is None else last
            others = np.flatnonzero(block != last)
            run += len(block) - (int(others[-1]) + 1 if len(others) else 0)
            if len(others):
                break
        fillers = (0, self._tokenizer.eos_id, self._tokenizer.pad_id)
        if run <= PADDING_IDS or last not in fillers:
            return 0
        return run - int(last == self._tokenizer.eos_id)

    def held_out_border(self, val_fraction: float) -> int:
        """The position at which held-out tokens begin: behind the first EOS of the last `val_fraction`."""
        begin = nominal = int(sum(self._counts) * (1 - val_fraction))
        for block in self.blocks(nominal):
            ends = np.flatnonzero(block == self._tokenizer.eos_id)
            if len(ends):
                border = begin + int(ends[0]) + 1
                return nominal if border == sum(self._counts) else border
            begin += len(block)
        return nominal

    def blocks(self, begin: int) -> Iterator[np.ndarray]:
        """The ids from a position on, in blocks of at most COPY_TOKENS."""
        file_begin = 0
        for path, count in zip(self._files, self._counts, strict=True):
            place = max(begin - file_begin, 0)
            while place < count:
                offset = place * self._dtype.itemsize
                block = np.fromfile(path, self._dtype, count=min(COPY_TOKENS, count - place), offset=offset)
                self._refuse_strange(path, block, place)
                yield block
                place += len(block)
            file_begin += count

    def _refuse_strange(self, path: Path, block: np.ndarray, place: int) -> None:
        vocab_size, beyond = self._tokenizer.vocab_size, int(block.argmax())
        if block[beyond] >= vocab_size:
            raise DataError(
                f"{path} holds id {block[beyond]} at position {place + beyond}, beyond the vocabulary of {vocab_size}: "
                "it was made with another tokenizer (name that one in the recipe) or is of another type "
                "(data.source.dtype)."
            )
        own, between = block[place % 2 :: 2], block[1 - place % 2 :: 2]
        if not between.any() and np.count_nonzero(own) >= WIDE_IDS:
            bits = 8 * self._dtype.itemsize
            way_out = "set data.source.dtype = 'uint32'" if bits == 16 else "write them anew as uint16 or uint32"
            raise DataError(f"{path}: every other {bits}-bit id is 0, as in a file of {2 * bits}-bit ones: {way_out}.")


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def decode_documents(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of whole documents, one after the other, without their EOS tokens."""
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return "".join(tokenizer.decode(document.tolist(), skip_special=True) for document in np.split(ids, ends))
