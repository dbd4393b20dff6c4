"""Local files of every kind: whole, from any position on, and damaged in every way that can be told."""

import gzip
import io
import json
import random
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data.sources import readers
from ds_slm.data.sources.documents import documents, locate
from ds_slm.data.sources.readers import READERS, TextFile, read_documents
from ds_slm.errors import DataError
from tests.support.data_recipes import texts
from tests.support.source_files import ROWS_PER_GROUP, WRITERS, files_source, jsonl, write_parquet, zstd

MADE = [*texts(9), "two\r\nlines\n", "é 日本 😀", ""]


def make_folder(folder: Path, suffix: str) -> list[str]:
    """Two files of a kind, one of them in a folder; returns what is in them."""
    (folder / "b").mkdir()
    WRITERS[suffix](folder / f"a{suffix}", MADE)
    WRITERS[suffix](folder / "b" / f"made{suffix.upper()}", MADE[:5])
    return MADE + MADE[:5]


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind(suffix: str, tmp_path: Path) -> None:
    """Oracle: the documents that were written, line ends and all, in order, whatever the suffix's case."""
    made = make_folder(tmp_path, suffix)
    assert list(documents(files_source(tmp_path))) == made


@pytest.mark.parametrize("suffix", READERS)
def test_a_position_goes_on_where_reading_stopped(suffix: str, tmp_path: Path) -> None:
    """Oracle: the whole sequence, cut after every number of documents, and in many pieces; positions are plain JSON."""
    made = make_folder(tmp_path, suffix)
    source = files_source(tmp_path)
    for count in range(len(made) + 1):
        stream = documents(source)
        assert list(islice(stream, count)) == made[:count]
        position = json.loads(json.dumps(stream.position()))
        assert list(documents(source, position=position)) == made[count:]
        assert list(stream) == made[count:]  # the same stream goes on as well
    pieces, position, rng = [], None, random.Random(1)
    while len(pieces) < len(made):
        stream = documents(source, position=position)
        pieces += islice(stream, rng.randint(1, 3))
        position = stream.position()
    assert pieces == made
    assert list(documents(source, position=position)) == []


def test_the_builtin_corpus_has_positions_too() -> None:
    """Oracle: the list that the corpus is; another list refuses the position."""
    from ds_slm.recipe.data_sections import Source

    source = Source(name="docs", kind="builtin")
    stream = documents(source, builtin=lambda: MADE)
    assert list(islice(stream, 4)) == MADE[:4]
    assert list(documents(source, position=stream.position(), builtin=lambda: MADE)) == MADE[4:]
    with pytest.raises(DataError, match="not what it was"):
        documents(source, position=stream.position(), builtin=lambda: MADE[1:])


def test_a_position_belongs_to_its_files(tmp_path: Path) -> None:
    """Oracle: a file more, another size, another column, another source: each refused, naming the source."""
    source = files_source(tmp_path / "made")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.jsonl").write_bytes(jsonl(MADE))
    position = documents(source).position()
    with pytest.raises(DataError, match=r"source 'made'.*not what it was"):
        documents(files_source(tmp_path / "made", column="id"), position=position)
    with pytest.raises(DataError, match="not what it was"):
        documents(source, position={})
    (tmp_path / "made" / "a.jsonl").write_bytes(jsonl(MADE[1:]))
    with pytest.raises(DataError, match="not what it was"):
        documents(source, position=position)
    (tmp_path / "made" / "a.jsonl").write_bytes(jsonl(MADE))
    assert list(documents(source, position=position)) == MADE
    (tmp_path / "made" / "b.jsonl").write_bytes(jsonl(MADE))
    with pytest.raises(DataError, match="not what it was"):
        documents(source, position=position)


