"""Files of text, local or remote, as documents, from any place in them.

    open binary file + column + mark --READERS[suffix]--> (document, the cursor after it), one after the other

A cursor is two whole numbers that say where a document begins; a reader started at a cursor gives what follows. `.txt`:
byte and piece. `.jsonl`: byte and line, counted in the unpacked text of `.gz` and `.zst`, which are unpacked from their
start. `.parquet`: row group and row in it; the groups before are not touched, and of the others only the one column.

.txt      one document; a file over WHOLE_TXT_BYTES gives pieces cut after a line end. UTF-8, or refused with the byte;
          a run of zeros, which a crash leaves where nothing was written, is refused.
.jsonl    one document a line; blank lines hold none. A line that is not a JSON object with the column, not UTF-8 or
          longer than LINE_BYTES is refused with its number.
.parquet  one document a row. A column of another type than strings is refused.

A byte order mark at the start of a file, of a line in it, or of a string in a column, is not part of the text; UTF-16
and UTF-32 are refused by name, and so is what a download left in a file's place (`stand_ins`). In a column
of lists or tables, binary that is UTF-8 is text; any other value that JSON lacks (a time, a decimal, binary) becomes a
table of its type and what it looks like, {"datetime": "2020-01-01 00:00:00"}, so that it is not mistaken for text.

A document that is null, not a string, or not valid Unicode (half a surrogate pair; damaged bytes in a parquet string)
is given as "": the consumer counts and skips it. Damage that a format can show (a checksum, a file cut short,
rows that are missing) is always an error.

Known gaps: text without checksums (.jsonl, .txt, most parquet files) can be damaged into other valid text; a .gz or
.zst file cut exactly between two of its members, and a .jsonl cut between two lines, look whole.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_slm.data.sources.stand_ins import HEAD_BYTES, stand_in
from ds_slm.errors import DataError

if TYPE_CHECKING:
    import pyarrow

WHOLE_TXT_BYTES = 64 << 20
TXT_PIECE_BYTES = 8 << 20
LINE_BYTES = 256 << 20
READ_BYTES = 8 << 20
"""Bytes of a parquet column read at a time, and of compressed text skipped at a time."""
BATCH_ROWS = 1024
ZEROS = bytes(64)
"""This number of zeros in a row is not text."""
ZERO_SHARE = 0.1
"""A .txt with more than this share of zeros in its first bytes is not text: UTF-16 without a mark has nearly half."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks, longer ones first, because one begins with another."""
LATIN_1 = "; if it is Latin-1, convert it with iconv -f ISO-8859-1 -t UTF-8"
"""Latin-1 has no mark: any bytes can be read as Latin-1."""
BYTE_ORDER_MARK = "\ufeff"
"""UTF-8's byte order mark, as a character."""
_MARK_AT_LINE = re.compile(rf"(?<=\n){BYTE_ORDER_MARK}+")
OTHER_NAMES = {"messages": "conversations", "conversations": "messages"}
"""A column of conversations has either name; if only the other one is there, it is read."""

SHOWN_BYTES = 32
"""Bytes that a message shows of binary data that are not text."""

Cursor = tuple[int, int]
START: Cursor = (0, 0)
Documents = Iterator[tuple[str, Cursor]]


class SourceError(DataError):
    """A source cannot be read from its stated place; another command names another flag as the way out."""

    def __init__(self, problem: str, way_out: str) -> None:
        """The problem without a full stop, and the way out for `ds-slm train` and `prepare`."""
        super().__init__(f"{problem}; {way_out}.")
        self.problem = problem


class ColumnError(SourceError):
    """A file lacks the column, but has others."""


@dataclass(frozen=True)
class TextFile:
    """A file, wherever it is."""

    name: str
    """Its name in messages."""
    open: Callable[[], io.BufferedIOBase]


class Column(NamedTuple):
    """Where a file's documents are."""

    name: str
    as_json: bool
    """Whether they are lists or tables rather than text."""
    say: Callable[[str], None] = lambda line: None
    """Takes a line if the column that is read is not the one that was named."""

    def found_in(self, names: Collection[str]) -> str | None:
        """The name of the column that holds the documents; None if there is none."""
        if self.name in names:
            return self.name
        other = OTHER_NAMES.get(self.name) if self.as_json else None
        if other not in names:
            return None
        self.say(f"there is no column {self.name!r}, {other!r} is read instead")
        return other


def suffix_of(name: str) -> str | None:
    """The known suffix with which a file's name ends, in any case; None for other files."""
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)


