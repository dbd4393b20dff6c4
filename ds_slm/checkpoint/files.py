"""Checkpoints on disk: a checkpoint is whole, or it does not exist.

    writing   .step-00000012.tmp-PID/ -> every file fsynced -> manifest.json last -> rename -> `latest` replaced
    reading   manifest.json -> sizes and sha256 of every file -> safetensors, never pickle
    keeping   retention.py

A checkpoint holds fp32 weights and moments keyed by parameter name, so it does not depend on who wrote it:

    model.safetensors  optimizer-exp_avg.safetensors  optimizer-exp_avg_sq.safetensors  state.json  manifest.json
    optimizer-absmax.safetensors   only with 8-bit states: the writer's block scales, a note for resuming bit-exactly

Known gap: verification reads every byte; no cheaper check is trusted.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_slm.checkpoint.tensor_file import TensorFile, in_file_order
from ds_slm.errors import CheckpointError
from ds_slm.files import fsync, is_plain_name, read_json, replace_text, sha256_of, write_json, write_point, writer_name

if TYPE_CHECKING:  # `ds-slm recipes` reads checkpoints' names and manifests, and must not wait for torch
    from torch import Tensor

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
ABSMAX = "optimizer-absmax.safetensors"
BASE = "base_sha256"
"""In state.json, done.json and env.json: the hash of the weights with which the run began, if it had a base."""
FORMAT_VERSION = 1
REPLACED = "-replaced"


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / CHECKPOINTS


def folder_of_step(run: Path, step: int) -> Path:
    """The checkpoint after `step` applied optimiser steps."""
    return checkpoints_folder(run) / f"step-{step:08d}"


TENSOR_FILES = (MODEL, "optimizer-exp_avg.safetensors", "optimizer-exp_avg_sq.safetensors", ABSMAX)
WRITE_POINTS = (
    "begun", *(f"{name}{end}" for name in TENSOR_FILES for end in ("", "-synced")),
    "state", "manifest", "manifest-synced", "old-moved", "renamed", "latest", "best", "retained",
)  # fmt: skip
"""The write points of a save, POINT@STEP, in the order of a save with 8-bit moments."""


class Writer:
    """A checkpoint being written into a temporary folder; it appears under its name at `commit`, or never."""

    def __init__(self, run: Path, step: int) -> None:
        self.final = folder_of_step(run, step)
        self.folder = self.final.parent / f".{self.final.name}.tmp-{writer_name()}"
        self._run, self._step = run, step
        self._fingerprints: dict[str, dict[str, Any]] = {}
        remove(self.folder)
        self.folder.mkdir(parents=True)
        self._reached("begun")

    def _reached(self, point: str) -> None:
        write_point(f"{point}@{self._step}", self._run)

    def begin_tensors(self, file_name: str, shapes: Mapping[str, Iterable[int]]) -> TensorFile:
        """Begin a safetensors file of fp32 tensors. Their values follow piece by piece; `end_tensors` ends it."""
        return TensorFile(self.folder / file_name, shapes)

    def end_tensors(self, file_name: str, file: TensorFile) -> None:
        """Wait until a file is on the disk, and close it."""
        with file:
            self._reached(file_name)
            self._fingerprints[file_name] = file.sync()
        self._reached(f"{file_name}-synced")

    def add_tensors(self, file_name: str, tensors: "Mapping[str, Tensor]") -> None:
        """Write one safetensors file of whole fp32 tensors on the CPU."""
        with self.begin_tensors(file_name, {name: tensor.shape for name, tensor in tensors.items()}) as file:
            for name in in_file_order(tensors):
                file.write(tensors[name].contiguous().view(-1))
            self.end_tensors(file_name, file)

    def commit(self, state: Mapping[str, Any], allowed: Callable[[], None] = lambda: None) -> Path:
        """Write state and manifest, then give the folder its name. Returns the final folder.

        Args:
            state: what the trainer knows at this step.
            allowed: called right before the folder gets its name; raises if it may not.
        """
        write_json(self.folder / STATE, state)
        self._reached("state")
        files = {**self._fingerprints, STATE: _fingerprint(self.folder / STATE)}
        write_json(self.folder / MANIFEST, {"format": FORMAT_VERSION, "step": state["step"], "files": files})
        self._reached("manifest")
        fsync(self.folder)
        self._reached("manifest-synced")

        # A checkpoint of this step may be there: damaged, or left by a run that later resumed from an earlier step.
        allowed()
        replaced = self.folder.with_name(f"{self.folder.name}{REPLACED}")
        if os.path.lexists(self.final):
            os.rename(self.final, replaced)

        try:
            if os.path.lexists(replaced):
                self._reached("old-moved")
            os.rename(self.folder, self.final)
        except OSError:
            put_back(self._run)
            raise

        # The new name is on the disk before the old checkpoint is removed.
        self._reached("renamed")
        fsync(self.final.parent)
        remove(replaced)
        return self.final

    def abandon(self) -> None:
        """Remove what was written: it will not become a checkpoint."""
        remove(self.folder)


def remove(path: Path) -> None:
    """Remove a folder with all it holds, a file, or a link without its target; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def put_back(run: Path) -> None:
    """Give a checkpoint its name back, if it was moved away for a new one that never came."""
    for moved in sorted(checkpoints_folder(run).glob(f".step-*{REPLACED}")):
        final = moved.with_name(moved.name[1:].partition(".")[0])
        if not os.path.lexists(final):
            with contextlib.suppress(OSError):  # if hosts share a disk, another one was first
                os.rename(moved, final)


