"""The shards of a source while they are written, and the journal from which writing goes on after a kill.

    add, end_document --> train-00000.bin.part, val-00000.bin.part; the next one begins beyond SHARD_TOKENS
    save              --> the parts synchronised, then journal.json: the source's position, and the parts' content
    finish            --> every part gets its name; the caller writes the manifest, then removes the journal

Opening cuts the open parts back to the journal's sizes and hashes them again, which removes what a kill left half
written. If the journal belongs to another recipe, tokenizer, limit or source, or its parts are gone or changed, the
source starts from its beginning. The hash of the content is a chain over documents: a running sha256 cannot be stored.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ds_slm.errors import DataError
from ds_slm.files import is_plain_name, read_json, sha256_of, write_json, write_point

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

SHARD_TOKENS = 1 << 28
"""A shard ends with the document that takes it over this: half a GiB or one GiB."""
JOURNAL = "journal.json"
PART = ".part"


def id_dtype(vocab_size: int) -> np.dtype:
    """The little-endian type of a shard's ids: uint16 if every id fits, else uint32."""
    if vocab_size > 1 << 32:
        raise DataError(f"a vocabulary of {vocab_size} ids does not fit into uint32: use a smaller one.")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass
class Totals:
    """Counts of what a source has given so far: the part of the journal that the manifest repeats."""

    documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason for leaving documents out -> their number."""
    noted: dict[str, int] = field(default_factory=dict)
    """A note on how documents were read -> the number of parts that were read in this way."""
    rows_read: int = 0
    """Documents the source has given, including the ones left out."""
    content_sha256: str = ""

    def skip(self, reason: str, documents: int = 1) -> None:
        """Count documents that are left out."""
        if documents:
            self.skipped[reason] = self.skipped.get(reason, 0) + documents

    def add_content(self, content: bytes) -> None:
        """Add one more document, or block of ids, to the chain of hashes."""
        self.content_sha256 = hashlib.sha256(bytes.fromhex(self.content_sha256) + content).hexdigest()


def tell_skipped(skipped: Mapping[str, int]) -> str:
    """Counts of documents left out, each with its reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


class _Part:
    """The open shard of a split."""

    def __init__(self, path: Path, dtype: np.dtype, tokens: int = 0) -> None:
        """Go on after the first `tokens` ids of the part. Raises OSError or EOFError if they are not there."""
        self.path, self.tokens, self._dtype = path, tokens, dtype
        self._sha256 = hashlib.sha256()
        flags = os.O_RDWR | os.O_NOFOLLOW | (0 if tokens else os.O_CREAT | os.O_TRUNC)
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o666), "r+b")
        left = tokens * dtype.itemsize
        while left:
            block = self._file.read(min(left, 1 << 24))
            if not block:
                raise EOFError(path)
            self._sha256.update(block)
            left -= len(block)
        self._file.truncate(tokens * dtype.itemsize)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        block = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(block)
        self._sha256.update(block)
        self.tokens += len(ids)

    def sync(self) -> None:
        self._file.flush()
        write_point("syncing", self.path)
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def close(self) -> dict[str, Any]:
        self.sync()
        self._file.close()
        size_bytes = self.tokens * self._dtype.itemsize
        name = self.path.name.removesuffix(PART)
        return {"file": name, "tokens": self.tokens, "bytes": size_bytes, "sha256": self.sha256}

    def abandon(self) -> None:
        self._file.close()


class ShardsInProgress:
    """Both splits' shards of one source."""

    def __init__(self, folder: Path, dtype: np.dtype, key: Mapping[str, Any]) -> None:
        """Open the folder, going on from its journal if that was written under the same key.

        Args:
            folder: the source's folder; made if it is missing.
            dtype: the type of the ids.
            key: plain data that must be equal for going on: recipe, tokenizer, files.
        """
        self.folder, self._dtype, self._key = folder, dtype, dict(key)
        folder.mkdir(parents=True, exist_ok=True)
        self.totals = Totals()
        self.position: dict[str, Any] | None = None
        """The position where the source goes on; None at its beginning."""
        self._closed: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._parts: dict[Split, _Part] = {}
        if not self._resumed():
            self._clear()

    def tokens(self, split: Split) -> int:
        """Ids written to a split."""
        part = self._parts.get(split)
        return sum(shard["tokens"] for shard in self._closed[split]) + (part.tokens if part else 0)

    def add(self, split: Split, ids: Sequence[int] | np.ndarray) -> None:
        """Append ids to a split."""
        if split not in self._parts:
            self._parts[split] = _Part(self._path(split, len(self._closed[split])), self._dtype)
        self._parts[split].add(ids)

    def end_document(self, split: Split) -> None:
        """Mark a place where the split's shard may end."""
        if split in self._parts and self._parts[split].tokens >= SHARD_TOKENS:
            self._closed[split].append(self._parts.pop(split).close())

    def save(self, position: Mapping[str, Any]) -> None:
        """Make everything so far durable; after a kill, writing goes on from here."""
        for part in self._parts.values():
            part.sync()

        self.position = dict(position)
        journal = {
            "key": self._key,
            "position": self.position,
            "totals": asdict(self.totals),
            "closed": self._closed,
            "open": {split: [part.tokens, part.sha256] for split, part in self._parts.items()},
        }
        write_json(self.folder / JOURNAL, journal)

    def finish(self) -> dict[Split, list[dict[str, Any]]]:
        """Give every shard its name; returns their entries in the manifest."""
        write_point("finishing", self.folder)
        for split in list(self._parts):
            self._closed[split].append(self._parts.pop(split).close())
        for shards in self._closed.values():
            for shard in shards:
                (self.folder / (shard["file"] + PART)).rename(self.folder / shard["file"])
        return self._closed

    def abandon(self) -> None:
        """Leave what the journal needs to go on; without a journal, leave nothing."""
        for part in self._parts.values():
            part.abandon()
        if not (self.folder / JOURNAL).exists():
            self._clear()

    def _path(self, split: Split, number: int) -> Path:
        return self.folder / f"{split}-{number:05d}.bin{PART}"

    def _clear(self) -> None:
        for path in (*self.folder.glob("*.bin"), *self.folder.glob(f"*.bin{PART}"), self.folder / JOURNAL):
            path.unlink(missing_ok=True)

    def _resumed(self) -> bool:
        try:
            journal = read_json(self.folder / JOURNAL)
            if journal is None or journal["key"] != self._key:
                return False
            if not all(is_plain_name(shard["file"]) for shards in journal["closed"].values() for shard in shards):
                return False
            totals, position = Totals(**journal["totals"]), dict(journal["position"])

            for named in self.folder.glob("*.bin"):  # the kill came while shards were getting their names
                named.rename(named.with_name(named.name + PART))

            # A closed shard must still have the content it was closed with.
            for shard in (shard for shards in journal["closed"].values() for shard in shards):
                if sha256_of(self.folder / (shard["file"] + PART)) != shard["sha256"]:
                    return False

            # Opening a part cuts it back to what the journal says.
            parts = {
                split: _Part(self._path(split, len(journal["closed"][split])), self._dtype, tokens)
                for split, (tokens, _) in journal["open"].items()
            }
            if any(parts[split].sha256 != sha256 for split, (_, sha256) in journal["open"].items()):
                return False
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
            return False

        # Change this object only once the whole journal has proved right.
        self._parts, self._closed, self.totals, self.position = parts, journal["closed"], totals, position
        return True
