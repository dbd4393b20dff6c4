"""The Python of a model card, run as it stands with the folder in place of the name."""

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ds_slm.recipe.sections import Eval
from tests.support.told_runs import recipe_of, write_run

pytestmark = pytest.mark.usefixtures("one_thread", "offline")


def snippet_of(card: str) -> str:
    """The Python of the card."""
    (found,) = re.findall(r"```python\n(.+?)\n```", card, re.S)
    return found


def run_snippet(card: str, folder: Path) -> str:
    """What the card's Python prints, with the folder in place of the name."""
    code = snippet_of(card)
    ((name, literal),) = re.findall(r"^(name = )(\"[^\"]*\")", code, re.M)
    assert ast.literal_eval(literal) == folder.name
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace(f"{name}{literal}", f"{name}{str(folder)!r}"), {})
    return printed.getvalue()


@pytest.mark.parametrize("prompt", ["the cat", 'a "quoted" \\ ``` prompt | with é'])
def test_the_snippet_of_a_base_continues_text(tmp_path: Path, export: Any, prompt: str) -> None:
    """Oracle: transformers, run by the snippet itself: what it prints begins with the prompt."""
    recipe = recipe_of().model_copy(update={"eval": Eval(prompts=[prompt])})
    card = export(write_run(tmp_path / "run", recipe))
    assert run_snippet(card, tmp_path / "exports" / "run-out").startswith(prompt.split()[0])


def test_the_snippet_of_an_assistant_answers(tmp_path: Path, export: Any) -> None:
    """Oracle: transformers, run by the snippet itself: an answer without the question and without control tokens."""
    card = export(write_run(tmp_path / "run", recipe_of(kind="tiny-instruct")))
    printed = run_snippet(card, tmp_path / "exports" / "run-out")
    assert len(printed) > 20 and "<|" not in printed and "the cat" not in printed


def test_a_model_with_a_file_of_its_own_is_loaded_with_it(tmp_path: Path, export: Any) -> None:
    """Oracle: what transformers needs to load it, and the tag that the hub gives such models."""
    card = export(write_run(tmp_path / "run", recipe_of("model.exclusive_attention=true")))
    assert "trust_remote_code=True" in snippet_of(card)
    assert "custom_code" in ModelCard(card).data.to_dict()["tags"]