def mark_latest(checkpoint: Path) -> None:
    """Let `latest` name this checkpoint, for people and other programs; resuming looks for the newest whole one."""
    replace_text(checkpoint.parent / "latest", checkpoint.name)


def mark_best(checkpoint: Path) -> None:
    """Let `best` name this checkpoint."""
    replace_text(checkpoint.parent / "best", checkpoint.name)


def named_by(run: Path, pointer: str) -> int | None:
    """The step of the checkpoint that `latest` or `best` names; None if the pointer is missing or damaged."""
    try:
        name = (checkpoints_folder(run) / pointer).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return step_of(name)


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    match = re.fullmatch(r"step-([0-9]{8,})", name)
    return int(match[1]) if match and name == f"step-{int(match[1]):08d}" else None


def verify(checkpoint: Path, read: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint; an empty list means it is whole.

    Without `read`, only the names and sizes of its files are checked, not their content.
    """
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

    # Cheap checks come first: a file is read only if its name and size are right.
    for name, fingerprint in expected.items():
        path = checkpoint / name
        try:
            if not isinstance(fingerprint, dict) or fingerprint.keys() != {"bytes", "sha256"}:
                problems.append(f"{checkpoint}: {MANIFEST} says {fingerprint!r} of {name}.")
            elif not is_plain_name(name):
                problems.append(f"{checkpoint}: {MANIFEST} names {name!r}, which is a path and no file beside it.")
            elif path.is_symlink():
                problems.append(f"{path}: a link, expected the file itself.")
            elif not path.is_file():
                problems.append(f"{path}: missing.")
            elif path.stat().st_size != fingerprint["bytes"]:
                problems.append(f"{path}: {path.stat().st_size} bytes, expected {fingerprint['bytes']}.")
            elif read and _fingerprint(path) != fingerprint:
                problems.append(f"{path}: its sha256 is not the one in {MANIFEST}.")
        except OSError as error:  # a disk that cannot read what it holds
            problems.append(f"{path}: {error.strerror or error}.")

    return problems


def steps(run: Path) -> list[int]:
    """Steps of all checkpoints of a run, whole or not, in ascending order."""
    names = (path.name for path in checkpoints_folder(run).glob("step-*"))
    return sorted(step for name in names if (step := step_of(name)) is not None)


def say_on_stderr(text: str) -> None:
    """One line beside the program's output."""
    print(text, file=sys.stderr, flush=True)


def newest_whole(run: Path, say: Callable[[str], None] = say_on_stderr) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named through `say` and passed over."""
    return newest_whole_and_damaged(run, say)[0]


def newest_whole_and_damaged(run: Path, say: Callable[[str], None] = say_on_stderr) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that verifies, and the damaged ones that were passed over to find it."""
    damaged = []
    for step in reversed(steps(run)):
        checkpoint = folder_of_step(run, step)
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, damaged
        say(f"damaged checkpoint passed over: {' '.join(problems)}")
        damaged.append(checkpoint)
    return None, damaged


def choose(run: Path, step: int | None = None, best: bool = False) -> Path:
    """The checkpoint of a step, the best, or the newest whole one. Raises CheckpointError if it is missing."""
    if step is not None:
        checkpoint = folder_of_step(run, step)
    elif best:
        step = named_by(run, "best")
        if step is None:
            raise CheckpointError(f"{run} has no best checkpoint: nothing was evaluated; name a step instead.")
        checkpoint = folder_of_step(run, step)
    else:
        whole = newest_whole(run)
        if whole is None:
            raise CheckpointError(f"{run} holds no whole checkpoint: expected checkpoints/step-*/ with a manifest.")
        return whole

    # A checkpoint that was asked for by step, or as the best, is not verified yet.
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


def model_sha256(checkpoint: Path) -> str:
    """The hash of a verified checkpoint's weights."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"][MODEL]["sha256"]


def model_sha256s(run: Path) -> list[str]:
    """Hashes of the weights, by the manifests of a run's checkpoints, the newest first; damaged ones are left out."""
    found = []
    for step in reversed(steps(run)):
        manifest = read_json(folder_of_step(run, step) / MANIFEST) or {}
        with contextlib.suppress(KeyError, TypeError):
            found.append(manifest["files"][MODEL]["sha256"])
    return found


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading one tensor at a time: `.keys()`, `.get_tensor(name)`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as tensors:
        yield tensors


def read_model(checkpoint: Path) -> "dict[str, Tensor]":
    """All fp32 weights of a verified checkpoint, by parameter name."""
    with open_tensors(checkpoint / MODEL) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
