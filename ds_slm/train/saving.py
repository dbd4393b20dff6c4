"""Saving behind training: on the leaders of the first `checkpoint_copies` hosts, one checkpoint at a time.

    begin   every rank copies its partitions to host memory; training goes on
    thread  gather over a gloo group of its own -> fp32 tensors by name -> files, hashes, rename -> retention
    finish  wait for the thread; what went wrong on any rank

A disk that is full costs this checkpoint, not the run: the writer goes on receiving, so that nobody waits for it, and
tells. Older checkpoints are deleted only once the new one is durable.

Known gap: the copy takes host memory while a save is in flight: 12 bytes a parameter over all ranks, 6 with 8-bit
moments, and on a writer one kind of all tensors in fp32.
"""

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_slm.checkpoint import format as checkpoint_format
from ds_slm.errors import SUPERSEDED
from ds_slm.train import run_folder, zero_state
from ds_slm.train.checkpointing import State, file_of_kind, scaler_state
from ds_slm.train.control import Control
from ds_slm.train.engine import Engine
from ds_slm.train.zero_state import Snapshot


class Saver:
    """Writes a run's checkpoints."""

    def __init__(
        self, engine: Engine, run: Path, writers: list[int], identity: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._engine, self._run, self._identity, self._say = engine, run, identity, say
        self._writers = writers[: engine.recipe.run.checkpoint_copies]
        self._control = engine.control.background()
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []
        self._generation = run_folder.generation(run)
        self.durable_step = -1
        """Of the newest checkpoint that this launch knows to lie on disk."""

    @property
    def writes(self) -> bool:
        """Whether this rank keeps checkpoints."""
        return self._control.rank in self._writers

    @property
    def superseded(self) -> bool:
        """Whether a newer launch writes into this host's run folder."""
        return self.writes and run_folder.generation(self._run) != self._generation

    def begin(self, state: State, is_best: bool) -> None:
        """Copy this rank's part, and write it behind the caller's back. Wait for the one before with `finish`."""
        assert self._thread is None, "one save at a time"
        self._problems = ["the save did not come to its end"]
        content = {**asdict(state), **self._identity, "loss_scaler": scaler_state(self._engine)}
        arguments = zero_state.snapshot(self._engine.deepspeed), content, is_best
        self._thread = threading.Thread(target=self._save, args=arguments, name="saving")
        self._thread.start()

    def finish(self) -> list[str]:
        """Wait for the save in flight; all ranks' problems with it, on every rank."""
        if self._thread is None:
            return []
        self._thread.join()
        self._thread = None
        return self._problems

    def weights(self) -> dict[str, Tensor] | None:
        """The fp32 weights of the last applied step on the ranks that keep checkpoints; None elsewhere. Collective."""
        return zero_state.gather(zero_state.snapshot(self._engine.deepspeed), "model", self._writers, self._control)

    def sign_off(self, step: int) -> None:
        """Leave a sign that a signal ended the run with a whole checkpoint: exit codes do not outlive the launcher."""
        if self.writes and not self.superseded:
            run_folder.tell_stopped(self._run, step)

    def set_pointers(self, state: State) -> None:
        """Let `best` name what a resumed run calls its best: a writer may have been killed before it could."""
        best = checkpoint_format.folder_of_step(self._run, state.best_step)
        if self.writes and best.is_dir():
            checkpoint_format.mark_best(best)

    def _save(self, own: Snapshot, content: dict[str, Any], is_best: bool) -> None:
        problem = None
        try:
            problem = self._write(own, content, is_best)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        step, host = content["step"], self._control.hosts[self._control.rank]
        self._problems = [one for one in self._control.gather(problem and f"{host}: {problem}") if one]
        if self._problems:
            told = "; ".join(self._problems)
            self._say(f"step {step} COULD NOT BE SAVED: {told}. The next save tries again.")
        else:
            self.durable_step = step
            self._say(f"step {step}: saved {checkpoint_format.folder_of_step(self._run, step).name}")

    def _write(self, own: Snapshot, content: dict[str, Any], is_best: bool) -> str | None:
        """Collective, whatever fails on a writer's disk; returns what did."""
        writer = _Attempt(self._run, content["step"], self._generation) if self.writes else None
        for kind in zero_state.KINDS:
            tensors = zero_state.gather(own, kind, self._writers, self._control)
            if writer and tensors is not None:
                writer.add(file_of_kind(kind), tensors)
            del tensors  # before the next kind's
        notes = _gather_notes(own, self._control)
        if writer is None:
            return None
        if notes:
            writer.add(checkpoint_format.ABSMAX, notes)
        settings = self._engine.recipe.run
        content = {**content, "optimizer_steps": own.optimizer_steps, "topology": own.topology}
        problem = writer.end(content)
        if problem is None:
            try:
                if is_best:
                    checkpoint_format.mark_best(checkpoint_format.folder_of_step(self._run, content["step"]))
                    checkpoint_format.die_at("best", content["step"])
                checkpoint_format.retain(self._run, settings.keep_last, settings.keep_best)
                checkpoint_format.die_at("retained", content["step"])
            except OSError as error:  # the checkpoint itself is durable
                self._say(f"step {content['step']}: older checkpoints could not be put in order: {error}")
        return problem


class _Attempt:
    """A checkpoint being written on a disk that may fail: after the first failure nothing more is tried."""

    def __init__(self, run: Path, step: int, generation: int) -> None:
        self._run, self._generation = run, generation
        self.problem: str | None = None
        self._writer: checkpoint_format.Writer | None = None
        self._try(lambda: setattr(self, "_writer", checkpoint_format.Writer(run, step)))

    def _try(self, action: Callable[[], object]) -> None:
        if self.problem is None:
            try:
                action()
            except Exception as error:  # also what is no disk's fault: the others wait for this rank's next message
                self.problem = str(error) if isinstance(error, OSError | SafetensorError) else repr(error)
                if self._writer:
                    self._writer.abandon()

    def add(self, file_name: str, tensors: dict[str, Tensor]) -> None:
        """One safetensors file."""
        self._try(lambda: self._writer and self._writer.add_tensors(file_name, tensors))

    def end(self, content: dict[str, Any]) -> str | None:
        """Give it its name; returns what failed on the way."""

        def commit() -> None:
            assert self._writer is not None
            if run_folder.generation(self._run) != self._generation:
                raise OSError(SUPERSEDED)
            self._writer.commit(content)

        self._try(commit)
        return self.problem


def _gather_notes(own: Snapshot, control: Control) -> dict[str, Tensor]:
    """Every rank's block scales, on every rank: a 256th of the moments' size."""
    mine = zero_state.absmax_notes(own, control.rank)
    notes = {}
    for source, sizes in enumerate(control.gather({name: note.numel() for name, note in mine.items()})):
        for name, numel in sizes.items():
            tensor = mine[name] if source == control.rank else torch.empty(numel)
            notes[name] = control.broadcast_tensor(tensor, source)
    return notes
