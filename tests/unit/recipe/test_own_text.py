"""What follows from an amount of text: arithmetic, and a recipe that can be read."""

from pathlib import Path

import pytest

from ds_slm.errors import DataError
from ds_slm.recipe import loading, own_text, plan
from ds_slm.recipe.own_text import Text, TooLittleText, as_toml, fit
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe

PRETRAINING = [name for name in loading.library_names() if loading.load(name).sft is None]


def text(tokens: int, ids: int = 200_000) -> Text:
    """A text of so many tokens."""
    return Text(
        path='my "texts"', column="text", documents=2, text_bytes=tokens, learnable_ids=ids, bytes_per_token=1.0,
        val_fraction=0.02, held_out_share=0.0, beginnings=("Once upon a time", 'He said "no"'),
    )  # fmt: skip


def made(base_name: str, tokens: int, folder: Path, wanted: int | None = None) -> tuple[Recipe, own_text.Fit]:
    """The recipe for a text, read back."""
    base = loading.load(base_name)
    chosen = fit(base, text(tokens), wanted)
    file = folder / "mine.toml"
    file.write_text(as_toml("mine", base_name, base, text(tokens), chosen), encoding="utf-8")
    return loading.load(str(file)), chosen


@pytest.mark.parametrize("base_name", PRETRAINING)
@pytest.mark.parametrize("tokens", [30_000_000, 3_000_000_000])
def test_every_recipe_can_be_a_base(base_name: str, tokens: int, tmp_path: Path) -> None:
    """The recipe has no warning, the base's model, and a run that ends where its schedule does."""
    recipe, chosen = made(base_name, tokens, tmp_path)
    base = loading.load(base_name)

    assert plan.warnings(recipe) == []
    assert recipe.model == base.model
    assert recipe.data.source[0].path == 'my "texts"'
    assert recipe.train.steps * recipe.train.global_batch_tokens <= chosen.tokens
    assert learning_rate(recipe, recipe.train.steps) == pytest.approx(recipe.optimizer.min_lr)
    if recipe.tokenizer.kind == "bpe":
        assert {"<|im_start|>", "<|im_end|>"} <= recipe.tokenizer.special_tokens.keys()


def test_text_is_read_four_times_at_most(tmp_path: Path) -> None:
    """The base's 25 billion tokens would be 833 epochs of thirty million."""
    recipe, chosen = made("slm-10m", 30_000_000, tmp_path)
    assert chosen.epochs == 4
    assert recipe.train.steps * recipe.train.global_batch_tokens == pytest.approx(120_000_000, rel=0.01)


@pytest.mark.parametrize("base_name", PRETRAINING)
def test_as_much_text_as_the_base_has_keeps_its_batch_and_rates(base_name: str, tmp_path: Path) -> None:
    """Nothing is scaled where nothing differs."""
    base = loading.load(base_name)
    recipe, _ = made(base_name, 25_000_000_000, tmp_path)
    assert (recipe.train.steps, recipe.rows_per_step) == (base.train.steps, base.rows_per_step)
    assert (recipe.optimizer.lr, recipe.schedule) == (base.optimizer.lr, base.schedule)


def test_tokens_that_are_asked_for_are_taken(tmp_path: Path) -> None:
    """--tokens, beyond four epochs as well."""
    recipe, chosen = made("demo", 1_000_000, tmp_path, wanted=10_000_000)
    assert chosen.epochs == 10
    assert recipe.train.steps * recipe.train.global_batch_tokens == pytest.approx(10_000_000, rel=0.01)


def test_too_little_text_is_refused_with_all_that_is_missing() -> None:
    """A vocabulary that cannot be learned, and hardly a step; every problem at once."""
    with pytest.raises(TooLittleText) as refused:
        fit(loading.load("slm-10m"), text(5_000, ids=700))
    problems = "\n".join(refused.value.problems)
    assert "700 ids, and 8,192" in problems
    assert "1 steps of 16 rows" in problems


def test_too_few_tokens_that_were_asked_for_are_no_lack_of_text() -> None:
    """The text would do: it is --tokens that is too small."""
    with pytest.raises(DataError, match="leave it out") as refused:
        fit(loading.load("demo"), text(1_000_000), 1_000)
    assert not isinstance(refused.value, TooLittleText) and "too little" not in str(refused.value)


def test_hardly_any_text_is_refused_in_a_sentence() -> None:
    """Not a token to train on."""
    with pytest.raises(DataError, match="too little text"):
        fit(loading.load("demo"), text(0))


def test_the_split_is_the_one_that_was_surveyed(tmp_path: Path) -> None:
    """A base that draws its held-out documents row by row: the fraction was chosen for hashes."""
    base = loading.load("demo", ['data.held_out="draw"'])
    chosen = fit(base, text(3_000_000))
    assert 'held_out = "hash"' in as_toml("mine", "demo", base, text(3_000_000), chosen)


def test_what_fits_is_the_largest_model_that_is_trained_well() -> None:
    """20 tokens a parameter, each read four times: 60 million tokens are enough for ten million parameters."""
    assert "--from slm-10m" in own_text.what_fits(text(60_000_000))
    assert "--from axiom-380m" in own_text.what_fits(text(2_000_000_000))