def read_documents(
    file: TextFile,
    column: str,
    cursor: Cursor = START,
    as_json: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Documents:
    """The documents of one file from a cursor on, each with the cursor after it.

    With `as_json` the column holds lists or tables, such as conversations, and a document is one of them as JSON.
    `say` takes a line if such a column is read under another name.

    Raises:
        DataError: the file cannot be read, is damaged or lacks the column.
    """
    suffix = suffix_of(file.name)
    assert suffix is not None, file.name
    with _readable(file.name), file.open() as opened, _called_what_it_is(opened, suffix):
        if suffix != ".txt" and not opened.seek(0, io.SEEK_END):
            raise ValueError("it is empty, 0 bytes")
        opened.seek(0)
        yield from READERS[suffix](opened, file.name, Column(column, as_json, say), cursor)


def _damage() -> tuple[type[Exception], ...]:
    """Every kind of error that a damaged file can raise."""
    from pyarrow import ArrowException

    return (OSError, EOFError, ValueError, zlib.error, ArrowException)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn the errors of a damaged file into one error that names the file."""
    try:
        yield
    except _damage() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{name} cannot be read ({reason}): replace the file or leave it out.") from error


@contextmanager
def _called_what_it_is(opened: io.BufferedIOBase, suffix: str) -> Iterator[None]:
    """Say what a file that cannot be read is instead, if its first bytes show it."""
    try:
        yield
    except _damage() as error:
        if opened.closed:  # pyarrow may have closed it
            raise
        opened.seek(0)
        if not (what := stand_in(opened.read(HEAD_BYTES), pages=suffix != ".txt")):
            raise
        raise ValueError(what) from error


def _txt(file: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    if column.as_json:
        raise DataError(
            f"{name}: plain text has no column {column.name!r}: remove it, or name the files that have one."
        )

    begin, piece = cursor
    size_bytes = file.seek(0, io.SEEK_END)
    piece_bytes = TXT_PIECE_BYTES if size_bytes > WHOLE_TXT_BYTES else size_bytes
    file.seek(begin)

    # An empty file is one empty document.
    while begin < size_bytes or (size_bytes == 0 and piece == 0):
        block = file.read(piece_bytes)

        # A piece ends with a line, or at least with a whole character.
        if begin + len(block) < size_bytes:
            block = block[: block.rfind(b"\n") + 1 or _last_character(block)]
            file.seek(begin + len(block))

        if begin == 0:
            _refuse_other_text(block)
        if (zeros := block.find(ZEROS)) >= 0:
            raise ValueError(f"byte {begin + zeros} begins a run of zeros: it was not written to its end")
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {begin + error.start} is no UTF-8: {error.reason}{LATIN_1}") from error

        yield _without_marks(text), (begin + len(block), piece + 1)
        begin, piece = begin + len(block), piece + 1


def _without_marks(text: str) -> str:
    """Text of joined files, without the mark at the start of each; a piece begins after a line end."""
    return _MARK_AT_LINE.sub("", text.lstrip(BYTE_ORDER_MARK)) if BYTE_ORDER_MARK in text else text


def _refuse_other_text(block: bytes) -> None:
    """Raise ValueError if the first bytes of a .txt are a pointer's, or text in another encoding."""
    if what := stand_in(block[:HEAD_BYTES], pages=False):
        raise ValueError(what)
    if encoding := _marked_encoding(block):
        raise ValueError(f"it is {encoding}, not UTF-8: convert it with iconv -f {encoding} -t UTF-8")
    if block[:HEAD_BYTES].count(0) > ZERO_SHARE * len(block[:HEAD_BYTES]):
        raise ValueError(
            "so many of its bytes are zero that it is no UTF-8 text: if it is UTF-16, convert it with iconv "
            "-f UTF-16LE -t UTF-8"
        )


def _marked_encoding(head: bytes) -> str | None:
    """The encoding that a byte order mark names; None for UTF-8 and without a mark."""
    return next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)


def _last_character(block: bytes) -> int:
    """Where to cut a block without a line end: after its last whole character."""
    return codecs.utf_8_decode(block, "replace", False)[1]