class CountingFile(io.BytesIO):
    """Remembers which bytes were read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, size: int | None = -1) -> bytes:
        begin = self.tell()
        block = super().read(size)
        self.reads.append((begin, begin + len(block)))
        return block


def test_parquet_reads_one_column_and_no_row_group_before(tmp_path: Path) -> None:
    """Oracle: where the file's own footer says that the chunks lie, against the bytes read."""
    path = tmp_path / "a.parquet"
    fat = [random.Random(place).randbytes(20_000).hex() for place in range(12)]
    table = pyarrow.table({"fat": fat, "text": MADE, "also": fat})
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS_PER_GROUP)
    metadata, size_bytes = pyarrow.parquet.read_metadata(path), path.stat().st_size
    opened = CountingFile(path.read_bytes())
    found = list(read_documents(TextFile("a.parquet", lambda: opened), "text", (1, 2)))  # type: ignore[arg-type]
    assert [text for text, _ in found] == MADE[ROWS_PER_GROUP + 2 :]
    reads = [read for read in opened.reads if read[1] < size_bytes]  # without the footer
    for group in range(metadata.num_row_groups):
        for column in range(3):
            chunk = metadata.row_group(group).column(column)
            begin = chunk.dictionary_page_offset or chunk.data_page_offset
            end = begin + chunk.total_compressed_size
            touched = any(first < end and begin < last for first, last in reads)
            assert touched == (group >= 1 and column == 1), (group, column)


def test_a_long_txt_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pieces of at most the bytes allowed, joined the text, each but the last ending with a line where it can;
    a file of just the limit is one document; a position continues inside the file.
    """
    monkeypatch.setattr(readers, "WHOLE_TXT_BYTES", 1_000)
    monkeypatch.setattr(readers, "TXT_PIECE_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1_000)
    assert list(documents(files_source(tmp_path))) == ["x" * 1_000]
    text = "\n".join("é" * (place % 30) for place in range(60)) + "日" * 100
    path.write_bytes(text.encode())
    pieces = list(documents(files_source(tmp_path)))
    assert "".join(pieces) == text and max(len(piece.encode()) for piece in pieces) <= 100
    assert sum(piece.endswith("\n") for piece in pieces) > 10
    for count in range(len(pieces)):
        stream = documents(files_source(tmp_path))
        assert list(islice(stream, count)) == pieces[:count]
        assert list(documents(files_source(tmp_path), position=stream.position())) == pieces[count:]
    path.write_bytes(text.encode() + b"\xff")
    with pytest.raises(DataError, match=f"byte {len(text.encode())} is no UTF-8"):
        list(documents(files_source(tmp_path)))


def test_a_very_long_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the line's number; the longest one allowed is read."""
    monkeypatch.setattr(readers, "LINE_BYTES", 200)
    path = tmp_path / "a.jsonl"
    line = b'{"text": "' + b"x" * 187 + b'"}\n'
    path.write_bytes(b'{"text": "a"}\n' + line)
    assert [len(text) for text in documents(files_source(path))] == [1, 187]
    path.write_bytes(b'{"text": "a"}\n' + line.replace(b"xx", b"xxx", 1))
    with pytest.raises(DataError, match="line 2 is longer than 200 bytes"):
        list(documents(files_source(path)))


def test_documents_that_are_none_come_out_empty(tmp_path: Path) -> None:
    """Oracle: null, empty, a number, a list and half a surrogate pair are each one empty document; none is lost."""
    rows = [None, "", 3, ["a"], "whole"]
    lines = "\ufeff" + "".join(json.dumps({"text": value}) + "\n" for value in rows) + '\n  \n{"text": "\\ud83d"}'
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert list(documents(files_source(tmp_path))) == ["", "", "", "", "whole", ""]
    (tmp_path / "a.jsonl").unlink()
    write_parquet(tmp_path / "a.parquet", [None, "", "whole"])
    binary = pyarrow.array([b"bad \xff", b"good", None]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": binary}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "c.parquet")
    assert list(documents(files_source(tmp_path))) == ["", "", "whole", "", "good", "", "", ""]


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array(["a", "b"], pyarrow.large_string()),
        pyarrow.array(["a", "b"], pyarrow.string_view()),
        pyarrow.array(["a", "b"]).dictionary_encode(),
    ],
    ids=["large", "view", "dictionary"],
)
def test_other_strings_of_parquet(values: pyarrow.Array, tmp_path: Path) -> None:
    """Oracle: the values."""
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    assert list(documents(files_source(tmp_path))) == ["a", "b"]


