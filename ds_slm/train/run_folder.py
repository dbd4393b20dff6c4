"""A run's folder: who may continue it, and what it says of itself.

Every launch has a generation number, one more than the last; it is in env.json beside the versions, the hosts and every
effective choice.
"""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ds_slm.errors import CheckpointError
from ds_slm.files import replace_text, write_json
from ds_slm.recipe import schema
from ds_slm.recipe.schema import Recipe

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "bitsandbytes", "numpy", "safetensors")

STOPPED = "stopped.json"
"""Left by a run that a signal ended, with its step and generation; the next launch removes it."""


def refuse_foreign(run: Path, recipe: Recipe, resume: str, allow_change: bool) -> None:
    """Raise CheckpointError where this launch may not write into the folder.

    Args:
        run: the run folder, which need not exist.
        recipe: what is to be trained.
        resume: 'never' refuses any folder that is not empty.
        allow_change: permit the changes that need permission.
    """
    if not run.exists() or (run.is_dir() and {path.name for path in run.iterdir()} <= {"logs"}):
        return
    if not run.is_dir():
        raise CheckpointError(f"--run-dir {run} is a file, expected a folder or a new name.")
    if resume == "never":
        raise CheckpointError(
            f"--run-dir {run} is not empty, and --resume never may not touch it: name another folder."
        )
    if not (run / "recipe.toml").is_file():
        raise CheckpointError(f"--run-dir {run} is not empty and holds no recipe.toml: not a run folder; name another.")
    old = schema.parse((run / "recipe.toml").read_text(), origin=str(run / "recipe.toml"))
    refused = schema.refused_changes(old, recipe, allow_change)
    if refused:
        raise CheckpointError(
            [f"--run-dir {run} holds a run of another recipe:", *refused, "Name another --run-dir, or undo the change."]
        )


def finished(run: Path) -> dict[str, Any]:
    """What the run left when it was finished: its step, losses and hashes; nothing where it was not."""
    return _read(run / "done.json")


def tell_stopped(run: Path, step: int) -> None:
    """Leave the sign that a signal ended the run, with a whole checkpoint of this step."""
    write_json(run / STOPPED, {"step": step, "generation": generation(run)})


def generation(run: Path) -> int:
    """Number of launches that wrote into this folder."""
    return _read(run / "env.json").get("generation", 0)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def describe(run: Path, recipe: Recipe, deepspeed: dict[str, Any], facts: dict[str, Any], tokenizer: Path) -> None:
    """Write recipe.toml, ds_config.json, env.json and tokenizer/; changes of the recipe are recorded.

    A done.json of a run that now goes on longer is removed: it is the sign of success.
    """
    run.mkdir(parents=True, exist_ok=True)
    for sign in ("done.json", STOPPED):
        (run / sign).unlink(missing_ok=True)
    if not (run / "tokenizer").exists():
        temporary = run / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(tokenizer, temporary)
        temporary.rename(run / "tokenizer")
    recorded = run / "recipe.toml"
    if recorded.is_file():
        old = schema.parse(recorded.read_text(), origin=str(recorded))
        changed = {place: list(pair) for place, pair in schema.changes(old, recipe).items()}
        if changed:
            record_change(run, facts["generation"], {"changes": changed})
    if facts.get("skipped_rows"):
        record_change(run, facts["generation"], {"skipped_rows": facts["skipped_rows"]})
    replace_text(recorded, schema.to_toml(recipe))
    write_json(run / "ds_config.json", deepspeed)
    write_json(run / "env.json", {**facts, **_software()})


def record_change(run: Path, generation: int, what: dict[str, Any]) -> None:
    """Add a line to changes.jsonl: what a launch does otherwise than those before it."""
    with (run / "changes.jsonl").open("a") as file:
        file.write(json.dumps({"generation": generation, **what}) + "\n")


def _software() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"commit": commit, "python": platform.python_version(), "versions": versions}
