"""Sources of documents: the embedded corpus, local files of every kind, a hub that is not there."""

import gzip
import hashlib
import json
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data import embedded
from ds_slm.data.corpus import documents, locate
from ds_slm.data.embedded import embedded_documents
from ds_slm.data.writer import split_documents
from ds_slm.errors import DataError
from ds_slm.recipe import schema
from tests.data_recipes import texts, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def files(path: Path | None, column: str = "text", kind: str = "files") -> schema.Source:
    return schema.Source(name="made", kind=kind, path=str(path), column=column)  # type: ignore[arg-type]


def demo_split() -> dict[str, list[str]]:
    """The embedded corpus as the demo recipe splits it."""
    split: dict[str, list[str]] = {"train": [], "val": []}
    for side, text in split_documents(embedded_documents(), schema.load("demo").data):
        split[side].append(text)
    return split


def test_embedded_corpus_is_large_enough() -> None:
    """Oracle: at least 8 MB in all, and 256 kB held out under the demo recipe."""
    split = demo_split()
    held_out_bytes = sum(len(text.encode()) for text in split["val"])
    assert held_out_bytes >= 256_000
    assert held_out_bytes + sum(len(text.encode()) for text in split["train"]) >= 8_000_000


def test_train_and_held_out_text_share_no_paragraph() -> None:
    """Oracle: sets of paragraphs, also with case, digits and punctuation left out; none comes twice anywhere."""
    paragraphs = {side: [part for text in all_ for part in text.split("\n\n")] for side, all_ in demo_split().items()}
    marks = str.maketrans("", "", string.punctuation + string.digits + " ")
    letters = {side: [part.lower().translate(marks) for part in parts] for side, parts in paragraphs.items()}
    assert not set(letters["train"]) & set(letters["val"])
    everything = letters["train"] + letters["val"]
    assert len(everything) == len(set(everything))


def test_embedded_corpus_is_prose() -> None:
    """Oracle: no doctest, signature, heading or argument table; a share of function words that only English has."""
    paragraphs = [part for text in embedded_documents() for part in text.split("\n\n")]
    assert not [part for part in paragraphs if re.search(r">>>|^def |^class |^import |\n|---|===|```", part)]
    words = " ".join(paragraphs).lower().split()
    assert sum(word in {"the", "a", "of", "to", "is", "in", "and", "for"} for word in words) / len(words) > 0.2


def test_embedded_corpus_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: sys.modules of a new process after reading it; and the same text as here, in the same order."""
    monkeypatch.setattr(embedded, "PACKAGES", ("numpy", "pydantic"))
    program = (
        "import sys, hashlib\nfrom ds_slm.data import embedded\nembedded.PACKAGES = ('numpy', 'pydantic')\n"
        "text = '\\0'.join(embedded.embedded_documents())\n"
        "assert not {'numpy', 'pydoc_data.topics'} & set(sys.modules)\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    here = "\0".join(embedded.embedded_documents.__wrapped__())
    environment = {**os.environ, "PYTHONHASHSEED": "11"}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def write_txt(folder: Path, made: list[str]) -> None:
    for place, text in enumerate(made):
        (folder / f"{place:03}.txt").write_bytes(text.encode())


def write_gzip(folder: Path, made: list[str]) -> None:
    with gzip.open(folder / "made.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in made)


def write_parquet(folder: Path, made: list[str]) -> None:
    half = len(made) // 2
    for name, part in (("a", made[:half]), ("b", made[half:])):
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")


@pytest.mark.parametrize(
    "write",
    [write_txt, write_gzip, write_parquet, lambda folder, made: write_jsonl(folder / "made.jsonl", made)],
    ids=["txt", "jsonl.gz", "parquet", "jsonl"],
)
def test_local_files(write: Callable[[Path, list[str]], None], tmp_path: Path) -> None:
    """Oracle: the documents that were written, line ends and all, in order; the same through a folder."""
    made = [*texts(30), "two\r\nlines\n", "é 日本 😀"]
    write(tmp_path, made)
    (tmp_path / "README.md").write_text("no data")
    assert list(documents(files(tmp_path))) == made
    assert list(documents(schema.Source(name="hub", kind="hub", id="a/b"), tmp_path)) == made
    one = min(path for path in tmp_path.iterdir() if path.suffix != ".md")
    assert list(documents(files(one))) == made[: len(list(documents(files(one))))]


def test_empty_documents_come_out_empty(tmp_path: Path) -> None:
    """Oracle: null, empty, a number and half a surrogate pair are each one empty document; none is lost."""
    path = tmp_path / "made.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": 3}\n{"text": "\\ud83d"}\n{"text": "whole"}\n')
    assert list(documents(files(path))) == ["", "", "", "", "whole"]


def test_missing_places(tmp_path: Path) -> None:
    """Oracle: the error names the path and --source."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"{path} .*--source made=PATH"):
            list(documents(files(path)))
    with pytest.raises(DataError, match="does not exist"):
        locate(files(None, kind="tokens"), tmp_path / "none")


@pytest.mark.parametrize(
    "write", [write_gzip, write_parquet, lambda folder, made: write_jsonl(folder / "x.jsonl", made)]
)
def test_misspelt_column(write: Callable[[Path, list[str]], None], tmp_path: Path) -> None:
    """Oracle: the error lists the columns there are."""
    write(tmp_path, texts(3))
    with pytest.raises(DataError, match=r"no column 'txet'; the columns there are: .*'text'"):
        list(documents(files(tmp_path, column="txet")))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "utf-8"),
        ("a.jsonl", b"[1]\n", "no column"),
        ("a.txt", b"good \xff\xfe", "utf-8"),
        ("a.parquet", b"PAR1 no parquet", "arquet"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 900)[:-20], "end-of-stream"),
        ("a.jsonl.gz", b"no gzip at all", "gzip"),
    ],
)
def test_damaged_files(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    """Oracle: one error that names the file and the reason, never a shorter corpus."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"(?is){path}.*{reason}"):
        list(documents(files(path)))


def test_a_hub_that_does_not_answer() -> None:
    """Oracle: a process told to stay offline says which source, and how to do without the hub."""
    program = (
        "from ds_slm.data.corpus import documents\nfrom ds_slm.recipe.schema import Source\n"
        "from ds_slm.errors import DataError\n"
        "for name, kind in (('web', 'hub'), ('ids', 'tokens')):\n"
        "    try: next(iter(documents(Source(name=name, kind=kind, id='no/such'))))\n"
        "    except DataError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    one, two = found.stdout.splitlines()
    assert one.startswith("source 'web': the hub gave no 'no/such'") and one.endswith("with --source web=PATH.")
    assert two.startswith("source 'ids': the hub gave no 'no/such'") and two.endswith("with --source ids=PATH.")
