"""Run folders as a launch leaves them, with numbers that a test knows: what a model card is written from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.files import write_json
from ds_slm.model.decoder import build
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.golden.facts import MADE
from tests.support import scored_models

TOKENIZER = MADE / "run" / "tokenizer"
CHAT_TOKENIZER = MADE / "data" / "tiny-instruct" / "tokenizer"
STEP_S, DEVICES = 0.5, 2
FIGURE = {"value": 41.5, "stderr": 1.25, "chance": 25.0, "commonest": None}
BITS = {"value": 1.625, "stderr": 0.01, "chance": None, "commonest": None}
CHATS = {"conversations": 40, "truncated": 3, "tokens": 4_000, "supervised_tokens": 1_000}


def recipe_of(*overrides: str, kind: str = "tiny") -> Recipe:
    """The golden recipe, or with `tiny-instruct` the one that fine-tunes it."""
    return loading.load(str(MADE / f"{kind}.toml"), list(overrides))


def write_run(folder: Path, recipe: Recipe, step: int | None = None, **environment: Any) -> Path:
    """A run of the recipe up to a step, by default its last, with one checkpoint; returns the run folder.

    The loss of step n is 6 - n / 100, its held-out loss 0.25 more; each step took STEP_S on DEVICES devices.
    """
    step = recipe.train.steps if step is None else step
    tokenizer = TOKENIZER if recipe.sft is None else CHAT_TOKENIZER
    batch = recipe.train.global_batch_tokens
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(loading.to_toml(recipe))
    shutil.copytree(tokenizer, folder / "tokenizer")
    add_checkpoint(folder, recipe, step)

    train = [
        {"kind": "train", "step": n, "tokens": n * batch, "loss": 6 - n / 100, "lr": 0.01 / n, "grad_norm": 1 + 1 / n,
         "tokens_per_s": 1_000.0 * n, "step_s": STEP_S, "mfu": None, "peak_memory_gb": 0.5, "ledger": f"ledger-{n}"}
        for n in range(1, step + 1)
    ]  # fmt: skip
    val = [{"kind": "val", "step": n, "loss": 6.25 - n / 100, "perplexity": 100.0} for n in (step // 2, step) if n]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*train, *val]))

    rows = {"train": {"tokens": 4 * step * batch}, "val": {"tokens": 77}}
    if recipe.sft is not None:
        rows = {"train": CHATS, "val": {"conversations": 5}, "dropped": {"empty": 2}, "supervised_share": 0.25}
    facts = {"recipe_name": "told", "device": "Abacus", "world_size": DEVICES, "hosts": ["secret-host"] * DEVICES,
             "zero_stage": 1, "micro_batch_rows": 2, "generation": 1, "rows": rows, "replaced_sources": [],
             "data_sha256": "da" * 32, "tokenizer_sha256": load_tokenizer(tokenizer).sha256, "commit": "c0" * 20,
             "sources_sha256": "50" * 32, "python": "3.11.7", "versions": {"torch": "2.13.0"}}  # fmt: skip
    write_json(folder / "env.json", {**facts, **environment})
    if step == recipe.train.steps:
        done = {"step": step, "recipe_sha256": recipe.identity_sha256(), "val_loss": 2.5, "val_bits_per_byte": 1.75}
        write_json(folder / "done.json", done)
    return folder


def add_checkpoint(folder: Path, recipe: Recipe, step: int) -> Path:
    """A checkpoint of fresh weights, others for each step."""
    writer = checkpoint_files.Writer(folder, step)
    writer.add_tensors(checkpoint_files.MODEL, scored_models.state_of(build(recipe.model, seed=step)))
    position = step * recipe.rows_per_step
    return writer.commit({"step": step, "position": position, "tokens": step * recipe.train.global_batch_tokens})


def task(**changes: Any) -> dict[str, Any]:
    """A task of eval.json: 1,172 items, scored whole."""
    figures = {"acc_norm": FIGURE, "answer_bits_per_byte": BITS}
    return {"items": 1_172, "of_items": 1_172, "limited": False, "published": True, "figures": figures, **changes}


def write_eval(folder: Path, sha256: str, tasks: Mapping[str, Any], step: int | None = None) -> None:
    """An eval.json of these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "eval.json", {"model": {"sha256": sha256, "step": step}, "lm_eval": "0.4.13", "tasks": tasks})


def sha256_of(run: Path) -> str:
    """Of the weights of a run's newest checkpoint."""
    return checkpoint_files.model_sha256(checkpoint_files.choose(run))
