"""Prepared data that were damaged, edited, copied or made by something else: found when opened, and named."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_slm.data import identity, shards
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe
from tests.data_recipes import contents, prepare, two_sources


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
        shards.open_prepared(made, "made", tmp_path / "data")
    with pytest.raises(DataError, match=message):
        prepare(made, tmp_path / "data")
    assert contents(folder) == before


def flip_bit(path: Path, keep_time: bool = False) -> None:
    times_ns = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times_ns if keep_time else (times_ns[0], times_ns[1] + 1))


def test_verify_finds_one_changed_bit(made: Recipe, tmp_path: Path) -> None:
    """Bits that change by themselves leave the time of change alone: opening trusts it, verify reads every byte."""
    prepared = prepare(made, tmp_path / "data")
    for name in ("first", "second"):
        flip_bit(prepared.folder / name / "train-00000.bin", keep_time=True)
    shards.open_prepared(made, "made", tmp_path / "data")
    with pytest.raises(DataError, match=r"train-00000.bin was changed: sha256 .* prepare again") as caught:
        shards.verify(prepared)
    assert len(caught.value.problems) == 2


def test_an_edited_shard_is_refused_when_opened(made: Recipe, tmp_path: Path) -> None:
    """Oracle: the shard whose time of change differs is read and named; a whole copy with other times is accepted."""
    prepared = prepare(made, tmp_path / "data")
    shutil.copytree(prepared.folder, tmp_path / "copy" / "made", copy_function=shutil.copyfile)
    assert shards.open_prepared(made, "made", tmp_path / "copy").sha256 == prepared.sha256
    flip_bit(prepared.folder / "first" / "val-00000.bin")
    for _ in range(2):
        with pytest.raises(DataError, match=r"first/val-00000.bin was changed") as caught:
            shards.open_prepared(made, "made", tmp_path / "data")
        assert len(caught.value.problems) == 1


def test_opening_reads_no_shard_twice(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the hashes that are made."""
    prepared = prepare(made, tmp_path / "data")
    hashed = []
    work = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(file.name), work(file, name))[1])
    shards.open_prepared(made, "made", tmp_path / "data")
    assert not hashed
    os.utime(prepared.folder / "first" / "train-00000.bin")
    shards.open_prepared(made, "made", tmp_path / "data")
    assert [Path(name).parent.name for name in hashed] == ["first"]
    shards.open_prepared(made, "made", tmp_path / "data")
    assert len(hashed) == 1


def test_manifests_of_another_format_are_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: both formats and the way out are named."""
    path = prepare(made, tmp_path / "data").folder / "first" / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {identity.FORMAT}', '"format": 1'))
    with pytest.raises(DataError, match=r"has format 1, this version reads 2: remove .*first and prepare again"):
        shards.open_prepared(made, "made", tmp_path / "data")
