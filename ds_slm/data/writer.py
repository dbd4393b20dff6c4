"""Writing token shards: documents or ready-made ids in, flat files out, each whole or absent.

    documents --split_documents--> (split, text) --write_documents--> ShardWriter x 2 --> what the manifest says of them
    .bin files ----------------------write_token_files-------------> ShardWriter x 2 --> the same

A shard is written under a temporary name, synchronised, then renamed; its temporary file is removed where writing
fails, and overwritten where the process was killed.

Known gaps: one shard per split; the training text's bytes stay unknown for ready-made token files, for only their
held-out part is decoded.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ds_slm.data.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Data

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

BATCH_DOCUMENTS = 4_096
BATCH_CHARACTERS = 4_000_000
COPY_TOKENS = 16_000_000
"""Ids of a ready-made token file copied at a time."""
REPORT_EVERY_S = 10.0


def id_dtype(vocab_size: int) -> np.dtype:
    """The little-endian type of a shard's ids: uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_held_out(text: str, data: Data) -> bool:
    """Whether a document is for validation: a hash of its text, keyed with the seed, against the fraction."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(data.split_seed).encode()).digest()
    return int.from_bytes(digest, "little") < data.val_fraction * 2**64


def split_documents(texts: Iterable[str], data: Data) -> Iterator[tuple[Split, str]]:
    """Each document with its split; a source of one single document is cut in two, its end held out."""
    remaining = iter(texts)
    first_two = list(islice(remaining, 2))
    if len(first_two) == 1:
        border = int(len(first_two[0]) * (1 - data.val_fraction))
        yield "train", first_two[0][:border]
        yield "val", first_two[0][border:]
        return
    for text in chain(first_two, remaining):
        yield "val" if is_held_out(text, data) else "train", text


class ShardWriter:
    """One shard being written; `close` makes it whole and visible."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Opens the temporary file next to `path`."""
        self.path = path
        self.tokens = 0
        self._dtype = id_dtype(vocab_size)
        self._sha256 = hashlib.sha256()
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append ids."""
        block = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(block)
        self._sha256.update(block)
        self.tokens += len(ids)

    def close(self) -> dict[str, Any]:
        """Synchronise and rename; returns the shard's entry in the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        size_bytes = self.tokens * self._dtype.itemsize
        return {"file": self.path.name, "tokens": self.tokens, "bytes": size_bytes, "sha256": self._sha256.hexdigest()}

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def _writers(folder: Path, vocab_size: int) -> Iterator[dict[Split, ShardWriter]]:
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(folder / f"{split}-00000.bin", vocab_size) for split in SPLITS
    }
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.discard()


def _close(writers: dict[Split, ShardWriter], name: str, data: Data) -> dict[str, Any]:
    """The shards' entries in the manifest. Raises DataError where one of the two would be empty."""
    empty = [split for split in SPLITS if not writers[split].tokens]
    if empty:
        raise DataError(
            f"source {name!r}: nothing is left for {' and '.join(empty)}; it needs more text, or another "
            f"data.val_fraction than {data.val_fraction}."
        )
    return {"shards": {split: [writers[split].close()] for split in SPLITS}}


