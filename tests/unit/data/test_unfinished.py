"""Preparations that did not end, and what they leave to the next one."""

from pathlib import Path

import pytest

from ds_slm.data.shards.prepared import open_prepared
from ds_slm.errors import DataError
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from sft.prepare import prepare_conversations
from tests.support import conversations
from tests.support.data_recipes import contents, prepare, recipe, source, texts, write_jsonl


def two_sources(folder: Path, val_fraction: float) -> Recipe:
    """A long source, and one of so few documents that a small `val_fraction` holds none of them out."""
    long, short = folder / "long.jsonl", folder / "short.jsonl"
    if not long.exists():
        write_jsonl(long, texts(3_000))
        write_jsonl(short, texts(20, seed=1))
    return recipe(source("long", path=long), source("short", path=short), val_fraction=val_fraction)


def test_a_preparation_that_failed_does_not_bind_the_next(tmp_path: Path) -> None:
    """Oracle: the bytes that the same recipe gives in an empty folder; what is made anew is said."""
    with pytest.raises(DataError, match=r"source 'short': nothing is left for val.*another --set data.val_fraction"):
        prepare(two_sources(tmp_path, 0.002), tmp_path / "data")
    assert (tmp_path / "data" / "made" / "long" / "manifest.json").is_file()

    lines: list[str] = []
    other = two_sources(tmp_path, 0.2)
    prepared = prepare(other, tmp_path / "data", report=lines.append)
    assert any("long, tokenizer of an earlier preparation, which did not end, had other settings" in x for x in lines)
    prepare(other, tmp_path / "fresh")
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")
    assert prepared.sha256 == open_prepared(other, tmp_path / "fresh" / "made").sha256


def test_the_same_recipe_goes_on_with_what_is_there(tmp_path: Path) -> None:
    """Oracle: the manifest of the source that was whole is the same file as before."""
    failing = two_sources(tmp_path, 0.002)
    manifest = tmp_path / "data" / "made" / "long" / "manifest.json"
    inodes = []
    for _ in range(2):
        with pytest.raises(DataError, match="nothing is left for val"):
            prepare(failing, tmp_path / "data")
        inodes.append(manifest.stat().st_ino)
    assert inodes[0] == inodes[1]


def test_a_preparation_that_ended_is_kept(tmp_path: Path) -> None:
    """Oracle: its files, byte by byte, though a source that was added later failed; the refusal names the way out."""
    both = two_sources(tmp_path, 0.002)
    first = both.model_copy(update={"data": both.data.model_copy(update={"source": both.data.source[:1]})})
    fixed = {"tokenizer": both.tokenizer.model_copy(update={"kind": "hf", "path": str(tmp_path / "ready")})}
    prepare(first, tmp_path / "data").tokenizer_folder.rename(tmp_path / "ready")
    first, both = (one.model_copy(update=fixed) for one in (first, both))
    prepare(first, tmp_path / "other")
    before = contents(tmp_path / "other")

    with pytest.raises(DataError, match="nothing is left for val"):
        prepare(both, tmp_path / "other")
    held_out_more = both.model_copy(update={"data": both.data.model_copy(update={"val_fraction": 0.2})})
    with pytest.raises(DataError, match=r"made/long belongs to another recipe \(data.val_fraction was 0.002, is 0.2"):
        prepare(held_out_more, tmp_path / "other")
    assert contents(tmp_path / "other") == before


def test_conversations_that_failed_bind_neither_a_share_nor_a_base(tmp_path: Path) -> None:
    """Oracle: another held-out share and another base's tokenizer are taken; the tokenizer is the other base's."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made(1))
    with pytest.raises(DataError, match="nothing is left for"):
        conversations.rows(path, tmp_path)
    conversations.write(path, conversations.made())
    conversations.tokenizer(seed=1).save(tmp_path / "other")
    text = conversations.TINY.replace("SOURCE", str(path)).replace("val_fraction = 0.1", "val_fraction = 0.2")
    made = loading.parse(text)
    prepared = prepare_conversations(made, tmp_path / "data" / "tiny", tmp_path / "other", report=lambda line: None)
    assert prepared.tokenizer_sha256 == conversations.tokenizer(seed=1).sha256
