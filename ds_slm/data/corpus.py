"""Document sources: the embedded corpus, local files, datasets on the hub.

    Source (+ a local replacement) --locate--> Place --documents--> one str per document

An empty or null document, or one that is no valid Unicode, comes out as "": whoever consumes them counts and skips it.
Ready-made token files hold no documents; `ds_slm.data.shards` copies them.

Known gaps: .jsonl.zst is not read; a stream from the hub that breaks is not taken up again; a .txt file is read whole.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ds_slm.data.embedded import embedded_documents
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Source

TOKENS_SUFFIX = ".bin"


@dataclass(frozen=True)
class Place:
    """Where a source is really read from."""

    kind: Literal["embedded", "hub", "text", "tokens"]
    files: tuple[Path, ...] = ()
    """Local files, in the order they are read."""

    def text_bytes(self) -> int | None:
        """Bytes of the text, about; None where nobody knows before reading it."""
        plain = all(path.suffix not in (".gz", ".zst", ".parquet") for path in self.files)
        return sum(path.stat().st_size for path in self.files) if self.files and plain else None

    def file_sizes(self) -> list[list[str | int]]:
        """Name and bytes of every local file: tells without reading them whether they are the same ones."""
        return [[path.name, path.stat().st_size] for path in self.files]


def locate(source: Source, replacement: Path | None = None) -> Place:
    """Where to read a source: the replacement if there is one, else what the recipe says.

    Raises:
        DataError: for a path that does not exist or holds no file of a known kind.
    """
    if replacement is None and source.kind in ("embedded", "hub"):
        return Place(source.kind)
    root = replacement or (Path(source.path) if source.path else _downloaded_tokens(source))
    if not root.exists():
        raise DataError(f"source {source.name!r}: {root} does not exist; {_way_out(source)}.")
    candidates = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    text = tuple(path for path in candidates if path.name.endswith(tuple(_READERS)))
    tokens = tuple(path for path in candidates if path.name.endswith(TOKENS_SUFFIX))
    if not text and not tokens:
        known = ", ".join([*_READERS, TOKENS_SUFFIX])
        raise DataError(f"source {source.name!r}: {root} holds no file of a known kind ({known}); {_way_out(source)}.")
    return Place("tokens", tokens) if tokens and not text else Place("text", text)


class DocumentStream:
    """The documents of a source from a position on."""

    def __init__(self, texts: Iterator[str], read: int) -> None:
        """`texts` begins behind `read` documents."""
        self._texts, self._read = texts, read

    def __iter__(self) -> Iterator[str]:
        """The documents."""
        for text in self._texts:
            self._read += 1
            yield text

    def position(self) -> dict[str, Any]:
        """Where the next document begins."""
        return {"documents": self._read}


def documents(
    source: Source, replacement: Path | None = None, position: dict[str, Any] | None = None
) -> DocumentStream:
    """The documents of a source, from a position on."""
    read = position["documents"] if position else 0
    return DocumentStream(islice(_documents(source, replacement), read, None), read)


def _documents(source: Source, replacement: Path | None = None) -> Iterator[str]:
    """The documents of a source, in a fixed order; "" for one that is empty.

    Raises:
        DataError: for a missing or unreadable file, a missing column (with the columns there are), a silent hub.
    """
    place = locate(source, replacement)
    if place.kind == "tokens":
        raise DataError(
            f"source {source.name!r} holds token ids, no text to train a tokenizer on: set tokenizer.kind to the one "
            "that made them, 'hf' or 'cl100k'."
        )
    if place.kind == "embedded":
        yield from embedded_documents()
    elif place.kind == "hub":
        yield from map(_text, _hub_values(source))
    for path in place.files:
        reader = next(reader for suffix, reader in _READERS.items() if path.name.endswith(suffix))
        with _readable(path):
            yield from map(_text, reader(path, source.column))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return ""
    return value


def _way_out(source: Source) -> str:
    return f"name a local file or folder with --source {source.name}=PATH"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns every way in which a file can be damaged into one error that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: Unicode, JSON and Arrow's own
        raise DataError(f"{path} cannot be read ({error}): replace the file or leave it out.") from error


def _txt_values(path: Path, column: str) -> Iterator[str]:
    yield path.read_bytes().decode()


def _jsonl_values(path: Path, column: str) -> Iterator[Any]:
    with path.open("rb") as lines:
        yield from _json_values(lines, path, column)


def _gzip_values(path: Path, column: str) -> Iterator[Any]:
    with gzip.open(path, "rb") as lines:
        yield from _json_values(lines, path, column)


def _json_values(lines: Iterable[bytes], path: Path, column: str) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or column not in row:
            raise DataError(_no_column(f"{path}, line {number}", column, row if isinstance(row, dict) else ()))
        yield row[column]


def _parquet_values(path: Path, column: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        if column not in table.schema_arrow.names:
            raise DataError(_no_column(str(path), column, table.schema_arrow.names))
        for batch in table.iter_batches(columns=[column], batch_size=1024):
            yield from batch.column(0).to_pylist()


def _no_column(place: str, column: str, columns: Iterable[str]) -> str:
    names = ", ".join(repr(name) for name in columns) or "none"
    return f"{place}: no column {column!r}; the columns there are: {names}. Set data.source.column to one of them."


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _txt_values,
    ".jsonl": _jsonl_values,
    ".jsonl.gz": _gzip_values,
    ".parquet": _parquet_values,
}


def _hub_values(source: Source) -> Iterator[Any]:
    from datasets import load_dataset

    with _reachable(source):
        rows = load_dataset(str(source.id), source.config, split=source.split, streaming=True)
        if rows.column_names and source.column not in rows.column_names:
            raise DataError(_no_column(f"source {source.name!r} ({source.id})", source.column, rows.column_names))
        for row in rows.select_columns([source.column]):
            yield row[source.column]


def _downloaded_tokens(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    with _reachable(source):
        return Path(snapshot_download(str(source.id), repo_type="dataset", allow_patterns=f"*{TOKENS_SUFFIX}"))


@contextmanager
def _reachable(source: Source) -> Iterator[None]:
    """One error for the many kinds that the hub's libraries raise, with what to do without a hub."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"source {source.name!r}: the hub gave no {source.id!r} ({reason}); to do without it, {_way_out(source)}."
        ) from error
