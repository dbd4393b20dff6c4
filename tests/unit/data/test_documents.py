"""Sources of documents: the built-in corpus, local files of every kind, a hub that is not there."""

import hashlib
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from ds_slm.data.shards.writer import split_documents
from ds_slm.data.sources import builtin
from ds_slm.data.sources.builtin import builtin_documents
from ds_slm.data.sources.documents import documents, locate
from ds_slm.errors import DataError
from ds_slm.recipe import loading
from ds_slm.recipe.data_sections import Source
from tests.support.data_recipes import texts, write_jsonl
from tests.support.source_files import WRITERS, files_source

ROOT = Path(__file__).resolve().parents[3]


def demo_split() -> dict[str, list[str]]:
    """The built-in corpus as the demo recipe splits it."""
    split: dict[str, list[str]] = {"train": [], "val": []}
    for side, text in split_documents(builtin_documents(), loading.load("demo").data):
        split[side].append(text)
    return split


def test_hidden_files_are_no_text(tmp_path: Path) -> None:
    """Oracle: the visible file alone: editors and notebooks leave copies in hidden folders."""
    write_jsonl(tmp_path / "one.jsonl", texts(3))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_jsonl(tmp_path / ".ipynb_checkpoints" / "one.jsonl", texts(3))
    write_jsonl(tmp_path / ".one.jsonl", texts(3))
    place = locate(Source(name="web", kind="files", path=str(tmp_path)))
    assert [path.name for path in place.files] == ["one.jsonl"]


def test_builtin_corpus_is_large_enough() -> None:
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


def test_builtin_corpus_is_prose() -> None:
    """Oracle: no doctest, signature, heading or argument table; a share of function words that only English has."""
    paragraphs = [part for text in builtin_documents() for part in text.split("\n\n")]
    assert not [part for part in paragraphs if re.search(r">>>|^def |^class |^import |\n|---|===|```", part)]
    words = " ".join(paragraphs).lower().split()
    assert sum(word in {"the", "a", "of", "to", "is", "in", "and", "for"} for word in words) / len(words) > 0.2


def test_builtin_corpus_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: sys.modules of a new process after reading it; and the same text as here, in the same order."""
    monkeypatch.setattr(builtin, "PACKAGES", ("numpy", "pydantic"))
    program = (
        "import sys, hashlib\nfrom ds_slm.data.sources import builtin\nbuiltin.PACKAGES = ('numpy', 'pydantic')\n"
        "text = '\\0'.join(builtin.builtin_documents())\n"
        "assert not {'numpy', 'pydoc_data.topics'} & set(sys.modules)\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    here = "\0".join(builtin.builtin_documents.__wrapped__())
    environment = {**os.environ, "PYTHONHASHSEED": "11"}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_missing_places(tmp_path: Path) -> None:
    """Oracle: the error names the path and --source."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"{path} .*--source made=PATH"):
            list(documents(files_source(path)))
    with pytest.raises(DataError, match="does not exist"):
        locate(Source(name="made", kind="tokens", path="x"), tmp_path / "none")


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != ".txt"])
def test_misspelt_column(suffix: str, tmp_path: Path) -> None:
    """Oracle: the error lists the columns there are."""
    WRITERS[suffix](tmp_path / f"made{suffix}", texts(3))
    with pytest.raises(DataError, match=r"no column 'txet'; the columns there are: .*'text'"):
        list(documents(files_source(tmp_path, column="txet")))


def test_a_local_folder_replaces_any_source(tmp_path: Path) -> None:
    """Oracle: the documents that were written, for a hub dataset and for the built-in corpus."""
    write_jsonl(tmp_path / "made.jsonl", texts(30))
    (tmp_path / "README.md").write_text("no data")
    assert list(documents(Source(name="web", kind="hub", id="a/b"), tmp_path)) == texts(30)
    assert list(documents(Source(name="docs", kind="builtin"), tmp_path / "made.jsonl")) == texts(30)


def test_a_hub_that_does_not_answer() -> None:
    """Oracle: a process told to stay offline says which source, and how to do without the hub."""
    program = (
        "from ds_slm.data.sources.documents import documents\nfrom ds_slm.recipe.data_sections import Source\n"
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
