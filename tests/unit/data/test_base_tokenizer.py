"""Text for a model that is trained further: its recipe's tokenizer must give the ids of the model's own."""

import json
from pathlib import Path

import pytest

from ds_slm.data.shards.prepare import prepare
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.shards.writer import DocumentFormat
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import BPE, recipe, source, texts, write_jsonl
from tests.support.scored_models import with_bos, write_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts a BOS before each text, as a Llama's does."""
    folder = tmp_path_factory.mktemp("base")
    return with_bos(write_tokenizer(folder / "plain", texts(300)), folder / "with-bos")


def recipe_of(tmp_path: Path, tokenizer: str) -> Recipe:
    return recipe(source("a", path=write_jsonl(tmp_path / "a.jsonl", texts(60, seed=9))), tokenizer=tokenizer)


def of_folder(folder: Path) -> str:
    return f'kind = "hf"\nvocab_size = {load_tokenizer(folder).vocab_size}\npath = {json.dumps(str(folder))}'


def prepare_for(recipe: Recipe, data_root: Path, base: Path) -> Prepared:
    return prepare(
        recipe, data_root / "a", report=lambda line: None, document_format=DocumentFormat(tokenizer_of_base=base)
    )


def test_a_tokenizer_of_the_same_ids_is_accepted(base: Path, tmp_path: Path) -> None:
    """Oracle: the ids of the base's tokenizer without its BOS, whether or not the data were there before."""
    ours = recipe_of(tmp_path, of_folder(base))
    earlier = prepare(ours, tmp_path / "earlier" / "a", report=lambda line: None)
    assert earlier.sha256 == prepare_for(ours, tmp_path / "earlier", base).sha256
    prepared = prepare_for(ours, tmp_path / "data", base)
    assert prepared.sha256 == earlier.sha256

    text = "the cat is 5. <|bos|>"
    found = load_tokenizer(prepared.tokenizer_folder)
    assert found.encode(text) == load_tokenizer(base).encode(text)
    assert found.sha256 != load_tokenizer(base).sha256


@pytest.mark.parametrize("when", ["prepared before", "not prepared"])
def test_a_tokenizer_of_other_ids_is_refused_before_its_shards_are_made(when: str, base: Path, tmp_path: Path) -> None:
    """Oracle: the keys of the recipe that would do, and no shard unless there were some."""
    ours = recipe_of(tmp_path, BPE)
    if when == "prepared before":
        prepare(ours, tmp_path / "data" / "a", report=lambda line: None)
    with pytest.raises(DataError) as caught:
        prepare_for(ours, tmp_path / "data", base)
    said = str(caught.value)
    assert "gives other ids" in said and "tokenizer.kind = 'hf'" in said and repr(str(base)) in said
    assert bool(list((tmp_path / "data").rglob("*.bin"))) == (when == "prepared before")

    # The way out works.
    again = tmp_path / ("other" if when == "prepared before" else "data")
    assert prepare_for(recipe_of(tmp_path, of_folder(base)), again, base).train_tokens > 0
