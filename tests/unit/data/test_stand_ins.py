"""What is no text although a file's name says so: pointers, pages, other encodings, binary values, padding."""

import datetime
import decimal
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data.shards.identity import MANIFEST
from ds_slm.data.shards.prepared import open_prepared
from ds_slm.data.sources.documents import documents
from ds_slm.data.tokenizers.tokenizer import build_tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError, DataError
from ds_slm.publish.models import open_model
from tests.support import data_recipes
from tests.support.data_recipes import texts, write_jsonl
from tests.support.source_files import files_source

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 4211\n"
ANNEX = b"/annex/objects/SHA256E-s4211--" + b"5" * 64 + b".txt\n"
HTML = b"\n <!DOCTYPE html><html><body>404</body></html>"
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(LFS, "git lfs pull"), (ANNEX, "git annex get"), (HTML, "a web server"), (S3, "a web server")],
)
def test_what_a_download_left_is_refused_by_name(suffix: str, content: bytes, reason: str, tmp_path: Path) -> None:
    """Oracle: the forms that their makers publish; of a .txt a page may be the text."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    if suffix == ".txt" and content in (HTML, S3):
        assert list(documents(files_source(path))) == [content.decode()]
        return
    with pytest.raises(DataError, match=f"{path} cannot be read .*{reason}"):
        list(documents(files_source(path)))


def test_text_about_pointers_is_text(tmp_path: Path) -> None:
    """Oracle: what was written: a manual that begins with a pointer and goes on."""
    manual = LFS.decode() + "is what such a pointer looks like. " * 40
    (tmp_path / "a.txt").write_text(manual)
    (tmp_path / "b.txt").write_text("version https://git-lfs.github.com/spec/v1 is a line of text")
    assert list(documents(files_source(tmp_path))) == [manual, (tmp_path / "b.txt").read_text()]


def test_every_pointer_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """Oracle: their names, all at once, and no shard."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(50))
    for name in ("b.jsonl", "c.txt", "d.parquet"):
        (folder / name).write_bytes(LFS)
    with pytest.raises(DataError) as caught:
        data_recipes.prepare(data_recipes.recipe(data_recipes.source("made", path=folder)), tmp_path / "data")
    assert [problem.split(" cannot")[0] for problem in caught.value.problems] == [
        str(folder / name) for name in ("b.jsonl", "c.txt", "d.parquet")
    ]
    assert not list((tmp_path / "data").rglob("*.bin*"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_refused_by_name(suffix: str, encoding: str, tmp_path: Path) -> None:
    """Oracle: Python's codecs, with the mark that programs write."""
    text = "\ufeff" * encoding.endswith("be") + '{"text": "größer"}\n' * 3
    (tmp_path / f"a{suffix}").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"it is {encoding[:6].upper()}.*iconv -f {encoding[:6].upper()} -t UTF-8"):
        list(documents(files_source(tmp_path)))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_without_a_mark_are_refused(encoding: str, tmp_path: Path) -> None:
    """Oracle: Python's codecs: English in UTF-16 is valid UTF-8, half of it zeros."""
    (tmp_path / "a.txt").write_bytes("the cat sees the dog.\n".encode(encoding))
    with pytest.raises(DataError, match="bytes are zero"):
        list(documents(files_source(tmp_path)))


def test_a_text_that_ends_in_zeros_is_refused(tmp_path: Path) -> None:
    """Oracle: the byte at which they begin."""
    (tmp_path / "a.txt").write_bytes(b"the cat\n" * 200 + bytes(100))
    with pytest.raises(DataError, match="byte 1600 begins a run of zeros"):
        list(documents(files_source(tmp_path)))


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    """Oracle: the text without them; files that were joined have them inside."""
    mark = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes((mark + LINE) * 3)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + LINE + mark + LINE))
    (tmp_path / "c.txt").write_bytes(mark + b"a")
    (tmp_path / "d.txt").write_bytes(mark)
    assert list(documents(files_source(tmp_path))) == ["a"] * 6 + [""]


