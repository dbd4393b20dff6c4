"""Tiny models for tests of scoring, trained for seconds on the answers of most of the benchmarks' items."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.tokenizers.tokenizer import build_tokenizer, load_tokenizer
from ds_slm.evaluate.results import Question
from ds_slm.model.decoder import Decoder, build
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model
from tests.support.runs import TINY

CONTEXT, TRAINED, VOCAB = 96, 32, 480
TEXT = (
    TINY.replace('"<|pad|>" = 1 }', '"<|pad|>" = 1, "<|bos|>" = 2 }')
    .replace("vocab_size = 320", f"vocab_size = {VOCAB}")
    .replace("max_position_embeddings = 64", f"max_position_embeddings = {CONTEXT}")
    .replace("hidden_size = 32", "hidden_size = 48")
)


def recipe_of(qk_norm: bool = True) -> Recipe:
    """The tiny recipe with a longer context: a Qwen3 with QK-norm, else a Llama."""
    return loading.parse(TEXT.replace("qk_norm = true", f"qk_norm = {str(qk_norm).lower()}"))


def write_tokenizer(folder: Path, texts: Sequence[str]) -> Path:
    """A byte-level BPE trained on these texts."""
    build_tokenizer(recipe_of(), lambda source: iter(texts)).save(folder)
    return folder


def with_bos(tokenizer_folder: Path, folder: Path) -> Path:
    """The same tokenizer, which puts a BOS before each text."""
    shutil.copytree(tokenizer_folder, folder)
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = json.loads(path.read_text()), json.loads(config_path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [2], "tokens": ["<|bos|>"]}},
    }
    path.write_text(json.dumps(content))
    config_path.write_text(json.dumps(config | {"bos_token": "<|bos|>"}))
    return folder


def texts_of(questions: Mapping[str, Sequence[Question]], most: bool) -> list[str]:
    """Every text with its right answer, or three of four of them."""
    found = []
    for name, asked in questions.items():
        for number, one in enumerate(asked):
            if not (most and number % 4 == 3):
                right = one.gold if isinstance(one.gold, int) and name != "wikitext" and len(one.requests) > 1 else 0
                found.append("".join(one.requests[right]))
    return found


def trained(shape: Model, tokenizer_folder: Path, texts: Sequence[str], steps: int = 150) -> Decoder:
    """A decoder trained on the ends of texts: they hold the answers."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ends = [ids[-TRAINED:] for ids in tokenizer.encode_with_control_tokens(texts, add_special_tokens=False)]
    ends = [ids for ids in ends if len(ids) > 1]
    model = build(shape, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)

    for step in range(steps):
        chosen = [ends[index] for index in torch.randint(len(ends), (32,), generator=generator).tolist()]
        T = max(map(len, chosen))
        ids_BT = torch.tensor([ids + [0] * (T - len(ids)) for ids in chosen])
        weights_BT = torch.tensor([[1.0] * len(ids) + [0.0] * (T - len(ids)) for ids in chosen])
        sums = model(ids_BT[:, :-1], ids_BT[:, 1:], weights_BT[:, 1:])
        (sums.objective / sums.weight).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (steps - step) / (steps / 2))
        optimizer.step()
        optimizer.zero_grad()

    return model.eval()


def state_of(model: Decoder) -> dict[str, Tensor]:
    """Its parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_run(run: Path, recipe: Recipe, state: Mapping[str, Tensor], tokenizer_folder: Path) -> Path:
    """A run folder with one checkpoint; returns the checkpoint."""
    writer = checkpoint_files.Writer(run, 7)
    writer.add_tensors(checkpoint_files.MODEL, state)
    checkpoint = writer.commit({"step": 7, "tokenizer_sha256": load_tokenizer(tokenizer_folder).sha256})
    (run / "recipe.toml").write_text(loading.to_toml(recipe))
    shutil.copytree(tokenizer_folder, run / "tokenizer")
    return checkpoint
