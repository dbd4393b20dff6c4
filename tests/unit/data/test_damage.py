"""Prepared data that were damaged, edited, copied or made by something else: found when opened, and named."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_slm.data.shards import identity
from ds_slm.data.shards.prepared import STAMPS, _read_stamps, open_prepared, verify
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import BPE, contents, prepare, recipe, source, texts, two_sources, write_jsonl


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    return two_sources(tmp_path)


def damage_size(folder: Path) -> None:
    path = folder / "first" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-3])


def damage_file(folder: Path) -> None:
    (folder / "second" / "val-00000.bin").unlink()


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))


def damage_manifest(folder: Path) -> None:
    path = folder / "first" / "manifest.json"
    path.write_text(path.read_text()[:-9])


def damage_tokenizer_hash(folder: Path) -> None:
    path = folder / "first" / "manifest.json"
    path.write_text(path.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, r"first/train-00000.bin was cut short: \d+ bytes where \d+ belong"),
        (damage_file, r"second/val-00000.bin was cut short: 0 bytes"),
        (damage_tokenizer, r"tokenizer was changed"),
        (damage_manifest, r"first/manifest.json is damaged"),
        (damage_tokenizer_hash, r"first was made with the tokenizer 0"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], None], message: str, made: Recipe, tmp_path: Path
) -> None:
    """Oracle: the error names file, state and way out; nothing is written, by opening or by preparing."""
    folder = prepare(made, tmp_path / "data").folder
    damage(folder)
    before = contents(folder)
    with pytest.raises(DataError, match=f"{message}.*remove .* and prepare again"):
        open_prepared(made, tmp_path / "data" / "made")
    with pytest.raises(DataError, match=message):
        prepare(made, tmp_path / "data")
    assert contents(folder) == before


def flip_bit(path: Path) -> None:
    """Another bit, with the time of change that the file had: as a copy of a damaged file keeps it."""
    times_ns = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times_ns)


def test_verify_finds_one_changed_bit(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that change by themselves leave no trace in the file system: opening trusts it, verify reads every byte."""
    prepared = prepare(made, tmp_path / "data")
    for name in ("first", "second"):
        flip_bit(prepared.folder / name / "train-00000.bin")
    with monkeypatch.context() as patched:
        stamps = _read_stamps(prepared.folder)
        before = {prepared.folder / name: stamp for name, stamp in stamps.items()}
        patched.setattr("ds_slm.data.shards.prepared._stamp", lambda path, sha256: before[path])
        open_prepared(made, tmp_path / "data" / "made")
    with pytest.raises(DataError, match=r"train-00000.bin was changed: sha256 .* prepare again") as caught:
        verify(prepared)
    assert len(caught.value.problems) == 2


def test_an_edited_shard_is_refused_when_opened(made: Recipe, tmp_path: Path) -> None:
    """Oracle: the shard whose time of change differs is read and named; a whole copy with other times is accepted."""
    prepared = prepare(made, tmp_path / "data")
    shutil.copytree(prepared.folder, tmp_path / "copy" / "made", copy_function=shutil.copyfile)
    assert open_prepared(made, tmp_path / "copy" / "made").sha256 == prepared.sha256
    flip_bit(prepared.folder / "first" / "val-00000.bin")
    for _ in range(2):
        with pytest.raises(DataError, match=r"first/val-00000.bin was changed") as caught:
            open_prepared(made, tmp_path / "data" / "made")
        assert len(caught.value.problems) == 1


def test_a_copy_that_keeps_every_time_is_read(made: Recipe, tmp_path: Path) -> None:
    """Oracle: stamps came with the copy, size and time of change as well: a bit that fell over on the way is found."""
    prepared = prepare(made, tmp_path / "data")
    shutil.copytree(prepared.folder, tmp_path / "copy" / "made", copy_function=shutil.copy2)
    assert (tmp_path / "copy" / "made" / STAMPS).is_file()
    flip_bit(tmp_path / "copy" / "made" / "second" / "train-00000.bin")
    with pytest.raises(DataError, match=r"second/train-00000.bin was changed"):
        open_prepared(made, tmp_path / "copy" / "made")


