"""Helpers for tests of fine-tuning: made-up conversations, a tiny recipe, a tokenizer, prepared rows."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.tiny_runs import SHAPE
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from sft.prepare import prepare_conversations
from sft.rows import ConversationRows
from tests.support import data_recipes

VOCABULARY = 320
TINY = f"""
[card]
name = "tiny-sft"
[model]
{SHAPE}
max_position_embeddings = 160
init_std = 0.1
[tokenizer]
kind = "bpe"
vocab_size = 320
special_tokens = {{ "<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3 }}
pad_token = "<|pad|>"
[data]
seq_len = 128
val_fraction = 0.1
[[data.source]]
name = "made"
kind = "files"
column = "messages"
path = "SOURCE"
[optimizer]
name = "adamw"
lr = 3e-3
min_lr = 3e-4
[schedule]
kind = "cosine"
warmup_steps = 2
[train]
global_batch_tokens = 1_024
steps = 6
seed = 5
precision = "fp32"
z_loss = 1e-4
[run]
eval_every_steps = 3
save_every_steps = 6
[eval]
prompts = ["who sees the cat?"]
[sft]
packing = false
"""
"""Eight rows a step."""
NOUNS = ["cat", "dog", "bird", "teacher", "river", "engine", "garden", "Übersee", "日本", "naïveté"]
ENDS = ["slowly.", " at night! ", "in the morning…", "without a word: why?", "  twice  ", "3,141.59", "\n\n- so\n- so"]

Conversation = list[dict[str, Any]]


def made(count: int = 120, seed: int = 0, longest: int = 4) -> list[Conversation]:
    """Seeded conversations, some with a system turn, some that end with the user; lengths differ much."""
    rng = random.Random(seed)

    def sentence() -> str:
        return f"the {rng.choice(NOUNS)} sees the {rng.choice(NOUNS)} {rng.choice(ENDS)}"

    found = []
    for number in range(count):
        turns = [("system", f"Be brief, {number}.")] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, longest)):
            turns += [("user", f"{number}? " + sentence())]
            turns += [("assistant", " ".join(sentence() for _ in range(rng.choice((0, 1, 1, 1, 2, 4)))))]
        if len(turns) > 2 and rng.random() < 0.2:
            turns.pop()
        found.append([{"role": role, "content": content} for role, content in turns])
    return found


def write(path: Path, conversations: Iterable[Any]) -> Path:
    """A .jsonl file with a conversation a line."""
    path.write_text("".join(json.dumps({"messages": messages, "source": "made"}) + "\n" for messages in conversations))
    return path


def recipe(path: Path, *overrides: str) -> Recipe:
    """The tiny recipe, reading one file."""
    return loading.parse(TINY.replace("SOURCE", str(path)), list(overrides))


def tokenizer(seed: int = 0) -> Tokenizer:
    """A byte-level BPE trained on made-up conversations."""
    texts = [message["content"] for messages in made(seed=seed) for message in messages]
    tiny = data_recipes.recipe(
        data_recipes.source("made", path="."), tokenizer=data_recipes.BPE.replace("300", str(VOCABULARY))
    )
    return build_tokenizer(tiny, lambda source: iter(texts))


def prepare(recipe: Recipe, folder: Path, sources: dict[str, Path] | None = None) -> Prepared:
    """Prepare in silence, with a tokenizer of our own as the base's."""
    if not (folder / "base").exists():
        tokenizer().save(folder / "base")
    return prepare_conversations(recipe, folder / "data" / "tiny", folder / "base", sources, lambda line: None)


def rows(path: Path, root: Path, *overrides: str) -> ConversationRows:
    """The tiny recipe's rows of one file, prepared below `root`."""
    tiny = recipe(path, *overrides)
    return ConversationRows(tiny, prepare(tiny, root))
