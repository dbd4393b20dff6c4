"""A tiny recipe with a generated corpus, the real launcher on this machine, and the records of a run."""

import json
import os
import random
import socket
import subprocess
import sysconfig
from pathlib import Path

from ds_slm.run import metrics_file

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sysconfig.get_path("scripts"))

SHAPE = """
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
vocab_size = 320
""".strip()
TINY = f"""
[card]
name = "tiny"
[model]
{SHAPE}
max_position_embeddings = 64
qk_norm = true
[tokenizer]
kind = "bpe"
vocab_size = 320
special_tokens = {{ "<|endoftext|>" = 0, "<|pad|>" = 1 }}
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
"""A recipe with seven rows a step, which do not divide evenly among 2 or 3 ranks."""


def write_corpus(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """Write seeded sentences from a small grammar, one document a line."""
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
    """Write the tiny recipe and its corpus into a folder; returns the recipe's path."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    recipe = folder / f"{name}.toml"
    recipe.write_text(text.replace("CORPUS", str(corpus)))
    return recipe


def free_port() -> int:
    """A port on which no program listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_command(ranks: int, *arguments: object, script: Path = ROOT / "ds_slm" / "pretrain.py") -> list[str]:
    """The launcher's command line for a number of ranks on this machine."""
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, str(script), *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """An environment with one thread a rank, the virtual environment first on the path, and no GPU."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run(command: list[str], cwd: Path, timeout_s: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def records(run_folder: Path, kind: str = "train") -> list[dict]:
    """The records of one kind in metrics.jsonl."""
    return metrics_file.read(run_folder).get(kind, [])
