"""A run's checkpoints, as the loop sees them: save, wait, ask whether one is durable; and which one is the best.

    save   --BackgroundSave--> files of one checkpoint on every writer, while training goes on
    wait   the result: a save that no host holds counts as never begun, and the best is the one before
    resume puts in order what earlier launches left: sets damaged ones aside, marks `latest` and `best`

`best` is the saved checkpoint whose evaluation, at exactly its step, gave the lowest held-out loss. It follows what is
durable on any host. Only this file and best.py decide it.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import retention
from ds_slm.checkpoint.best import Best, held_best
from ds_slm.checkpoint.gathering import spans_of_kind
from ds_slm.checkpoint.resume import ResumePoint, State, scaler_state
from ds_slm.checkpoint.saving import BackgroundSave, Disk, Saved, noted, reason_of
from ds_slm.checkpoint.tensor_file import TensorFile
from ds_slm.errors import ReplacedByNewerLaunch, TrainingError
from ds_slm.files import write_json
from ds_slm.run import folder as run_folder


class Checkpoints:
    """All checkpoints of a run, and its signs of an end."""

    def __init__(self, background: BackgroundSave, identity: Mapping[str, Any]) -> None:
        """Begin as for a new run; a run that goes on calls `resume` after this.

        Args:
            background: writes them.
            identity: hashes of recipe, data and tokenizer, stored in every checkpoint.
        """
        self._background, self._identity = background, identity
        self._engine, self._run = background.engine, background.run
        self._control, self._say = background.control, background.say
        self.best = Best(eval_rows=self._engine.recipe.run.eval_rows)
        """The best checkpoint, possibly one that is being saved."""
        self._durable_best = self.best
        self._saved: State | None = None
        self._resumed_step = -1

    @property
    def writes(self) -> bool:
        """Whether this rank keeps checkpoints."""
        return self._background.writes

    @property
    def is_replaced(self) -> bool:
        """Whether another launch holds this host's run folder."""
        return self._background.is_replaced

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, state: State, val_loss: float | None) -> None:
        """Save a state while training goes on; waits for the save before it.

        Args:
            state: what is saved.
            val_loss: held-out loss of an evaluation at exactly this step; None if there was none.

        Raises:
            ReplacedByNewerLaunch: a newer launch holds a host's folder.
            TrainingError: on all ranks, if the weights to write are not the weights that the model computes with.
        """
        self.wait()
        best = self.best.improved_by(state.step, val_loss)
        scaler = scaler_state(self._engine)
        self._background.begin({**asdict(state), **best.fields(), **self._identity, "loss_scaler": scaler})
        self._saved, self.best = state, best

    def wait(self) -> Saved | None:
        """Wait for the save in flight, and return its result: a save that no host holds counts as never begun.

        Returns None if no save is in flight. Raises ReplacedByNewerLaunch.
        """
        saved = self._background.finish()
        if saved is None:
            return None
        if saved.replaced:
            raise ReplacedByNewerLaunch
        if saved.durable:
            self._durable_best = self.best
        else:
            self._saved, self.best = None, self._durable_best
        return saved

    def is_saved(self, state: State) -> bool:
        """Whether the newest checkpoint, possibly one that is being saved, holds this state."""
        return self._saved == state

    def is_durable(self, step: int) -> bool:
        """Whether a checkpoint of this step is known to be whole on a disk."""
        return step in (self._background.durable_step, self._resumed_step)

    def close(self) -> None:
        """Wait for the save in flight, whatever its result. Call it before the process group is gone."""
        self._background.finish()

    # --- beside saving ----------------------------------------------------------------------------------------------

    def resume(self, state: State, found: ResumePoint) -> None:
        """Put every host's checkpoints in order when a launch goes on from one. Collective.

        Checkpoints that were passed over as damaged are set aside. `best` names the run's best checkpoint if a host
        holds it. If none does (its only host is gone), the best of the checkpoints that are there takes its place. If
        this launch evaluates other held-out rows, the next evaluation chooses the best again.
        """
        notes: list[str] = []
        if self.writes:
            notes += self._set_damaged_aside(found)

        settings = self._engine.recipe.run
        changed = any("run.eval_rows" in (one.get("changes") or {}) for one in run_folder.read_changes(self._run))
        was_changed = any(self._control.gather(changed))
        best, note = Best.of(found.content).over(settings.eval_rows, was_changed)

        said = [note]
        if settings.keep_best and best.step >= 0:
            held = held_best(self._run, best, state.step) if self.writes else {}
            best, note = best.held(self._control.gather(sorted(held.items())))
            said.append(note)
            if best.step in held and checkpoint_files.named_by(self._run, "best") != best.step:
                with noted(notes):
                    checkpoint_files.mark_best(checkpoint_files.folder_of_step(self._run, best.step))

        self.best = self._durable_best = best
        self._saved, self._resumed_step = state, state.step
        notes += [one for one in said if one and self._control.rank == 0]
        for host, theirs in zip(self._control.hosts, self._control.gather(notes), strict=True):
            for note in theirs:
                self._say(f"{host}: {note}")

    def _set_damaged_aside(self, found: ResumePoint) -> list[str]:
        """Set damaged checkpoints aside, and mark the newest whole one; returns lines for the user."""
        notes: list[str] = []
        if found.own_step >= 0:
            self._background.know_whole(found.own_step)
        for checkpoint in found.damaged:
            with noted(notes):
                if checkpoint_files.verify(checkpoint):  # still
                    notes.append(f"{checkpoint} is damaged: moved to {retention.set_aside(checkpoint)}")
        if found.own_step >= 0 and checkpoint_files.named_by(self._run, "latest") != found.own_step:
            with noted(notes):
                checkpoint_files.mark_latest(checkpoint_files.folder_of_step(self._run, found.own_step))
        return notes

    def write_weights(self, path: Path) -> list[str]:
        """Write the fp32 weights of the last applied step on the ranks that keep checkpoints. Collective.

        Returns what went wrong on any rank, with its host's name; the same on all.
        """
        own, problem = self._background.snapshot()
        gathering, problem = self._background.gathering(problem)
        if problems := self._named(problem):
            return problems
        assert own is not None and gathering is not None
        disk = Disk()
        file = disk.attempt(lambda: _new_file(path, own.shapes)) if self.writes and not self.is_replaced else None

        def write(values: Tensor) -> None:
            disk.attempt(lambda: file and file.write(values))

        gathering.stream(own.shapes, spans_of_kind(own, "model"), write if self.writes else None)
        if file:
            disk.attempt(file.sync)
            file.close()
        if disk.error or gathering.problem:
            checkpoint_files.remove(path)
        return self._named(gathering.problem or (reason_of(disk.error) if disk.error else None))

    def mark_stopped(self, step: int) -> bool:
        """If the last step is durable, record that a signal ended the run; returns whether it is durable.

        The record is needed because exit codes do not outlive the launcher.
        """
        if not self.is_durable(step):
            return False
        if self.writes and not self.is_replaced:
            with contextlib.suppress(OSError):  # the exit code says so as well
                run_folder.tell_stopped(self._run, step)
        return True

    def write_done(self, step: int, content: Mapping[str, Any]) -> None:
        """Write done.json, with the last checkpoint's hash, on all hosts that can. Collective.

        Raises:
            ReplacedByNewerLaunch: a newer launch holds a host's folder.
            TrainingError: no host holds the checkpoint, or none can write the file.
        """
        if any(self._control.gather(self.is_replaced)):
            raise ReplacedByNewerLaunch

        checkpoint, own = checkpoint_files.folder_of_step(self._run, step), None
        with contextlib.suppress(OSError):
            own = checkpoint_files.manifest_sha256(checkpoint) if self.writes else None
        everyone = zip(self._control.hosts, self._control.gather(own), strict=True)
        held = {host: sha256 for host, sha256 in everyone if sha256}  # one of a host's ranks writes
        if not held:
            raise TrainingError(f"{checkpoint} is not there any more on any host that keeps checkpoints.")

        problem = None
        if self.writes:
            sha256 = own or next(iter(held.values()))
            done = {**content, "checkpoint": checkpoint.name, "checkpoint_sha256": sha256, "held_by": list(held)}
            try:
                write_json(self._run / "done.json", done)
            except OSError as error:
                problem = f"done.json could not be written: {error}"

        problems = self._named(problem)
        if len(problems) == len(self._background.writers):
            raise TrainingError("; ".join(problems))
        for one in problems:
            self._say(one)

    def _named(self, problem: str | None) -> list[str]:
        """Every rank's problem with its host's name, on every rank. Collective."""
        everyone = zip(self._control.hosts, self._control.gather(problem), strict=True)
        return [f"{host}: {one}" for host, one in everyone if one is not None]


def _new_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TensorFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an earlier launch
    return TensorFile(path, shapes)
