"""Which prepared folders a launch may send and receive: a host's own work is never in the way of another's."""

from pathlib import Path

import pytest

from ds_slm.data.shards.prepare import needed_folders
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import BPE, prepare, recipe, source, texts, write_jsonl


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    return recipe(source("a", path=write_jsonl(tmp_path / "a.jsonl", texts(60))), tokenizer=BPE)


def test_what_is_whole_and_what_is_not_there(made: Recipe, tmp_path: Path) -> None:
    """Oracle: the files of the folder itself, its manifest last; nothing before it is prepared."""
    before = needed_folders(made, tmp_path / "data" / "mine")
    assert [(one.name, one.files, one.is_absent) for one in before] == [
        ("mine/tokenizer", None, True), ("mine/a", None, True),
    ]  # fmt: skip

    folder = prepare(made, tmp_path / "data").folder
    for one in needed_folders(made, tmp_path / "data" / folder.name):
        assert one.files is not None and one.files[-1] == "manifest.json" and not one.is_absent
        assert set(one.files) == {path.name for path in one.path.iterdir()}


@pytest.mark.parametrize("damage", ["another recipe", "a damaged manifest"])
def test_what_something_else_made_is_neither_sent_nor_replaced(made: Recipe, tmp_path: Path, damage: str) -> None:
    """Oracle: preparing refuses it, too."""
    folder = prepare(made, tmp_path / "data").folder
    asked = made
    if damage == "another recipe":
        asked = made.model_copy(update={"data": made.data.model_copy(update={"val_fraction": 0.5})})
    else:
        (folder / "a" / "manifest.json").write_text("{")
    found = needed_folders(asked, tmp_path / "data" / folder.name)
    assert [(one.files, one.is_absent) for one in found] == [(None, False)] * 2