def messages_of(path: Path, content: pyarrow.Array, message_type: str = "struct") -> list:
    """What is read of a parquet file of conversations of one message, whose contents are these."""
    roles = pyarrow.array(["user"] * len(content))
    message = pyarrow.StructArray.from_arrays([roles, content], ["role", "content"])
    if message_type == "map":
        pairs = [[("role", "user"), ("content", value)] for value in content.to_pylist()]
        message = pyarrow.array(pairs, pyarrow.map_(pyarrow.string(), content.type))
    lists = pyarrow.ListArray.from_arrays(list(range(len(content) + 1)), message)
    pyarrow.parquet.write_table(pyarrow.table({"messages": lists}), path)
    return [json.loads(text)[0]["content"] for text in documents(files_source(path, "messages"), as_json=True)]


TYPES = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(2)]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_text_inside_messages_whatever_its_type(kind: pyarrow.DataType, tmp_path: Path) -> None:
    """Oracle: what was written: binary that is UTF-8 is text."""
    made = pyarrow.array(["é".encode(), b"ab"]).cast(pyarrow.binary())
    assert messages_of(tmp_path / "a.parquet", made.cast(kind)) == ["é", "ab"]


def test_text_inside_maps_and_dictionaries(tmp_path: Path) -> None:
    """Oracle: what was written, as a map of strings and as dictionary-encoded strings."""
    made = pyarrow.array(["é", "ab"])
    assert messages_of(tmp_path / "a.parquet", made, "map") == ["é", "ab"]
    assert messages_of(tmp_path / "b.parquet", made.dictionary_encode()) == ["é", "ab"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\x89PNG", {"bytes": r"b'\x89PNG'"}),
        (datetime.datetime(2020, 1, 2), {"datetime": "2020-01-02 00:00:00"}),
        (datetime.date(2020, 1, 2), {"date": "2020-01-02"}),
        (datetime.time(1, 2), {"time": "01:02:00"}),
        (decimal.Decimal("1.50"), {"Decimal": "1.50"}),
        (1.5, 1.5),
        (True, True),
    ],
)
def test_what_is_no_text_inside_messages_does_not_pass_for_it(value: object, expected: object, tmp_path: Path) -> None:
    """Oracle: a table, which no check of conversations takes for a string, with the type and the value."""
    assert messages_of(tmp_path / "a.parquet", pyarrow.array([value])) == [expected]


