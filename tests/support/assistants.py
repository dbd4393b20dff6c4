"""Helpers for tests of fine-tuning: conversations, a tiny recipe for them, and a base to begin with."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ds_slm.cli import main
from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, build_tokenizer
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from ds_slm.recipe import loading
from sft.chatml import ChatML
from tests.support import scored_models
from tests.support.runs import TINY

SPECIALS = '"<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3'
TINY_SFT = (
    TINY.replace('"<|endoftext|>" = 0, "<|pad|>" = 1', SPECIALS)
    .replace('name = "generated"', 'name = "chats"\ncolumn = "messages"')
    .replace("max_position_embeddings = 64", "max_position_embeddings = 256")
    .replace("seq_len = 32", "seq_len = 192")
    .replace("global_batch_tokens = 224", "global_batch_tokens = 768")
    + '[sft]\nmask = "assistant"\n'
)

Messages = list[dict[str, str]]
CITIES = {"France": "Paris", "Japan": "Tōkyō (東京)", "Greece": "Αθήνα", "Norway": "Oslo 🏔️", "Peru": "Lima"}
CONTEXT = 192
"""Of the assistant that knows the cities."""


def chat(*contents: str, system: str | None = None) -> Messages:
    """A conversation: user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def small_talk(count: int = 120) -> list[Messages]:
    """Short conversations that fit a row of the tiny recipe."""
    return [chat(f"what is {n} and the cat?", f"the cat is {n}.") for n in range(count)]


def write_sft(folder: Path, conversations: list[Messages], name: str = "chatty") -> Path:
    """The tiny recipe and its conversations in a folder; returns the recipe's path."""
    chats = folder / f"{name}.jsonl"
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    recipe = folder / f"{name}.toml"
    recipe.write_text(TINY_SFT.replace("CORPUS", str(chats)))
    return recipe


def write_base(folder: Path) -> Path:
    """A Hugging Face folder of a fresh decoder in the tiny recipe's shape, with a byte-level BPE."""
    recipe = loading.parse(TINY_SFT)
    lines = [message["content"] for messages in small_talk(300) for message in messages]
    tokenizer = build_tokenizer(recipe, lambda source: iter(lines))
    tokenizer.save(folder / "tokenizer")
    model = build(recipe.model, seed=3)
    export(dict(model.named_parameters()), recipe.model, folder / "tokenizer", folder / "base")
    return folder / "base"


def ds_slm(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ds-slm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def city_talk() -> list[Messages]:
    """Conversations about cities of one question and of two, with a system prompt and without."""
    ask, tell = "what is the capital of {}?", "it is {}."
    talks = []
    for country, city in CITIES.items():
        for system in (None, "be brief."):
            talks.append(chat(ask.format(country), tell.format(city), system=system))
            for other, town in CITIES.items():
                talks.append(
                    chat(ask.format(country), tell.format(city), ask.format(other), tell.format(town), system=system)
                )
    return talks


@dataclass(frozen=True)
class Assistant:
    """A tiny trained one, in each of the places that a command line may name."""

    export: Path
    run: Path
    base: Path
    """The export of a base: the same weights, without a chat template."""


def write_assistant(folder: Path, steps: int = 90) -> Assistant:
    """A decoder that is trained for seconds to answer about cities, and to end its answers."""
    recipe = loading.parse(TINY_SFT.replace("max_position_embeddings = 256", f"max_position_embeddings = {CONTEXT}"))
    assert recipe.model is not None
    talks = city_talk()
    texts = [message["content"] for messages in talks for message in messages]
    tokenizer = build_tokenizer(recipe, lambda source: iter(texts))
    tokenizer.save(folder / "base-tokenizer")
    shutil.copytree(folder / "base-tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE)

    # Rows of one conversation each, as long as the longest.
    encoded = ChatML(tokenizer).encode_batch(talks)
    T = max(len(one.ids) for one in encoded)
    ids_BT, trained_BT = torch.zeros(len(talks), T, dtype=torch.long), torch.zeros(len(talks), T)
    for row, one in enumerate(encoded):
        ids_BT[row, : len(one.ids)] = torch.from_numpy(one.ids)
        trained_BT[row, : len(one.ids)] = torch.from_numpy(one.trained).float()

    model = build(recipe.model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        rows = torch.randint(len(talks), (16,), generator=generator)
        sums = model(ids_BT[rows, :-1], ids_BT[rows, 1:], trained_BT[rows, 1:])
        (sums.objective / sums.weight).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (steps - step) / (steps / 2))
        optimizer.step()
        optimizer.zero_grad()

    state = scored_models.state_of(model)
    scored_models.write_run(folder / "run", recipe, state, folder / "tokenizer")
    export(state, recipe.model, folder / "tokenizer", folder / "export")
    export(state, recipe.model, folder / "base-tokenizer", folder / "base")
    return Assistant(folder / "export", folder / "run", folder / "base")
