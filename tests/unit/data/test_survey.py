"""What a text holds, before it is prepared. The oracle is preparing it."""

import json
import random
from pathlib import Path

import pytest

from ds_slm.data.survey import FEW_DOCUMENTS, HELD_OUT, survey
from ds_slm.errors import DataError
from ds_slm.recipe import loading, own_text
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import prepare, write_jsonl
from tests.support.source_files import files_source

DEMO = loading.load("demo")


def words(count: int, seed: int = 0) -> str:
    """Text with enough different words for a vocabulary of some thousand ids."""
    draw = random.Random(seed)
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "r", "s")]
    return " ".join("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(count))


@pytest.mark.parametrize(("documents", "words_each"), [(400, 300), (3, 40_000), (1, 100_000)])
def test_counts_are_those_of_the_prepared_data(documents: int, words_each: int, tmp_path: Path) -> None:
    """Preparing with the fraction that was chosen gives the tokens and the held-out share that were foretold."""
    file = write_jsonl(tmp_path / "text.jsonl", [words(words_each, seed) for seed in range(documents)])
    found = survey(files_source(file), DEMO)

    recipe_file = tmp_path / "mine.toml"
    recipe_file.write_text(own_text.as_toml("mine", "demo", DEMO, found, own_text.fit(DEMO, found)), encoding="utf-8")
    prepared = prepare(loading.load(str(recipe_file)), tmp_path / "data")

    assert found.documents == documents
    assert prepared.train_tokens == pytest.approx(found.train_tokens, rel=0.03)
    share = prepared.val_tokens / (prepared.val_tokens + prepared.train_tokens)
    assert share == pytest.approx(found.held_out_share, rel=0.05)
    if documents > 1:
        held_out = json.loads((prepared.folder / "text" / "manifest.json").read_text())["documents"]["val"]
        assert found.held_out_documents == held_out
    else:
        assert found.held_out_documents == 0


def test_many_documents_are_held_out_by_share_alone(tmp_path: Path) -> None:
    """More than are looked at one by one; the hash spreads them evenly."""
    file = write_jsonl(
        tmp_path / "text.jsonl", [f"{number} {words(20, number)}" for number in range(FEW_DOCUMENTS + 1)]
    )
    found = survey(files_source(file), DEMO)
    assert (found.val_fraction, found.held_out_share) == (HELD_OUT, HELD_OUT)


def test_documents_that_cannot_be_parted_are_refused(tmp_path: Path) -> None:
    """The same text twice has one hash."""
    file = write_jsonl(tmp_path / "text.jsonl", [words(5_000)] * 2)
    with pytest.raises(DataError, match="cannot be parted"):
        survey(files_source(file), DEMO)


def test_a_held_out_part_of_a_few_words_is_refused(tmp_path: Path) -> None:
    """A book and a note: either the note is held out, or the book; neither says anything of a model."""
    file = write_jsonl(tmp_path / "text.jsonl", [words(40_000), "Read me."])
    with pytest.raises(DataError, match="cannot be parted"):
        survey(files_source(file), DEMO)


def test_one_document_beside_an_empty_one_is_refused(tmp_path: Path) -> None:
    """Preparing cuts a document in two only where it is the only one, empty ones counted."""
    file = write_jsonl(tmp_path / "text.jsonl", [words(40_000), ""])
    with pytest.raises(DataError, match="cannot be parted"):
        survey(files_source(file), DEMO)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    """Documents of blanks alone."""
    file = write_jsonl(tmp_path / "text.jsonl", ["  ", ""])
    with pytest.raises(DataError, match="holds no text"):
        survey(files_source(file), DEMO)


def test_a_run_that_goes_on_is_counted_in_its_own_tokenizer(tmp_path: Path) -> None:
    """Oracle: preparing the new text in the vocabulary of another, which fits it badly."""
    old = files_source(write_jsonl(tmp_path / "old.jsonl", [words(300, seed) for seed in range(400)]))
    known, old_recipe = survey(old, DEMO), tmp_path / "old.toml"
    old_recipe.write_text(own_text.as_toml("old", "demo", DEMO, known, own_text.fit(DEMO, known)), encoding="utf-8")
    run = prepare(loading.load(str(old_recipe)), tmp_path / "data").folder

    base = own_text.with_tokenizer_of(run, DEMO)
    new = files_source(write_jsonl(tmp_path / "new.jsonl", [words(300, seed).upper() for seed in range(400)]))
    found = survey(new, base)
    assert found.bytes_per_token < 0.7 * survey(new, DEMO).bytes_per_token
    tables = {**DEMO.model_dump(), "tokenizer": base.tokenizer, "data": {**DEMO.data.model_dump(), "source": [new]}}
    prepared = prepare(Recipe.model_validate(tables), tmp_path / "more")
    assert prepared.train_tokens + prepared.val_tokens == pytest.approx(
        found.text_bytes / found.bytes_per_token, rel=0.01
    )