def test_an_edited_source_is_warned_of(made: Recipe, tmp_path: Path) -> None:
    """Oracle: no word while nothing changed; an edit that keeps name and size is told, with the way out."""
    said: list[str] = []
    for _ in range(2):
        prepare(made, tmp_path / "data", report=said.append)
    assert not [line for line in said if line.startswith("warning")]
    path = tmp_path / "two" / "b.jsonl"
    path.write_text(path.read_text().replace("a", "b"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    prepare(made, tmp_path / "data", report=said.append)
    [warning] = [line for line in said if line.startswith("warning")]
    assert warning.startswith("warning: second: its files have changed") and "data/made/second to prepare" in warning


def test_a_tokenizer_of_a_trial_is_warned_of(tmp_path: Path) -> None:
    """Oracle: no word where all text was read; after a trial the real run is told what its tokenizer was trained on."""
    made = recipe(source("first", path=write_jsonl(tmp_path / "one.jsonl", texts(400))), tokenizer=BPE)
    said: list[str] = []
    prepare(made, tmp_path / "data", max_tokens=1_000, report=said.append)
    prepare(made, tmp_path / "data", report=said.append)
    told = [line for line in said if line.startswith("warning: tokenizer was trained for a shorter run, on 0.0 MB")]
    assert told and "to prepare all of it anew" in told[-1]
    said.clear()
    prepare(made, tmp_path / "whole", report=said.append)
    assert not [line for line in said if line.startswith("warning")]


def test_a_tokenizer_of_a_try_that_failed_is_made_anew(tmp_path: Path) -> None:
    """Oracle: the data of a folder where nothing was tried before: other text, or another held-out share, count."""
    few = write_jsonl(tmp_path / "few.jsonl", texts(30, seed=4))
    made = recipe(
        source("first", path=write_jsonl(tmp_path / "one.jsonl", texts(300))), tokenizer=BPE, val_fraction=1e-9
    )
    with pytest.raises(DataError, match="nothing is left for val"):
        prepare(made, tmp_path / "data", sources={"first": few})
    assert (tmp_path / "data" / "made" / "tokenizer").is_dir()
    mended = made.model_copy(update={"data": made.data.model_copy(update={"val_fraction": 0.2})})
    assert prepare(mended, tmp_path / "data").sha256 == prepare(mended, tmp_path / "fresh").sha256


def test_shards_without_their_text(tmp_path: Path) -> None:
    """Oracle: the same data where the text is gone, by recipe and by --source; a path never used is still refused."""
    made = recipe(source("first", path=write_jsonl(tmp_path / "one.jsonl", texts(200))))
    other = write_jsonl(tmp_path / "other.jsonl", texts(200, seed=5))
    whole = prepare(made, tmp_path / "data").sha256
    replaced = prepare(made, tmp_path / "replaced", sources={"first": other}).sha256
    with pytest.raises(DataError, match="does not exist"):
        prepare(made, tmp_path / "data", sources={"first": tmp_path / "typo.jsonl"})
    (tmp_path / "one.jsonl").unlink()
    other.unlink()
    assert prepare(made, tmp_path / "data").sha256 == whole
    assert prepare(made, tmp_path / "replaced", sources={"first": other}).sha256 == replaced != whole


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    """Oracle: the same text by the recipe's path and by --source gives the same hash; other text does not."""
    path = write_jsonl(tmp_path / "one.jsonl", texts(200))
    other = write_jsonl(tmp_path / "other.jsonl", texts(200, seed=5))
    by_path = prepare(recipe(source("first", path=path)), tmp_path / "a")
    made = recipe(source("first", path=other))
    assert prepare(made, tmp_path / "b", sources={"first": path}).sha256 == by_path.sha256
    assert prepare(made, tmp_path / "c").sha256 != by_path.sha256


def test_opening_reads_no_shard_twice(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the hashes that are made."""
    prepared = prepare(made, tmp_path / "data")
    hashed = []
    work = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(file.name), work(file, name))[1])
    open_prepared(made, tmp_path / "data" / "made")
    assert not hashed
    os.utime(prepared.folder / "first" / "train-00000.bin")
    open_prepared(made, tmp_path / "data" / "made")
    assert [Path(name).parent.name for name in hashed] == ["first"]
    open_prepared(made, tmp_path / "data" / "made")
    assert len(hashed) == 1


def test_manifests_of_another_format_are_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: both formats and the way out are named."""
    path = prepare(made, tmp_path / "data").folder / "first" / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {identity.FORMAT}', '"format": 1'))
    with pytest.raises(
        DataError, match=rf"has format 1, this version reads {identity.FORMAT}: remove .*first and prepare again"
    ):
        open_prepared(made, tmp_path / "data" / "made")
