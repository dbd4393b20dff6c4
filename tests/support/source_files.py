"""Source files of every kind for the tests of data, written from a list of documents."""

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import xxhash

from ds_slm.recipe.data_sections import Source

ROWS_PER_GROUP = 4


def files_source(path: Path, column: str = "text", kind: str = "files") -> Source:
    """A source of local files."""
    return Source(name="made", kind=kind, path=str(path), column=column)  # type: ignore[arg-type]


def jsonl(texts: Sequence[str | None], column: str = "text") -> bytes:
    """A row for each text, with another column before it."""
    return b"".join(json.dumps({"id": place, column: text}).encode() + b"\n" for place, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    """One frame with a checksum, which pyarrow does not write: a bit in its header, 4 bytes behind it (RFC 8878)."""
    frame = bytearray(pyarrow.compress(content, "zstd", asbytes=True))
    frame[4] |= 1 << 2
    return bytes(frame) + struct.pack("<I", xxhash.xxh64_intdigest(content) & 0xFFFFFFFF)


def write_txt(path: Path, texts: Sequence[str]) -> None:
    """A folder of files where there is more than one text."""
    if len(texts) == 1:
        path.write_bytes(texts[0].encode())
        return
    for place, text in enumerate(texts):
        path.with_name(f"{path.stem}-{place:03}.txt").write_bytes(text.encode())


def write_parquet(path: Path, texts: Sequence[str | None], column: str = "text", **options: object) -> None:
    """Row groups of ROWS_PER_GROUP rows, pages with checksums; a number beside each text."""
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    options = {"row_group_size": ROWS_PER_GROUP, "write_page_checksum": True, **options}
    pyarrow.parquet.write_table(table, path, **options)


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    ".txt": write_txt,
    ".jsonl": lambda path, texts: path.write_bytes(jsonl(texts)) and None,
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))) and None,
    ".jsonl.zst": lambda path, texts: path.write_bytes(zstd(jsonl(texts))) and None,
    ".parquet": write_parquet,
}
"""How to write each kind of file that is read."""