def write_documents(
    name: str,
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    data: Data,
    token_limit: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Tokenise documents into a train and a validation shard; returns what the manifest says about them.

    Empty documents are counted and skipped. Reading stops when there are `token_limit` training tokens and at least one
    held-out document.
    """
    counts = {"documents": dict.fromkeys(SPLITS, 0), "bytes": dict.fromkeys(SPLITS, 0)}
    skipped_documents = 0
    content = hashlib.sha256()
    whole = True

    def present() -> Iterator[str]:
        nonlocal skipped_documents
        for text in texts:
            skipped_documents += not text
            if text:
                yield text

    with _writers(folder, tokenizer.vocab_size) as writers:
        for split, text, ids in _reported(_encoded(split_documents(present(), data), tokenizer), name, report):
            if split == "train" and writers["train"].tokens >= token_limit:
                whole = False
                if writers["val"].tokens:
                    break
                continue
            writers[split].add([*ids, tokenizer.eos_id])
            encoded = text.encode()
            content.update(len(encoded).to_bytes(8, "little") + encoded)
            counts["documents"][split] += 1
            counts["bytes"][split] += len(encoded)
        shards = _close(writers, name, data)
    hashes = {"content_sha256": content.hexdigest(), "whole": whole, "skipped_documents": skipped_documents}
    return counts | hashes | shards


def _encoded(texts: Iterable[tuple[Split, str]], tokenizer: Tokenizer) -> Iterator[tuple[Split, str, list[int]]]:
    for batch in _batches(texts):
        ids_of_batch = tokenizer.encode_batch([text for _, text in batch])
        for (split, text), ids in zip(batch, ids_of_batch, strict=True):
            yield split, text, ids


def _batches(texts: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch: list[tuple[Split, str]] = []
    characters = 0
    for split, text in texts:
        batch.append((split, text))
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _reported(
    encoded: Iterable[tuple[Split, str, list[int]]], name: str, report: Callable[[str], None]
) -> Iterator[tuple[Split, str, list[int]]]:
    begin_s = told_s = time.monotonic()
    characters = tokens = 0
    for split, text, ids in encoded:
        yield split, text, ids
        characters += len(text)
        tokens += len(ids) + 1
        now_s = time.monotonic()
        if now_s - told_s > REPORT_EVERY_S:
            told_s = now_s
            rate = tokens / (now_s - begin_s)
            report(f"{name}: {characters / 1e6:.0f} M characters, {tokens / 1e6:.1f} M tokens, {rate:,.0f} tokens/s")


def write_token_files(
    name: str, folder: Path, files: Sequence[Path], tokenizer: Tokenizer, data: Data, token_limit: float
) -> dict[str, Any]:
    """Copy ready-made token files into shards, the last `val_fraction` held out; returns what the manifest says.

    Raises:
        DataError: for a file that is no whole number of ids, or holds an id beyond the vocabulary.
    """
    total_tokens = _count_tokens(files, tokenizer)
    border = int(total_tokens * (1 - data.val_fraction))
    train_tokens = int(min(border, token_limit))
    content = hashlib.sha256()
    val_bytes = 0
    with _writers(folder, tokenizer.vocab_size) as writers:
        begin = 0
        for block in _token_blocks(files, tokenizer):
            content.update(block.tobytes())
            writers["train"].add(block[: max(train_tokens - begin, 0)])
            held_out = block[max(border - begin, 0) :]
            writers["val"].add(held_out)
            val_bytes += len(decode_documents(tokenizer, held_out).encode())
            begin += len(block)
        shards = _close(writers, name, data)
    counts = {"documents": None, "bytes": {"train": None, "val": val_bytes}, "skipped_documents": 0}
    return counts | {"content_sha256": content.hexdigest(), "whole": train_tokens == border} | shards


def _count_tokens(files: Sequence[Path], tokenizer: Tokenizer) -> int:
    item_bytes = id_dtype(tokenizer.vocab_size).itemsize
    problems = [
        f"{path} has {path.stat().st_size} bytes, no whole number of {8 * item_bytes}-bit ids: it was cut short, or "
        "is of another type; get an intact copy."
        for path in files
        if path.stat().st_size % item_bytes
    ]
    if problems:
        raise DataError(problems)
    return sum(path.stat().st_size for path in files) // item_bytes


def _token_blocks(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    dtype = id_dtype(tokenizer.vocab_size)
    for path in files:
        begin = 0
        while len(block := np.fromfile(path, dtype, count=COPY_TOKENS, offset=begin * dtype.itemsize)):
            beyond = int(block.argmax())
            if block[beyond] >= tokenizer.vocab_size:
                raise DataError(
                    f"{path} holds id {block[beyond]} at position {begin + beyond}, beyond the vocabulary of "
                    f"{tokenizer.vocab_size}: it was made with another tokenizer; name that one in the recipe."
                )
            yield block
            begin += len(block)


def decode_documents(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of whole documents, one after the other, without their EOS tokens."""
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return "".join(tokenizer.decode(document.tolist(), skip_special=True) for document in np.split(ids, ends))