def test_compressed_files_of_several_members(tmp_path: Path) -> None:
    """Oracle: one after the other they are one text; zeros behind a gzip member are padding."""
    first, second = jsonl(MADE)[:300], jsonl(MADE)[300:]
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second) + bytes(512))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(first) + skippable + zstd(second))
    assert list(documents(files_source(tmp_path))) == MADE * 2


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_a_compressed_file_cut_anywhere_is_refused(suffix: str, pack: object, tmp_path: Path) -> None:
    """Oracle: every shorter length, the checksum's bytes included, raises and names the file; so does anything behind
    the end. Only between two members a cut leaves a whole file.
    """
    path = tmp_path / f"a{suffix}"
    member = pack(jsonl(MADE[:3]))  # type: ignore[operator]
    for whole in (b"", member):
        for length in range(1 if whole else 0, len(member)):
            path.write_bytes(whole + member[:length])
            with pytest.raises(DataError, match=f"{path} cannot be read"):
                list(documents(files_source(path)))
    for behind in (b"\n", b"garbage", jsonl(MADE)):
        path.write_bytes(member + behind)
        with pytest.raises(DataError, match=f"{path} cannot be read"):
            list(documents(files_source(path)))


def parquet(*columns: object, **options: object) -> bytes:
    file = io.BytesIO()
    names = ["text", "id"][: len(columns)]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is no UTF-8 at its byte 10"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1 is no UTF-8"),
        ("a.jsonl", b"[1]\n", "line 1: no column 'text', nor any other"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a", "n": 1}\n', "line 2: no column 'text'.*'body', 'n'"),
        ("a.jsonl", b"", "empty, 0 bytes"),
        ("a.jsonl.gz", b"", "empty, 0 bytes"),
        ("a.jsonl.zst", b"", "empty, 0 bytes"),
        ("a.parquet", b"", "empty, 0 bytes"),
        ("a.txt", b"good \xff\xfe", "byte 5 is no UTF-8"),
        ("a.txt", "füllen".encode("latin-1"), "byte 1 is no UTF-8.*iconv -f ISO-8859-1 -t UTF-8"),
        ("a.jsonl", '{"text": "ü"}'.encode("latin-1"), "line 1 is no UTF-8 at its byte 10.*iconv -f ISO-8859-1"),
        ("a.jsonl.gz", b"no gzip at all", "gzip"),
        ("a.jsonl.zst", b"no zstd at all", "ZSTD"),
        ("a.jsonl.gz", zstd(jsonl(MADE)), "gzip"),
        ("a.parquet", b"PAR1 no parquet", "arquet"),
        ("a.parquet", parquet(MADE)[:-50], "arquet"),
        ("a.parquet", parquet(MADE)[:20] + parquet(MADE)[24:], "."),
        ("a.parquet", parquet([1, 2]), "column 'text' holds int64, not strings.*'text' .int64."),
        ("a.parquet", parquet([["a"], ["b"]], ["a", "b"]), "holds list.*'id' .string."),
        ("a.parquet", parquet([b"a"]), "holds binary"),
    ],
)
def test_damaged_files(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    """Oracle: one error that names the file, the place and the reason, never a shorter corpus."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){path}.*{reason}") as caught:
        list(documents(files_source(tmp_path)))
    ways_out = ("replace the file", "--set data.source.0.column=", "data.source.column", "must be an object")
    assert any(way_out in str(caught.value) for way_out in ways_out)


def test_an_empty_txt_is_an_empty_document(tmp_path: Path) -> None:
    """Oracle: counted, not lost."""
    (tmp_path / "a.txt").write_bytes(b"")
    assert list(documents(files_source(tmp_path))) == [""]


def test_folders(tmp_path: Path) -> None:
    """Oracle: links and folders with a file's name are followed, each folder once; what looks like data and is none is
    named, all at once; other files are told.
    """
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "a.jsonl").write_bytes(jsonl(["inner"]))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "far.jsonl").write_bytes(jsonl(["far"]))
    (tmp_path / "x.jsonl" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "x.jsonl" / "link.jsonl").symlink_to(tmp_path / "else" / "far.jsonl")
    (tmp_path / "x.jsonl" / "loop").symlink_to(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl" / "left.csv").write_text("a,b")
    source = files_source(tmp_path / "x.jsonl")
    assert list(documents(source)) == ["inner", "far", "far"]
    told = "reads a.jsonl, link/far.jsonl, link.jsonl; 1 of no known kind: left.csv"
    assert locate(source).tell("train") == told
    (tmp_path / "x.jsonl" / "lost.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "x.jsonl" / "turn.parquet").symlink_to(tmp_path / "x.jsonl" / "turn.parquet")
    with pytest.raises(DataError, match=r"lost\.jsonl is no file or a link to nothing") as caught:
        locate(source)
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match=r"lost\.jsonl is a link to nothing; .*--source made=PATH"):
        locate(files_source(tmp_path / "x.jsonl" / "lost.jsonl"))


def test_text_beside_token_ids_is_refused(tmp_path: Path) -> None:
    """Oracle: both are named; nobody guesses which was meant."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(MADE))
    (tmp_path / "b.BIN").write_bytes(bytes(8))
    with pytest.raises(DataError, match=r"both text \(a\.jsonl\) and token ids \(b\.BIN\)"):
        locate(files_source(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    assert locate(files_source(tmp_path, kind="tokens")).kind == "tokens"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_may_not_be_read_is_named(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file's or the folder's name and the system's reason; made up, for root may read everything."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jsonl").write_bytes(jsonl(MADE))
    denied = tmp_path / "a" / ("a.jsonl" if where == "file" else "")
    refuse = PermissionError(13, "Permission denied", str(denied))

    def fail(*_: object, **__: object) -> None:
        raise refuse

    if where == "file":
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(DataError, match=f"{denied}.*Permission denied"):
        list(documents(files_source(tmp_path)))


@pytest.mark.parametrize(
    ("name", "count"),
    [("openstax_val.jsonl", 90), ("books_train.jsonl.gz", 2064), ("c4_demo.jsonl", 300), ("tinyshakespeare.txt", 1)],
)
def test_real_prose(name: str, count: int, test_data: Path) -> None:
    """Oracle: the counts that the folder's README gives; none is empty; a position in the middle changes nothing."""
    source = files_source(test_data / "prose" / name)
    whole = list(documents(source))
    assert len(whole) == count and all(whole)
    stream = documents(source)
    begun = list(islice(stream, count // 2))
    assert begun + list(documents(source, position=stream.position())) == whole


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_columns_of_lists_come_as_json(suffix: str, tmp_path: Path) -> None:
    """Oracle: what was written; text is refused, or in a file of lines passed on for others to count."""
    import gzip

    import pyarrow
    from pyarrow import parquet

    talks = [[{"role": "user", "content": f"é {place}"}, {"role": "assistant", "content": "b"}] for place in range(9)]
    path = tmp_path / f"talks{suffix}"
    lines = "".join(json.dumps({"messages": talk, "text": "a"}) + "\n" for talk in talks)
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"messages": talks, "text": ["a"] * 9}), path, row_group_size=4)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if suffix == ".jsonl.gz" else lines.encode())
    stream = documents(files_source(path, column="messages"), as_json=True)
    assert [json.loads(next(iter(stream))) for _ in range(5)] == talks[:5]
    rest = documents(files_source(path, column="messages"), position=stream.position(), as_json=True)
    assert [json.loads(text) for text in rest] == talks[5:]
    if suffix == ".parquet":
        with pytest.raises(DataError, match="column 'text' holds string, not lists or tables"):
            list(documents(files_source(path), as_json=True))
    else:
        assert list(documents(files_source(path), as_json=True)) == ['"a"'] * 9
