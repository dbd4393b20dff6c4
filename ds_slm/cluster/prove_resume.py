"""Does a run that was killed and resumed equal one that was not? Shown on the user's own machine and recipe.

    RUN/recipe.toml --deepspeed--> SCRATCH/whole     STEPS steps
                    --deepspeed--> SCRATCH/resumed   killed with SIGKILL once step STEPS / 2 is saved; launched again
    both --> losses, gradient norms, ledgers, and every tensor of the last checkpoint: bit for bit

RUN itself is only read.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.cluster import launch
from ds_slm.errors import CheckpointError
from ds_slm.files import read_json
from ds_slm.recipe import loading
from ds_slm.run import metrics_file

STEPS = 4
CHECKOUT = Path(__file__).resolve().parents[2]
COMPARED = ("step", "tokens", "loss", "z_loss", "lr", "grad_norm", "ledger")


def prove(run: Path, flags: Sequence[str], scratch: Path, say: Callable[[str], None]) -> list[str]:
    """Train, kill, resume, compare; returns every difference found.

    Args:
        run: the run folder whose recipe and number of ranks are used.
        flags: further flags of the training program, such as --ds-config, --data-root or --base.
        scratch: a folder for both runs; emptied first.
        say: takes a line.

    Raises:
        CheckpointError: this is not a run folder, or a launch failed for another reason.
    """
    try:
        recipe = loading.load_recorded(run)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; {run} is no run folder.") from error

    facts, engine_config = read_json(run / "env.json"), read_json(run / "ds_config.json")
    if facts is None or engine_config is None or "zero_optimization" not in engine_config:
        name = "env.json" if facts is None else "ds_config.json"
        raise CheckpointError(
            f"{run / name} is missing or damaged: restore it, or let the run take one more step, which writes it anew."
        )
    if not facts.get("recipe_name"):
        raise CheckpointError(f"{run} does not say what its data are called: launch it once more, then prove it.")

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    copied = scratch / f"{facts['recipe_name']}.toml"  # prepared data are found by this name
    shutil.copyfile(run / "recipe.toml", copied)
    script = CHECKOUT / ("ds_slm/pretrain.py" if recipe.sft is None else "sft/train.py")

    # Each run saves half-way and at its end, and records every step.
    every = {"save_every_steps": STEPS // 2, "eval_every_steps": STEPS, "log_every_steps": 1}

    # Settings that change bits are taken from the run: ZeRO stage, micro-batch, compiled blocks.
    same = {key: engine_config[key] for key in ("zero_optimization", "train_micro_batch_size_per_gpu")}
    if blocks := facts.get("kernels", {}).get("blocks"):
        same["compile_blocks"] = blocks == "compiled"
    same["deterministic"] = True  # on a GPU even two runs that were never interrupted differ without it
    (scratch / "ds_config.json").write_text(json.dumps(same))

    shared = [
        "--recipe",
        str(copied),
        "--max-steps",
        str(STEPS),
        "--ds-config",
        str(scratch / "ds_config.json"),
        *flags,
    ]
    settings = {f"run.{key}": value for key, value in every.items()}
    if recipe.train.steps < STEPS:  # there must be steps after the kill
        settings["train.steps"] = STEPS
    shared += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if "--base" not in flags and facts.get("base_folder"):
        shared += ["--base", facts["base_folder"]]
    ranks = facts["world_size"]

    def train(name: str, resume: str = "never", output: TextIO = sys.stderr, **environment: str) -> int:
        arguments = [*shared, "--run-dir", str(scratch / name), "--resume", resume]
        command = launch.command(script, arguments, devices=ranks, launcher=["--quiet"])
        cpu_ranks = ranks if facts["backend"] == "gloo" else None
        environ = {**launch.environment(os.environ, cpu_ranks), **environment}
        return launch.run(command, environ, stdout=output, stderr=output)  # stdout is the proof's own

    say(f"{STEPS} steps without interruption, {ranks} ranks")
    if train("whole"):
        raise CheckpointError(f"the run without interruption failed: see above, and {scratch / 'whole' / 'logs'}.")

    # The launch that is killed prints what the first did, then its launcher and other ranks complain of the death.
    half, killed_log = STEPS // 2, scratch / "killed.log"
    say(f"the same, to be killed with SIGKILL once step {half} is saved")
    with killed_log.open("w", encoding="utf-8") as file:
        code = train("resumed", output=file, DS_SLM_DIE_AT=f"retained@{half}")
    if code == 0 or checkpoint_files.steps(scratch / "resumed") != [half]:
        sys.stderr.write(killed_log.read_text(encoding="utf-8", errors="replace"))
        what = "was not" if code == 0 else f"failed before step {half} was saved"
        raise CheckpointError(f"the run that was to be killed {what}: see above, and {scratch / 'resumed' / 'logs'}.")

    say(f"killed as intended; resumed from step {half}")
    if train("resumed", resume="must"):
        raise CheckpointError(f"resuming failed: see above, and {scratch / 'resumed' / 'logs'}.")

    return list(differences(scratch / "whole", scratch / "resumed"))


def differences(whole: Path, resumed: Path) -> Iterator[str]:
    """Everything that differs in any bit."""
    records = [_train_records(folder) for folder in (whole, resumed)]
    for ours, theirs in zip(*records, strict=False):
        for key in COMPARED:
            if ours.get(key) != theirs.get(key):
                yield f"step {ours['step']}: {key} {theirs.get(key)} after resuming, {ours.get(key)} without."
    if len(records[0]) != len(records[1]):
        yield f"{len(records[1])} steps after resuming, {len(records[0])} without."

    # Tensors are equal if the hashes of their files are.
    files = []
    for folder in (whole, resumed):
        checkpoint = checkpoint_files.choose(folder)
        manifest = json.loads((checkpoint / checkpoint_files.MANIFEST).read_text())
        files.append({name: one["sha256"] for name, one in manifest["files"].items() if name.endswith(".safetensors")})

    for name in sorted(files[0].keys() | files[1].keys()):
        if files[0].get(name) != files[1].get(name):
            yield f"{name} of the last checkpoint differs."


def _train_records(folder: Path) -> list[dict]:
    return metrics_file.read(folder).get("train", [])