def test_damaged_strings_inside_messages_spoil_their_own_row_alone(tmp_path: Path) -> None:
    """Oracle: the other rows' content."""
    content = pyarrow.array([b"good", b"bad \xff", b"also"]).view(pyarrow.string())
    message = pyarrow.StructArray.from_arrays([content], ["content"])
    pyarrow.parquet.write_table(pyarrow.table({"messages": message}), tmp_path / "a.parquet")
    found = [json.loads(text) for text in documents(files_source(tmp_path, "messages"), as_json=True)]
    assert found[0::2] == [{"content": "good"}, {"content": "also"}] and "content" not in found[1]


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_two_columns_of_one_name_are_refused(kind: str, tmp_path: Path) -> None:
    """Oracle: the name and the places; another name that comes twice does no harm."""
    values = pyarrow.array(["a"]) if kind == "text" else pyarrow.array([[{"role": "user", "content": "a"}]])
    table = pyarrow.Table.from_arrays([values, pyarrow.array([1]), values], names=[kind, "id", kind])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: 2 of its 3 columns are called '{kind}' \(number 1, 3\)"):
        list(documents(files_source(tmp_path, kind), as_json=kind == "messages"))
    table = pyarrow.Table.from_arrays([values, values, values], names=["id", kind, "id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(list(documents(files_source(tmp_path, kind), as_json=kind == "messages"))) == 1


def test_marks_of_joined_files_and_of_strings_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the text without them, in one piece and in many; a mark inside a line stays."""
    mark = "\ufeff"
    lines = [f"line {number}\n" for number in range(300)]
    (tmp_path / "a.txt").write_text(mark * 2 + mark.join(lines) + f"a{mark}b", encoding="utf-8")
    for whole_bytes in (1 << 20, 50):
        monkeypatch.setattr("ds_slm.data.sources.readers.WHOLE_TXT_BYTES", whole_bytes)
        monkeypatch.setattr("ds_slm.data.sources.readers.TXT_PIECE_BYTES", 50)
        assert "".join(documents(files_source(tmp_path))) == "".join(lines) + f"a{mark}b"
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"{mark}one"}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{mark}{mark}two", None, f"t{mark}"]}), tmp_path / "b.parquet")
    assert list(documents(files_source(tmp_path))) == ["one", "two", "", f"t{mark}"]


@pytest.mark.parametrize("head", [b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf \r\n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_pointer_behind_a_mark_or_a_blank_line_is_one(head: bytes, suffix: str, tmp_path: Path) -> None:
    """Oracle: the way to fetch it."""
    (tmp_path / f"a{suffix}").write_bytes(head + LFS)
    with pytest.raises(DataError, match="git lfs pull"):
        list(documents(files_source(tmp_path)))


def ids_recipe(folder: Path, dtype: str = "", val_fraction: float = 0.05, eos: str = "!"):
    """A recipe whose tokenizer is 90 characters, `!` being id 0, and whose source is folder/ids.bin."""
    if not (letters := folder / "letters").exists():
        data_recipes.character_folder(letters, "".join(map(chr, range(33, 123))))
    tokenizer = f'kind = "hf"\nvocab_size = 90\npath = "{letters}"\neos_token = "{eos}"\npad_token = "{eos}"'
    fields = {"dtype": dtype} if dtype else {}
    source = data_recipes.source("ids", kind="tokens", path=folder / "ids.bin", **fields)
    return data_recipes.recipe(source, tokenizer=tokenizer, val_fraction=val_fraction)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("eos", ["!", "a"])
def test_zeros_at_the_end_of_token_files_are_padding(dtype: str, eos: str, tmp_path: Path) -> None:
    """Oracle: the shards of the same file without them; an EOS of the last document stays."""
    ids = np.random.default_rng(0).integers(1, 90, 5_000).astype(f"<u{2 if dtype == 'uint16' else 4}")
    ids[::50] = 0
    ids[-1] = 0 if eos == "!" else 7
    ids.tofile(tmp_path / "ids.bin")
    made = ids_recipe(tmp_path, dtype, eos=eos)
    clean = data_recipes.prepare(made, tmp_path / "clean")
    np.append(ids, np.zeros(3_000, ids.dtype)).tofile(tmp_path / "ids.bin")
    told: list[str] = []
    padded = data_recipes.prepare(made, tmp_path / "padded", report=told.append)
    assert padded.sha256 == clean.sha256 and padded.val_bytes > 0
    assert "ids: 3,000 ids were skipped: 3,000 ids of padding at the end of a file" in told


def test_zeros_between_documents_are_not_taken_for_wide_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the ids that were written: a block of zeros says nothing about their width."""
    monkeypatch.setattr("ds_slm.data.sources.token_files.COPY_TOKENS", 20)
    ids = np.concatenate([np.arange(1, 80), np.zeros(60), np.arange(1, 80)]).astype("<u2")
    ids.tofile(tmp_path / "ids.bin")
    prepared = data_recipes.prepare(ids_recipe(tmp_path), tmp_path / "data")
    found = [np.asarray(prepared.tokens(split)[0]) for split in ("train", "val")]
    assert np.array_equal(np.concatenate(found), ids)


@pytest.mark.parametrize("place", [0, 700, 2_500, 4_900])
@pytest.mark.parametrize(("eos", "zeros"), [("!", 65), ("a", 512)])
def test_ids_that_were_never_written_are_refused_wherever_they_stand(
    place: int, eos: str, zeros: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the place, in blocks of any size, whether 0 ends documents or is a letter; fewer zeros are copied."""
    ids = np.random.default_rng(0).integers(1, 90, 5_000).astype("<u2")
    made = ids_recipe(tmp_path, eos=eos, val_fraction=0.2)
    for block, count in ((100, zeros), (1 << 24, zeros), (100, zeros - 1)):
        monkeypatch.setattr("ds_slm.data.sources.token_files.COPY_TOKENS", block)
        monkeypatch.setattr("ds_slm.data.sources.token_files.LOOK_TOKENS", block)
        np.concatenate([ids[:place], np.zeros(count, "<u2"), ids[place:]]).tofile(tmp_path / "ids.bin")
        if count == zeros:
            with pytest.raises(
                DataError, match=rf"ids\.bin: from position {place} on id 0 stands {zeros} times.*no text"
            ):
                data_recipes.prepare(made, tmp_path / f"data{block}")
        else:
            assert data_recipes.prepare(made, tmp_path / "fewer").train_tokens > 3_900


def test_another_id_many_times_in_a_row_is_told_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a line with the letter and the place at every launch; a run of 511 is not told."""
    monkeypatch.setattr("ds_slm.data.sources.token_files.COPY_TOKENS", 300)
    ids = np.random.default_rng(0).integers(1, 90, 5_000).astype("<u2")
    made = ids_recipe(tmp_path)
    told: list[str] = []
    np.concatenate([ids[:99], np.full(511, 5, "<u2"), ids[99:]]).tofile(tmp_path / "ids.bin")
    data_recipes.prepare(made, tmp_path / "short", report=told.append)
    assert not any("in a row" in line for line in told)
    np.concatenate([ids[:99], np.full(600, 5, "<u2"), ids[99:]]).tofile(tmp_path / "ids.bin")
    for _ in range(2):
        told.clear()
        data_recipes.prepare(made, tmp_path / "long", report=told.append)
        (line,) = [line for line in told if "in a row" in line]
        assert line.startswith("ids: id 5 ('&') stands 600 times") and "from position 99 of ids.bin on" in line


@pytest.mark.parametrize(
    ("content", "dtype", "reason"),
    [
        (bytes(2_000), "", "holds nothing but one id"),
        (b"", "", "is empty, 0 bytes"),
        (LFS, "", "git lfs pull"),
        (HTML, "", "a web server"),
        (np.arange(1, 89, dtype="<u8").tobytes(), "uint32", "every other 32-bit id is 0.*64-bit.*anew as 32-bit"),
        (np.arange(1, 89, dtype="<i8").tobytes(), "", r"three of four 16-bit ids are 0.*int64.*astype\('uint32'\)"),
        (np.arange(1, 89, dtype="<u4").tobytes(), "", "every other 16-bit id is 0.*data.source.dtype = 'uint32'"),
        (b"\x93NUMPY\x01\x00" + bytes(120), "", "numpy's own format"),
        (np.array([5] * 95 + [0] * 5, "<u2").tobytes(), "", "4 ids that are held out, 4 are no text .* id 0:"),
        (
            np.array([5] * 950 + [0] * 30 + [7] * 20, "<u2").tobytes(),
            "",
            "the 49 ids that are held out, 29 are no text",
        ),
    ],
)
def test_token_files_that_hold_no_text(content: bytes, dtype: str, reason: str, tmp_path: Path) -> None:
    """Oracle: the reason, and no shard left behind."""
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        data_recipes.prepare(ids_recipe(tmp_path, dtype), tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.bin*"))


def test_data_of_an_older_version_whose_held_out_part_is_no_text(tmp_path: Path) -> None:
    """Oracle: a manifest that says so, as older versions could write one: an error, not a division by zero."""
    (np.arange(5_000) % 89 + 1).astype("<u2").tofile(tmp_path / "ids.bin")
    made = ids_recipe(tmp_path)
    folder = data_recipes.prepare(made, tmp_path / "data").folder
    manifest = json.loads((folder / "ids" / MANIFEST).read_text())
    manifest["bytes"]["val"] = 0
    (folder / "ids" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{folder}: what is held out holds no text"):
        _ = open_prepared(made, tmp_path / "data" / "made").val_bytes


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_is_not_a_tokenizer(name: str, tmp_path: Path) -> None:
    """Oracle: the file, and how to fetch it: of a tokenizer that a recipe names, and of a folder that is loaded."""
    letters = data_recipes.character_folder(tmp_path / "letters", "!ab")
    (letters / "tokenizer.json").unlink()
    (letters / name).write_bytes(LFS)
    section = f'kind = "hf"\nvocab_size = 3\npath = "{letters}"\neos_token = "!"\npad_token = "!"'
    made = data_recipes.recipe(data_recipes.source("made", path=tmp_path), tokenizer=section)
    with pytest.raises(DataError, match=f"{letters / name} cannot be read .*git lfs pull"):
        build_tokenizer(made, lambda source: iter(()))
    if name == "tokenizer.json":
        with pytest.raises(DataError, match=f"{letters / name} cannot be read .*git lfs pull"):
            load_tokenizer(letters)


def test_every_pointer_among_a_models_files_is_told(tmp_path: Path) -> None:
    """Oracle: the names of all files that were not fetched, as git leaves them in a clone without LFS."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match="git lfs pull") as caught:
        open_model(tmp_path)
    assert len(caught.value.problems) == 3