def _jsonl(file: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    file.seek(cursor[0])
    yield from _lines(file, name, column, cursor)


def _jsonl_gz(file: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    with gzip.GzipFile(fileobj=file) as unpacked:
        _skip(unpacked, cursor[0])
        yield from _lines(unpacked, name, column, cursor)


def _jsonl_zst(file: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    from pyarrow import CompressedInputStream, PythonFile

    unpacked = io.BufferedReader(CompressedInputStream(PythonFile(file, "r"), "zstd"), 1 << 20)  # type: ignore[arg-type]
    _skip(unpacked, cursor[0])
    yield from _lines(unpacked, name, column, cursor)


def _skip(file: io.BufferedIOBase, skipped_bytes: int) -> None:
    while skipped_bytes and (block := file.read(min(skipped_bytes, READ_BYTES))):
        skipped_bytes -= len(block)


def _lines(lines: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    begin, number = cursor
    while line := lines.readline(LINE_BYTES + 1):
        begin, number = begin + len(line), number + 1
        if len(line) > LINE_BYTES:
            raise ValueError(f"line {number} is longer than {LINE_BYTES} bytes")
        if not line.isspace():
            yield _text(_cell(line, number, name, column), column.as_json), (begin, number)


def _cell(line: bytes, number: int, name: str, column: Column) -> Any:
    """The column's value in one line."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())  # files joined by cat have marks inside
    except UnicodeDecodeError as error:
        encoding = _marked_encoding(line) if number == 1 else None
        hint = f"; it is {encoding}: convert it with iconv -f {encoding} -t UTF-8" if encoding else LATIN_1
        raise ValueError(f"line {number} is no UTF-8 at its byte {error.start}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    key = column.found_in(row) if isinstance(row, dict) else None
    if key is None:
        raise _no_column(f"{name}, line {number}", column.name, row if isinstance(row, dict) else ())
    return row[key]


def _text(value: Any, as_json: bool) -> str:
    if as_json:
        try:
            return json.dumps(value, default=_spelled)
        except TypeError as error:
            raise ValueError(f"a table's keys are no strings: {error}") from error
    return value.lstrip(BYTE_ORDER_MARK) if isinstance(value, str) and is_unicode(value) else ""


def _spelled(value: Any) -> Any:
    """The JSON form of a value that parquet has and JSON lacks."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            value = value[:SHOWN_BYTES]
    return {type(value).__name__: str(value)}


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(file: io.BufferedIOBase, name: str, column: Column, cursor: Cursor) -> Documents:
    from pyarrow.parquet import ParquetFile

    first_group, first_row = cursor
    with ParquetFile(file, buffer_size=READ_BYTES, page_checksum_verification=True) as table:
        key = _check_column(table.schema_arrow, name, column)
        rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        if sum(rows) != table.metadata.num_rows:
            raise ValueError(f"its row groups hold {sum(rows)} rows, its footer says {table.metadata.num_rows}")

        for group in range(first_group, len(rows)):
            row = 0
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[key]):
                if batch.num_columns != 1:
                    raise ValueError(f"it has {batch.num_columns} columns called {key!r}")

                begin, row = row, row + len(batch)
                if row > first_row:
                    for end, text in enumerate(_values(batch.column(0), column), start=begin + 1):
                        if end > first_row:
                            yield text, (group, end)

            if row != rows[group]:
                raise ValueError(f"row group {group} holds {row} rows, its footer says {rows[group]}")
            first_row = 0


def _check_column(schema: "pyarrow.Schema", name: str, column: Column) -> str:
    """The column's name in the file. Raises DataError if it is missing, occurs twice or has another type."""
    from pyarrow import types

    key = column.found_in(schema.names)
    if key is None:
        raise _no_column(name, column.name, schema.names)

    places = schema.get_all_field_indices(key)
    if len(places) > 1:
        raise DataError(
            f"{name}: {len(places)} of its {len(schema.names)} columns are called {key!r} (number "
            f"{', '.join(str(place + 1) for place in places)}): write it anew with names that differ."
        )

    found = schema.field(places[0]).type
    value = found.value_type if types.is_dictionary(found) else found
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(value) for check in ((types.is_nested,) if column.as_json else texts)):
        wanted, of = ("lists or tables", "those") if column.as_json else ("strings", "text")
        raise DataError(
            f"{name}: column {key!r} holds {found}, not {wanted}; the columns there are: "
            f"{', '.join(f'{field.name!r} ({field.type})' for field in schema)}. Set data.source.column to one of {of}."
        )

    return key


def _values(values: "pyarrow.Array", column: Column) -> list[str]:
    if not column.as_json:
        return _strings(values)
    try:
        return [_text(value, as_json=True) for value in values.to_pylist(maps_as_pydicts="strict")]
    except (UnicodeDecodeError, KeyError):  # in at least one of them: no UTF-8, a map with a key twice
        return [_text(_value(value), as_json=True) for value in values]


def _value(value: "pyarrow.Scalar") -> Any:
    try:
        return value.as_py(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError) as error:
        return {type(error).__name__: str(error)}


def _strings(values: "pyarrow.Array") -> list[str]:
    try:
        return [(value or "").lstrip(BYTE_ORDER_MARK) for value in values.to_pylist()]
    except UnicodeDecodeError:  # at least one of them
        return [_string(value) for value in values]


def _string(value: "pyarrow.Scalar") -> str:
    try:
        return (value.as_py() or "").lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError:
        return ""


def _no_column(place: str, column: str, columns: Iterable[str]) -> DataError:
    names = ", ".join(repr(name) for name in columns)
    if not names:
        return DataError(f"{place}: no column {column!r}, nor any other: each line must be an object that has it.")
    return ColumnError(
        f"{place}: no column {column!r}; the columns there are: {names}",
        "name one of them, for the first source with --set data.source.0.column=NAME",
    )


READERS: dict[str, Callable[[io.BufferedIOBase, str, Column, Cursor], Documents]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".jsonl.zst": _jsonl_zst,
    ".parquet": _parquet,
}
