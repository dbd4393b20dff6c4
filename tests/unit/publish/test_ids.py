"""What is generated and exported fits the tokenizer: ids that stand for nothing never come out, its hash goes along."""

import json
from pathlib import Path

import pytest
import torch

from ds_slm.data.tokenizers import tokenizer as tokenizers
from ds_slm.model.decoder import Decoder, build
from ds_slm.publish import generate as generating
from ds_slm.publish.export import export
from ds_slm.publish.generate import Sampling, generate, sampler
from ds_slm.recipe.sections import Model
from tests.support.data_recipes import BPE, recipe, source, texts

UNUSED = set(range(300, 400))
"""The tokenizer has 300 ids."""


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Untrained: it draws every id about equally often."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 400, "head_dim": 8}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return build(Model(**fields, tie_word_embeddings=True), seed=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.build_tokenizer(recipe(source("made", path="."), tokenizer=BPE), lambda _: iter(texts()))
    made.save(folder)
    return folder


def test_generation_never_draws_unused_ids(model: Decoder) -> None:
    """Oracle: the ids drawn, greedily and at random, against those drawn where nothing is excluded."""
    assert set(generate(model, [5, 6], 40, Sampling(3.0))) & UNUSED
    for temperature in (0.0, 3.0):
        for penalty in (1.0, 1.3):
            sampling = Sampling(temperature, repetition_penalty=penalty)
            assert not set(generate(model, [5, 300], 40, sampling, unused_ids=UNUSED)) & UNUSED


def test_the_sampler_excludes_what_its_tokenizer_lacks(
    model: Decoder, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the ids it hands on, against the size of the tokenizer."""
    seen: list[set[int]] = []

    def spy(*args: object, **options: object) -> list[int]:
        seen.append(set(options["unused_ids"]))  # type: ignore[call-overload]
        return [5]

    monkeypatch.setattr(generating, "generate", spy)
    sampler(tokenizer_folder, ["a"])(model)
    assert seen == [UNUSED]


def test_an_export_keeps_transformers_from_unused_ids(model: Decoder, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: transformers' ids from the export, with its suppression and without; the hash of the tokenizer."""
    from transformers import AutoModelForCausalLM

    export(dict(model.named_parameters()), model.shape, tokenizer_folder, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "eos_token_id": None, "pad_token_id": 1}
    torch.manual_seed(0)
    assert not set(theirs.generate(torch.tensor([[5, 6]]), **options)[0].tolist()) & UNUSED
    theirs.generation_config.suppress_tokens = None
    assert set(theirs.generate(torch.tensor([[5, 6]]), **options)[0].tolist()) & UNUSED
    expected = tokenizers.load_tokenizer(tokenizer_folder).sha256
    assert theirs.config.tokenizer_sha256 == expected == tokenizers.load_tokenizer(tmp_path / "out").sha256


def test_an_export_without_unused_ids_says_nothing_of_them(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: the generation settings of a model whose every id is a token."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300, "head_dim": 8}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    full = build(Model(**fields), seed=1)  # type: ignore[arg-type]
    export(dict(full.named_parameters()), full.shape, tokenizer_folder, tmp_path / "out")
    assert "suppress_tokens" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
