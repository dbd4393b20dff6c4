"""Checkpoints on disk: whole, or they do not exist.

    writing   .step-00000012.tmp-PID/ -> every file fsynced -> manifest.json last -> rename -> `latest` replaced
    reading   manifest.json -> sizes and sha256 of every file -> safetensors, never pickle
    keeping   the newest `keep_last`, and the best; deleted only after a newer one is durable

A checkpoint holds fp32 weights and moments keyed by parameter name, so it does not depend on who wrote it:

    model.safetensors  optimizer-exp_avg.safetensors  optimizer-exp_avg_sq.safetensors  state.json  manifest.json
    optimizer-absmax.safetensors   only with 8-bit states: the writer's block scales, a note for a bit-exact return

Known gap: verification reads every byte; there is no cheaper check that is also trusted.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_slm.errors import CheckpointError
from ds_slm.files import fsync, replace_text, write_json, writer_name

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
ABSMAX = "optimizer-absmax.safetensors"
FORMAT_VERSION = 1
REPLACED = "-replaced"


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def folder_of_step(run: Path, step: int) -> Path:
    """The checkpoint after `step` applied optimiser steps."""
    return checkpoints_folder(run) / f"step-{step:08d}"


def die_at(point: str, step: int) -> None:
    """End this process with SIGKILL where a test asks for it: DS_SLM_DIE_AT=POINT@STEP."""
    if os.environ.get("DS_SLM_DIE_AT") == f"{point}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)


TENSOR_FILES = (MODEL, "optimizer-exp_avg.safetensors", "optimizer-exp_avg_sq.safetensors", ABSMAX)
WRITE_POINTS = (
    "begun", *(f"{name}{end}" for name in TENSOR_FILES for end in ("", "-synced")),
    "state", "manifest", "manifest-synced", "old-moved", "renamed", "latest", "best", "retained",
)  # fmt: skip
"""Where tests kill a writer: everywhere `die_at` stands, in the order of a save with 8-bit moments."""


class Writer:
    """A checkpoint being written into a temporary folder; it appears under its name at `commit`, or never."""

    def __init__(self, run: Path, step: int) -> None:
        self.final = folder_of_step(run, step)
        self.folder = self.final.parent / f".{self.final.name}.tmp-{writer_name()}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.step = step
        die_at("begun", step)

    def add_tensors(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file of CPU tensors."""
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / file_name)
        die_at(file_name, self.step)
        fsync(self.folder / file_name)
        die_at(f"{file_name}-synced", self.step)

    def commit(self, state: Mapping[str, Any]) -> Path:
        """Write state and manifest, then give the folder its name. Returns the final folder."""
        write_json(self.folder / STATE, state)
        die_at("state", self.step)
        files = {path.name: _fingerprint(path) for path in sorted(self.folder.iterdir())}
        write_json(self.folder / MANIFEST, {"format": FORMAT_VERSION, "step": state["step"], "files": files})
        die_at("manifest", self.step)
        fsync(self.folder)
        die_at("manifest-synced", self.step)
        replaced = self.folder.with_name(f"{self.folder.name}{REPLACED}")
        if self.final.exists():  # of this very step: a damaged one, or one from before the run was resumed further back
            os.rename(self.final, replaced)
            die_at("old-moved", self.step)
        try:
            os.rename(self.folder, self.final)
        except OSError:
            put_back(self.final.parents[1])
            raise
        die_at("renamed", self.step)
        fsync(self.final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        replace_text(self.final.parent / "latest", self.final.name)
        die_at("latest", self.step)
        return self.final

    def abandon(self) -> None:
        """Remove what was written: it will not become a checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)


def put_back(run: Path) -> None:
    """Give a checkpoint its name back that was moved away for one which never came."""
    for moved in sorted(checkpoints_folder(run).glob(f".step-*{REPLACED}")):
        final = moved.with_name(moved.name[1:].partition(".")[0])
        if not final.exists():
            with contextlib.suppress(OSError):  # where hosts share a disk another one was first
                os.rename(moved, final)


def mark_best(checkpoint: Path) -> None:
    """Let `best` name this checkpoint."""
    replace_text(checkpoint.parent / "best", checkpoint.name)


def verify(checkpoint: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; an empty list means it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = dict(manifest["files"])
        if manifest["format"] != FORMAT_VERSION:
            return [f"{checkpoint}: format {manifest['format']}, expected {FORMAT_VERSION}."]
        if checkpoint.name != f"step-{manifest['step']:08d}":
            return [f"{checkpoint}: its manifest is of step {manifest['step']}."]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{checkpoint}: {MANIFEST} is missing or unreadable ({error})."]
    problems = []
    for name in sorted({STATE, MODEL} - expected.keys()):
        problems.append(f"{checkpoint}: {MANIFEST} lists no {name}.")
    for name, fingerprint in expected.items():
        path = checkpoint / name
        if not isinstance(fingerprint, dict) or fingerprint.keys() != {"bytes", "sha256"}:
            problems.append(f"{checkpoint}: {MANIFEST} says {fingerprint!r} of {name}.")
        elif Path(name).name != name or not path.is_file():
            problems.append(f"{path}: missing.")
        elif path.stat().st_size != fingerprint["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {fingerprint['bytes']}.")
        elif _fingerprint(path) != fingerprint:
            problems.append(f"{path}: its sha256 is not the one in {MANIFEST}.")
    return problems


def steps(run: Path) -> list[int]:
    """Steps of all checkpoints of a run, whole or not, in ascending order."""
    names = (path.name for path in checkpoints_folder(run).glob("step-*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name)))


def say_on_stderr(text: str) -> None:
    """One line beside the program's output."""
    print(text, file=sys.stderr, flush=True)


def newest_whole(run: Path, say: Callable[[str], None] = say_on_stderr) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named through `say` and passed over."""
    for step in reversed(steps(run)):
        checkpoint = folder_of_step(run, step)
        problems = verify(checkpoint)
        if not problems:
            return checkpoint
        say(f"damaged checkpoint passed over: {' '.join(problems)}")
    return None


def choose(run: Path, step: int | None = None, best: bool = False) -> Path:
    """The checkpoint of a step, the best, or the newest whole one. Raises CheckpointError where it is not there."""
    if step is not None:
        checkpoint = folder_of_step(run, step)
    elif best:
        pointer = checkpoints_folder(run) / "best"
        if not pointer.is_file():
            raise CheckpointError(f"{run} has no best checkpoint: nothing was evaluated; name a step instead.")
        checkpoint = pointer.parent / Path(pointer.read_text().strip()).name
    else:
        whole = newest_whole(run)
        if whole is None:
            raise CheckpointError(f"{run} holds no whole checkpoint: expected checkpoints/step-*/ with a manifest.")
        return whole
    problems = verify(checkpoint) if checkpoint.is_dir() else [f"{checkpoint} is not there."]
    if problems:
        found = ", ".join(str(number) for number in steps(run)) or "none"
        raise CheckpointError([*problems, f"Steps found in {run}: {found}."])
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer knew at this step. Verify the checkpoint first."""
    return json.loads((checkpoint / STATE).read_text())


def manifest_sha256(checkpoint: Path) -> str:
    """One hash that names a checkpoint's whole content."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading one tensor at a time: `.keys()`, `.get_tensor(name)`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as tensors:
        yield tensors


def read_model(checkpoint: Path) -> dict[str, Tensor]:
    """All fp32 weights of a verified checkpoint, by parameter name."""
    with open_tensors(checkpoint / MODEL) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def retain(run: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest checkpoints and the best, and what killed writers left behind."""
    folder = checkpoints_folder(run)
    kept = {folder_of_step(run, step).name for step in steps(run)[-keep_last:]}
    for pointer in ("latest", *(["best"] if keep_best else [])):
        if (folder / pointer).is_file():
            kept.add((folder / pointer).read_text().strip())
    for step in steps(run):
        if folder_of_step(run, step).name not in kept:
            shutil.rmtree(folder_of_step(run, step))
    for leftover in folder.glob(f".step-*.tmp-{socket.gethostname()}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
