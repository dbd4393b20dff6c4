"""The model card of a run that trained a public model further."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.told_runs import recipe_of, write_run

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

BEGAN: dict[str, Any] = {"base": "Public-1", "base_sha256": "ba" * 32}


def test_a_model_that_was_trained_further_says_so(tmp_path: Path, export: Any) -> None:
    """Oracle: the name and the hash in env.json; what holds of a model from scratch alone is not said."""
    reproduces = 'card.reproduces="Another"'
    alone = export(write_run(tmp_path / "alone", recipe_of(reproduces)))
    assert "trained from scratch" in alone and "It reproduces Another" in alone and "BASE" not in alone

    card = export(write_run(tmp_path / "run", recipe_of(reproduces), **BEGAN))
    assert "trained further from `Public-1` on" in card and "The tokenizer is the base model's" in card
    assert "scratch" not in card and "It reproduces" not in card
    assert "--recipe told.toml --base BASE" in card and "BASE is the folder of `Public-1`." in card
    assert "| base | `" + "ba" * 32 in card
    assert "to what the base had seen" in card
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_its_base_stands_in_the_head_by_its_id(tmp_path: Path, export: Any) -> None:
    """Oracle: the keys that the hub reads, where the id is given."""
    run = write_run(tmp_path / "run", recipe_of(), **BEGAN)
    card = export(run, "--set", "card.base_model=org/Public-1")
    head = ModelCard(card).data.to_dict()
    assert (head["base_model"], head["base_model_relation"]) == ("org/Public-1", "finetune")
    assert "trained further from `org/Public-1`" in card


def test_a_base_that_a_card_cannot_name_in_code(tmp_path: Path, export: Any) -> None:
    """Oracle: backticks of a folder's name are no markup."""
    card = export(write_run(tmp_path / "run", recipe_of(), **{**BEGAN, "base": "a`b"}))
    assert "trained further from a\\`b on" in card


def test_a_fine_tuned_model_names_a_base_that_is_not_on_the_hub(tmp_path: Path, export: Any) -> None:
    """Oracle: the name in env.json; an older run has none."""
    run = write_run(tmp_path / "run", recipe_of(kind="tiny-instruct"), **BEGAN)
    assert "fine-tuned from `Public-1` on" in export(run)
    older = write_run(tmp_path / "older", recipe_of(kind="tiny-instruct"))
    assert "fine-tuned from a base model on" in export(older)
