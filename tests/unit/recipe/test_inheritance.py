"""`base = "NAME"`: what a recipe takes from another one."""

from pathlib import Path

import pytest

from ds_slm.errors import RecipeError
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Schedule

HEAD = '[card]\nname = "mine"\n'


def write(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return str(path)


def test_only_the_keys_that_are_written_differ(tmp_path: Path) -> None:
    """Oracle: the base with the same keys as overrides; its card, targets and unstated choices are not inherited."""
    found = loading.load(write(tmp_path, f'base = "slm-10m"\n{HEAD}[optimizer]\nlr = 1e-3\n[train]\nsteps = 70_000\n'))
    expected = loading.load("slm-10m", ["optimizer.lr=1e-3", "train.steps=70000"])
    assert found.identity() == expected.identity()
    assert (found.card.name, found.card.reproduces, found.targets, found.unstated) == ("mine", "", [], {})


def test_sources_are_replaced_whole(tmp_path: Path) -> None:
    """Oracle: the sources written, where the base has four."""
    text = f'base = "slm-10m"\n{HEAD}[[data.source]]\nname = "own"\nkind = "files"\npath = "text"\n'
    sources = loading.load(write(tmp_path, text)).data.source
    assert [one.name for one in sources] == ["own"]


def test_a_section_of_another_kind_is_replaced_whole(tmp_path: Path) -> None:
    """Oracle: a cosine schedule over the demo's WSD: none of its decay is left, so nothing is without effect."""
    text = f'base = "demo"\n{HEAD}[schedule]\nkind = "cosine"\nwarmup_steps = 7\n'
    schedule = loading.load(write(tmp_path, text)).schedule
    assert schedule == Schedule(kind="cosine", warmup_steps=7)


def test_a_base_may_have_a_base_and_lie_beside_the_recipe(tmp_path: Path) -> None:
    """Oracle: the nearest recipe that says a key is heeded; a relative path is the recipe's, not the user's."""
    (tmp_path / "below").mkdir()
    write(tmp_path, f'base = "demo"\n{HEAD}[train]\nsteps = 500\nseed = 3\n', "middle")
    name = write(tmp_path / "below", f'base = "../middle.toml"\n{HEAD}[train]\nsteps = 600\n')
    found = loading.load(name)
    assert (found.train.steps, found.train.seed) == (600, 3)
    assert found.model == loading.load("demo").model


def test_what_is_inherited_is_listed(tmp_path: Path) -> None:
    """Oracle: by hand, of a recipe that writes all but a few keys of the demo."""
    name = write(tmp_path, f'base = "demo"\n{HEAD}[model]\nhidden_size = 96\n[run]\neval_rows = 8\n')
    found = loading.inherited(name)
    assert "model.intermediate_size = 512" in found and "run.eval_every_steps = 200" in found
    assert "data.source = 1 of them" in found and "train.gradient_checkpointing = true" in found
    assert not [one for one in found if one.startswith(("model.hidden_size", "run.eval_rows", "card"))]
    assert loading.inherited("demo") == []


def test_what_a_run_records_is_whole(tmp_path: Path) -> None:
    """Oracle: the recipe in the run folder reads back equal, and names no base."""
    recipe = loading.load("demo-instruct")
    assert "base" not in loading.to_toml(recipe)
    assert loading.parse(loading.to_toml(recipe)) == recipe


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ('"slm-10n"', ["slm-10n", "slm-10m"]),
        ('"mine.toml"', ["cannot be its own base"]),
        ("7", ["base = 7", "expected the name of a recipe"]),
        ('"broken.toml"', ["broken.toml", "is not TOML"]),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path: Path, base: str, told: list[str]) -> None:
    """Oracle: what is wrong, in one sentence."""
    write(tmp_path, "= 3", "broken")
    with pytest.raises(RecipeError) as refused:
        loading.load(write(tmp_path, f"base = {base}\n{HEAD}"))
    for part in told:
        assert part in str(refused.value)


def test_a_mistake_in_what_is_inherited_is_found(tmp_path: Path) -> None:
    """Oracle: a combination that is wrong only together: heads of the child on the hidden size of the base."""
    with pytest.raises(RecipeError, match="num_attention_heads"):
        loading.load(write(tmp_path, f'base = "demo"\n{HEAD}[model]\nnum_attention_heads = 5\n'))


def test_a_base_that_is_missing_is_named_with_the_recipe_that_wants_it(tmp_path: Path) -> None:
    """Oracle: by hand: of a chain, the file and the key in which the wrong name stands."""
    middle = write(tmp_path, f'base = "dmeo"\n{HEAD}', "middle")
    name = write(tmp_path, f'base = "middle.toml"\n{HEAD}')
    with pytest.raises(RecipeError) as raised:
        loading.load(name)
    (said,) = raised.value.problems
    assert said.startswith("recipe 'middle.toml': base = 'dmeo': no such recipe and no such .toml file")
    assert "the nearest is 'demo'" in said and Path(middle).is_file()
