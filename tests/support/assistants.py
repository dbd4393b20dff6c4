"""Helpers for tests of fine-tuning: conversations, a tiny recipe for them, and a base to begin with."""

import json
import sys
from pathlib import Path

import pytest

from ds_slm.cli import main
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from ds_slm.recipe import schema
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
    recipe = schema.parse(TINY_SFT)
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
