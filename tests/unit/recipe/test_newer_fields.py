"""A field that is new in a section changes no hash, and no data that are prepared, until somebody sets it."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest

from ds_slm.data.shards import identity
from ds_slm.recipe import effects, loading
from ds_slm.recipe.data_sections import Data, Source, Tokenizer
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.section import NEWER
from ds_slm.recipe.sections import Model

EARLIER = {"sha256": "0", "vocab_size": 4096, "eos_id": 0, "pad_id": 1, "cut_at_bytes": {}}
"""What else a tokenizer's manifest must say."""


class _Model(Model):
    made_up: Annotated[float, NEWER] = 0.5


class _Tokenizer(Tokenizer):
    made_up: Annotated[str | None, NEWER] = None


class _Source(Source):
    made_up: Annotated[list[str], NEWER] = []


class _Data(Data):
    source: list[_Source]  # pyright: ignore[reportIncompatibleVariableOverride]


class _Recipe(Recipe):
    """What a recipe would be after somebody has added a field to three sections."""

    model: _Model
    tokenizer: _Tokenizer
    data: _Data


def tables_of_demo() -> dict[str, Any]:
    return loading.load("demo").model_dump(exclude_none=True)


def identities(recipe: Recipe) -> dict[str, Any]:
    return {
        "recipe": recipe.identity_sha256(),
        "source": identity.source_identity(recipe, recipe.data.source[0]),
        "tokenizer": identity.tokenizer_identity(recipe),
    }


def write_manifest(folder: Path, of: dict[str, Any]) -> None:
    """A tokenizer that an earlier version has prepared."""
    (folder / identity.TOKENIZER).mkdir()
    manifest = {"format": identity.FORMAT, "identity": of, **EARLIER}
    (folder / identity.TOKENIZER / identity.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["demo", "slm-10m", "slm-124m", "axiom-380m"])
def test_a_new_field_at_its_default_changes_no_identity(name: str) -> None:
    """Oracle: the identities of the recipe whose sections lack it."""
    recipe = loading.load(name)
    later = _Recipe.model_validate(recipe.model_dump(exclude_none=True))
    assert later.model.made_up == 0.5
    assert identities(later) == identities(recipe)


def test_a_new_field_is_in_the_resolved_recipe_of_a_run() -> None:
    """Oracle: only hashes leave it out; what a run has recorded holds every key."""
    later = _Recipe.model_validate(tables_of_demo())
    assert "made_up = 0.5" in loading.to_toml(later)


@pytest.mark.parametrize(
    ("section", "changed"),
    [("model", {"recipe"}), ("tokenizer", {"recipe", "source", "tokenizer"}), ("source", {"recipe", "source"})],
)
def test_a_new_field_that_is_set_changes_what_it_decides(section: str, changed: set[str]) -> None:
    """Oracle: a model decides the result alone, a tokenizer all ids, a source its shards and a trained tokenizer."""
    tables = tables_of_demo()
    table = tables["data"]["source"][0] if section == "source" else tables[section]
    table["made_up"] = {"model": 0.25, "tokenizer": "something", "source": ["something"]}[section]

    before, after = identities(loading.load("demo")), identities(_Recipe.model_validate(tables))
    changed = changed | ({"tokenizer"} if section == "source" else set())
    assert {part for part in before if before[part] != after[part]} == changed


def test_data_of_an_earlier_version_are_not_refused(tmp_path: Path) -> None:
    """Oracle: no problem is told of a tokenizer that was prepared before the field was there."""
    write_manifest(tmp_path, identity.tokenizer_identity(loading.load("demo")))
    assert identity.conflicts(_Recipe.model_validate(tables_of_demo()), tmp_path, {}, {}) == []


@pytest.mark.parametrize(
    ("was", "difference"),
    [
        ({"made_up": "something"}, "tokenizer.made_up was 'something', is absent"),
        ({"made_up": None}, "tokenizer.made_up was None, is absent"),
        ({"path": "p"}, "tokenizer.path was 'p', is None"),
    ],
)
def test_a_difference_is_named_where_one_side_has_nothing(was: dict[str, Any], difference: str, tmp_path: Path) -> None:
    """Oracle: what a user needs to know of a folder that is refused: which field, what it was, what it is."""
    recipe = loading.load("demo")
    made = identity.tokenizer_identity(recipe)
    write_manifest(tmp_path, made | {"tokenizer": made["tokenizer"] | was})
    assert f"belongs to another recipe ({difference}): " in identity.conflicts(recipe, tmp_path, {}, {})[0]


def test_a_difference_is_named_where_the_folder_lacks_a_field_that_is_none(tmp_path: Path) -> None:
    """Oracle: None is a value; the parentheses are never empty."""
    recipe = loading.load("demo")
    made = identity.tokenizer_identity(recipe)
    del made["tokenizer"]["path"]
    write_manifest(tmp_path, made)
    assert "(tokenizer.path was absent, is None): " in identity.conflicts(recipe, tmp_path, {}, {})[0]


def test_a_run_of_an_earlier_version_gets_no_new_warnings() -> None:
    """Oracle: its recipe holds every key that it knew, so that a key was set is not known of it."""
    recorded = loading.load("demo").model_dump(exclude_none=True)
    later = _Recipe.model_validate(recorded)
    assert effects.warnings(later) == effects.warnings(Recipe.model_validate(recorded)) == []
