"""The commands and hashes of a model card that make the model again. Oracles: run folders that are known."""

import re
from pathlib import Path
from typing import Any

import pytest

from ds_slm.publish.card.facts import RunFacts
from ds_slm.publish.card.rerun import rerun
from ds_slm.recipe import loading
from tests.support.cards import section
from tests.support.told_runs import recipe_of, write_run


def test_a_recipe_in_the_card_can_be_trained_again(tmp_path: Path, export: Any) -> None:
    """Oracle: the TOML of the card, read back, has the hash that the card states."""
    recipe = recipe_of("data.source.1.path=/secret/place/corpus.jsonl")
    text = section(export(write_run(tmp_path / "run", recipe)), "Make it again")
    (found,) = re.findall(r"```toml\n(.+?)\n```", text, re.S)
    assert f"`{loading.parse(found).identity_sha256()}`" in text


def test_the_librarys_recipe_needs_no_copy(tmp_path: Path, export: Any) -> None:
    """Oracle: its name in the command, and no TOML."""
    recipe = loading.load("demo")
    facts = RunFacts(recipe, 800, "", {}, {"recipe_name": "demo"}, (), {}, {})
    text = "\n".join(rerun(facts))
    assert "deepspeed ds_slm/pretrain.py --recipe demo\n" in text and "toml" not in text


def test_data_that_were_cut_are_cut_again(tmp_path: Path, export: Any) -> None:
    """Oracle: the flags that the data were prepared with, by hand."""
    run = write_run(tmp_path / "run", recipe_of(), replaced_sources=["b"], max_tokens=4_000)
    assert re.search(r"ds-slm prepare \S+ --source b=FILES --max-tokens 4000\n", export(run))


@pytest.mark.parametrize("path", [".", "/", "texts"])
def test_any_path_of_a_source_leaves_a_recipe(tmp_path: Path, export: Any, path: str) -> None:
    """Oracle: the TOML of the card is a recipe, and the reader is told to put in a path."""
    recipe = recipe_of(f"data.source.1.path={path}")
    text = section(export(write_run(tmp_path / "run", recipe)), "Make it again")
    (found,) = re.findall(r"```toml\n(.+?)\n```", text, re.S)
    assert loading.parse(found).data.source[1].path in ("FILES", "texts") and "put in your own" in text


def test_rows_that_were_left_out_are_left_out_again() -> None:
    """Oracle: the flags of the launch, by hand."""
    state = {"skipped_rows": [[3, 9], [9, 12], [60, 64]]}
    facts = RunFacts(loading.load("demo"), 800, "", state, {"recipe_name": "demo"}, (), {}, {})
    assert "--recipe demo --skip-rows 3:12 --skip-rows 60:64\n" in "\n".join(rerun(facts))
