"""Tasks over generated rows, and tiny models that know most of the answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

from ds_slm.evaluate import harness
from ds_slm.evaluate.benchmarks import BENCHMARKS
from ds_slm.evaluate.results import Question
from ds_slm.model.decoder import Decoder
from ds_slm.publish.export import export
from ds_slm.recipe.schema import Recipe
from tests.support import benchmark_files, scored_models

KINDS = {"qwen3": True, "llama": False}
"""Of models: whether each has QK-norm."""


@dataclass(frozen=True)
class Made:
    """A trained model, in each of the places that a command line may name."""

    recipe: Recipe
    model: Decoder
    export: Path
    run: Path
    checkpoint: Path


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No test asks the hub; one thread, for tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (huggingface_hub.constants, datasets.config):  # they read the environment when first imported
            patch.setattr(module, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tasks() -> dict[str, Any]:
    """The harness's task of each kind, over the generated rows."""
    return {name: harness.task_of(Path(BENCHMARKS[name].config), rows) for name, rows in benchmark_files.ROWS.items()}


@pytest.fixture(scope="session")
def questions(tasks: dict[str, Any]) -> dict[str, list[Question]]:
    """What each task asks."""
    return {name: harness.questions_of(task) for name, task in tasks.items()}


@pytest.fixture(scope="session")
def tokenizer_folder(questions: dict[str, list[Question]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of the tasks' texts."""
    texts = scored_models.texts_of(questions, most=False)
    return scored_models.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture(scope="session")
def made_once(
    questions: dict[str, list[Question]], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Made]:
    """From a kind of model to one that saw the answers of most items."""
    texts = scored_models.texts_of(questions, most=True)

    @cache
    def make(kind: str) -> Made:
        recipe, folder = scored_models.recipe_of(KINDS[kind]), tmp_path_factory.mktemp(kind)
        assert recipe.model is not None
        model = scored_models.trained(recipe.model, tokenizer_folder, texts)
        state = scored_models.state_of(model)
        export(state, recipe.model, tokenizer_folder, folder / "export")
        checkpoint = scored_models.write_run(folder / "run", recipe, state, tokenizer_folder)
        return Made(recipe, model, folder / "export", folder / "run", checkpoint)

    return make


@pytest.fixture(scope="session")
def qwen3(made_once: Callable[[str], Made]) -> Made:
    """The model with QK-norm."""
    return made_once("qwen3")


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, made_once: Callable[[str], Made]) -> Made:
    """Each of the two models."""
    return made_once(request.param)
