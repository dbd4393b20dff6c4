"""Helpers for tests that run whole programs: a generated corpus, a tiny recipe, the real launcher, the records."""

import json
import random
import socket
import subprocess
from pathlib import Path

from ds_slm.data.shards import prepared
from tests.support import warm

ROOT = warm.ROOT
BIN = warm.BIN

TINY = """
[card]
name = "tiny"
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
vocab_size = 320
max_position_embeddings = 64
qk_norm = true
[tokenizer]
kind = "bpe"
vocab_size = 320
special_tokens = { "<|endoftext|>" = 0, "<|pad|>" = 1 }
pad_token = "<|pad|>"
[data]
seq_len = 32
val_fraction = 0.1
[[data.source]]
name = "generated"
kind = "files"
path = "CORPUS"
[optimizer]
name = "adamw"
lr = 3e-3
min_lr = 3e-4
[schedule]
kind = "cosine"
warmup_steps = 4
[train]
global_batch_tokens = 224
steps = 20
seed = 5
precision = "fp32"
z_loss = 1e-4
[run]
eval_every_steps = 10
eval_rows = 6
save_every_steps = 10
[eval]
prompts = ["the cat"]
"""
"""Seven rows a step: they divide by neither 2 nor 3 ranks."""


def write_corpus(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """Seeded sentences from a small grammar, one document a line."""
    rng = random.Random(seed)
    nouns, verbs = (
        ["cat", "dog", "bird", "teacher", "river", "engine", "garden"],
        ["sees", "follows", "builds", "likes"],
    )
    ends = ["slowly", "at night", "in the morning", "without a word", "again and again"]

    def sentence() -> str:
        return f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.choice(ends)}."

    texts = (" ".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_recipe(folder: Path, name: str = "tiny", text: str = TINY) -> Path:
    """The tiny recipe and its corpus in a folder; returns the recipe's path."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    recipe = folder / f"{name}.toml"
    recipe.write_text(text.replace("CORPUS", str(corpus)))
    return recipe


SHORT_EPOCH = 17
"""Documents of a corpus whose first epoch ends within the tiny recipe's step 7, and the second within step 13."""


def hide_change(shard: Path) -> None:
    """Let a shard pass for one that was found right as it is: bits that change by themselves leave no trace."""
    path = shard.parents[1] / prepared.STAMPS
    stamps = json.loads(path.read_text())
    name = str(shard.relative_to(path.parent))
    path.write_text(json.dumps({**stamps, name: prepared._stamp(shard, stamps[name][-1])}))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command(ranks: int, *arguments: object, script: Path = ROOT / "ds_slm" / "pretrain.py") -> list[str]:
    """The launcher's command line for a number of ranks on this machine."""
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, str(script), *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """One thread a rank, the virtual environment first on the path, no GPU."""
    return {**warm.base_environment(), **extra}


def run(command: list[str], cwd: Path, timeout_s: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed. Programs of the project are forked from a warm process."""
    if warm.can_run(command, environment(**extra)):
        return warm.run(command, cwd, environment(**extra), timeout_s)
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def records(run_folder: Path, kind: str = "train") -> list[dict]:
    """The records of one kind in metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
