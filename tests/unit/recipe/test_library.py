"""Numbers of a recipe that no part of the program could use: refused when the recipe is read, never met later."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_slm.data.rows import PretrainRows
from ds_slm.errors import RecipeError, UserError
from ds_slm.recipe import loading, plan
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe, section_in
from ds_slm.recipe.section import Section
from ds_slm.recipe.times import Topology
from tests.support import data_recipes, runs

EXTREMES = ("-1", "0", "1", "9223372036854775807", "9223372036854775808", f"-1{'0' * 80}", "1e308", "5e-324", "-0.5")


def numbers(section: type[Section], place: str = "") -> Iterator[str]:
    """Every field of a recipe that holds a number."""
    for key, info in section.model_fields.items():
        kind = str(info.annotation)
        if child := section_in(info.annotation):
            yield from numbers(child, f"{place}{key}." + ("0." if "list" in kind else ""))
        elif "int" in kind or "float" in kind:
            yield place + key


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("numbers"))


FIELDS = [field for field in numbers(Recipe) if not field.startswith(("sft", "targets"))]


@pytest.mark.parametrize("field", FIELDS)
def test_any_number_is_planned_with_or_refused(field: str, tiny: Path) -> None:
    """Oracle: a plan and a learning rate, or an error that is told; any other exception fails the test."""
    for value in EXTREMES:
        try:
            recipe = loading.parse(tiny.read_text(), [f"{field}={value}"])
            plan.plan(recipe, "tiny", {"zero_optimization": {"stage": 1}}, Topology(2))
            plan.plan(recipe, "tiny", {"zero_optimization": {"stage": 3}}, Topology(2, nodes=2))
            assert learning_rate(recipe, recipe.train.steps) >= 0
        except UserError as error:
            assert field.rpartition(".")[2] in str(error)


@pytest.mark.parametrize("held_out", ["hash", "draw"])
@pytest.mark.parametrize("seed", [-(1 << 63), -1, 0, (1 << 32) - 1, 1 << 32, (1 << 63) - 1])
def test_any_seed_prepares_or_is_refused(held_out: str, seed: int, tiny: Path, tmp_path: Path) -> None:
    """Oracle: numpy's range for its legacy generator; a hash has no such limit."""
    overrides = [f"data.held_out={held_out}", f"data.split_seed={seed}", f"train.seed={seed}"]
    if held_out == "draw" and not 0 <= seed < 1 << 32:
        with pytest.raises(
            RecipeError, match=rf"split_seed = {seed} is no seed of held_out = 'draw': .*0 to 4294967295"
        ):
            loading.parse(tiny.read_text(), overrides)
        return
    recipe = loading.parse(tiny.read_text(), overrides)
    rows = PretrainRows(recipe, data_recipes.prepare(recipe, tmp_path))
    assert len(set(rows.row_ids(0))) == recipe.rows_per_step


def test_whole_numbers_of_more_than_64_bits_are_refused_by_field(tiny: Path) -> None:
    """Oracle: TOML's range."""
    for field, sign in itertools.product(("train.steps", "data.split_seed"), ("", "-")):
        with pytest.raises(RecipeError, match=rf"{field}: got a whole number of more than 64 bits"):
            loading.parse(tiny.read_text(), [f"{field}={sign}{1 << 70}"])


def test_a_mix_that_fits_into_no_memory_is_refused(tiny: Path) -> None:
    """Oracle: the rows of one cycle; a common divisor does not count."""
    source = '[[data.source]]\nname = "two"\nkind = "builtin"\n'
    text = tiny.read_text().replace("[optimizer]", source + "[optimizer]")
    loading.parse(text, ["data.source.0.weight=2000000000", "data.source.1.weight=1000000000"])
    with pytest.raises(RecipeError, match=r"add up to 2,000,000,001 .* round them"):
        loading.parse(text, ["data.source.0.weight=2000000000", "data.source.1.weight=1"])
