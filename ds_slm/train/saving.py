"""Saving behind training: on the leaders of the first `checkpoint_copies` hosts, one checkpoint at a time.

    begin   every rank copies its partitions to host memory; training goes on
    thread  memory for it? -> gather, window by window, over a gloo group of its own -> files, hashes
            -> is the folder still ours? -> rename -> `latest`, `best`, retention, each after the same question
    finish  wait for the thread; what became of the save on every host

A step is saved where at least one writer holds it whole. A disk that is full, or a host short of memory, costs its
copy, not the run: the writer goes on receiving, so that nobody waits for it, and tells. On each host older checkpoints
are deleted only once that host holds the new one, and the best one it holds only once it holds a better one.

Known gap: the copy takes host memory while a save is in flight: 12 bytes a parameter over all ranks, 6 with 8-bit
moments; a rank needs a window of values besides (gathering.py), a writer three.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from ds_slm.checkpoint import format as checkpoint_format
from ds_slm.checkpoint import retention
from ds_slm.checkpoint.tensor_file import TensorFile
from ds_slm.errors import Superseded, TrainingError, UserError
from ds_slm.files import write_json
from ds_slm.train import launches, masters, run_folder, zero_state
from ds_slm.train.checkpointing import Found, State, best_held, best_over, file_of_kind, held_best, scaler_state
from ds_slm.train.engine import Engine
from ds_slm.train.gathering import Gathering, Shapes, Span, notes_of, spans_of_kind
from ds_slm.train.launches import Launch
from ds_slm.train.zero_state import Snapshot

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome:
    """What became of a save on one rank."""

    kind: Literal["held", "failed", "replaced", "no writer"]
    reason: str = ""
    notes: tuple[str, ...] = ()
    """What else its user should know."""


@dataclass(frozen=True)
class Saved:
    """What became of a save, the same on every rank."""

    held_by: tuple[str, ...] = ()
    """Hosts that hold the checkpoint whole."""
    failed: tuple[str, ...] = ()
    """Host and reason of each that does not."""
    replaced: bool = False
    """Whether a newer launch holds a host's folder."""

    @property
    def durable(self) -> bool:
        """Whether it lies whole on a disk."""
        return bool(self.held_by)


class Saver:
    """Writes a run's checkpoints, and its signs of an end."""

    def __init__(
        self,
        engine: Engine,
        run: Path,
        launch: Launch,
        writers: list[int],
        identity: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Collective.

        Args:
            engine: whose weights and moments are saved.
            run: the run folder, each host's own.
            launch: this one; where another holds the folder nothing is written.
            writers: ranks that may keep checkpoints; the first `checkpoint_copies` of them do.
            identity: stored in every checkpoint: hashes of recipe, data and tokenizer.
            say: takes a line.
        """
        self._engine, self._run, self._launch, self._identity, self._say = engine, run, launch, identity, say
        self._writers = writers[: engine.recipe.run.checkpoint_copies]
        self._has_folder = engine.control.rank in writers
        self._control = engine.control.background()
        self._thread: threading.Thread | None = None
        self._result = Saved()
        self._whole: dict[int, retention.Stamps] = {}
        """Steps of this host's checkpoints that this launch wrote or read to the end, and how their files were then."""
        self.durable_step = -1
        """Of the newest checkpoint that this launch knows to lie on a disk."""

    @property
    def writes(self) -> bool:
        """Whether this rank keeps checkpoints."""
        return self._control.rank in self._writers

    @property
    def superseded(self) -> bool:
        """Whether another launch holds this host's run folder."""
        return self.writes and launches.is_replaced(self._run, self._launch)

    def begin(self, state: State) -> None:
        """Copy this rank's part, and write it behind the caller's back. Wait for the one before with `finish`.

        Raises TrainingError, on all ranks, where the weights to be written are not those the model computes with.
        """
        assert self._thread is None, "one save at a time"
        masters.check(self._engine.deepspeed, self._engine.control)
        self._result = Saved(failed=("the save did not come to its end",))
        content = {**asdict(state), **self._identity, "loss_scaler": scaler_state(self._engine)}
        own, problem = self._snapshot()
        self._thread = threading.Thread(target=self._save, args=(own, problem, content), name="saving")
        self._thread.start()

    def finish(self) -> Saved | None:
        """Wait for the save in flight, and say what became of it; None where there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._result

    def _snapshot(self) -> tuple[Snapshot | None, str | None]:
        """This rank's part, or why there is no memory for it."""
        try:
            return zero_state.snapshot(self._engine.deepspeed), None
        except (MemoryError, RuntimeError) as error:
            return None, _told(error)

    # --- in the thread; collective, whatever fails on a rank --------------------------------------------------------

    def _save(self, own: Snapshot | None, problem: str | None, content: dict[str, Any]) -> None:
        step, hosts = content["step"], self._control.hosts
        outcome = self._write(own, problem, content)
        outcomes = [Outcome(**theirs) for theirs in self._control.gather(asdict(outcome))]
        by_kind = {kind: [rank for rank, one in enumerate(outcomes) if one.kind == kind] for kind in ("held", "failed")}
        self._result = saved = Saved(
            held_by=tuple(hosts[rank] for rank in by_kind["held"]),
            failed=tuple(f"{hosts[rank]}: {outcomes[rank].reason}" for rank in by_kind["failed"]),
            replaced=any(one.kind == "replaced" for one in outcomes),
        )
        if saved.durable:
            self.durable_step = step
        if not saved.replaced:
            self._leave_sign(step, saved)
            self._tell(step, saved)
        for host, one in zip(hosts, outcomes, strict=True):
            for note in one.notes:
                self._say(f"step {step}: {host}: {note}")

    def _leave_sign(self, step: int, saved: Saved) -> None:
        """In every host's folder: a later launch on hosts that hold no checkpoint knows that there was one."""
        if saved.durable and self._has_folder and not launches.is_replaced(self._run, self._launch):
            with contextlib.suppress(OSError):  # the checkpoint is there
                run_folder.tell_saved(self._run, step, saved.held_by)

    def _tell(self, step: int, saved: Saved) -> None:
        name, failed = checkpoint_format.folder_of_step(self._run, step).name, "; ".join(saved.failed)
        if not saved.durable:
            self._say(f"step {step} COULD NOT BE SAVED: {failed}. The next save tries again.")
        elif failed:
            self._say(f"step {step}: saved {name} on {', '.join(saved.held_by)}, BUT NOT on {failed}")
        else:
            self._say(f"step {step}: saved {name}")

    def _write(self, own: Snapshot | None, problem: str | None, content: dict[str, Any]) -> Outcome:
        # Every rank takes the memory it needs before anything is sent.
        gathering, problem = self._prepare(problem)
        if any(self._control.gather(problem is not None)):
            return Outcome("failed", problem) if problem else Outcome("no writer")
        assert own is not None and gathering is not None

        # All tensors, in the order of their files.
        attempt = _Attempt(self._run, content["step"]) if self.writes else None
        for kind in zero_state.KINDS:
            _stream(gathering, attempt, file_of_kind(kind), own.shapes, spans_of_kind(own, kind))
        shapes, notes = notes_of(own, self._control)
        if shapes:
            _stream(gathering, attempt, checkpoint_format.ABSMAX, shapes, notes)

        # A rank that could not read its own values has sent others: no writer gives that a name.
        if any(self._control.gather(gathering.problem is not None)):
            if attempt:
                attempt.abandon()
            return Outcome("failed", gathering.problem) if gathering.problem else Outcome("no writer")
        if attempt is None:
            return Outcome("no writer")
        content = {**content, "optimizer_steps": own.optimizer_steps, "topology": self._engine.topology}
        outcome = attempt.end(content, lambda: launches.refuse_replaced(self._run, self._launch))
        return self._put_in_order(content) if outcome.kind == "held" else outcome

    def _prepare(self, problem: str | None) -> tuple[Gathering | None, str | None]:
        if problem is not None:
            return None, problem
        try:
            return Gathering(self._writers, self._control), None
        except (MemoryError, RuntimeError) as error:
            return None, _told(error)

    def _put_in_order(self, content: Mapping[str, Any]) -> Outcome:
        """`latest`, `best` and retention, once the checkpoint is durable: what fails of these costs no checkpoint."""
        step, best_step, settings = content["step"], content["best_step"], self._engine.recipe.run
        self._know_whole(step)
        notes: list[str] = []
        try:
            self._if_ours(notes, lambda: self._point("latest", step, step))
            if best_step in self._whole and checkpoint_format.named_by(self._run, "best") != best_step:
                self._if_ours(notes, lambda: self._point("best", step, best_step))
            arguments = settings.keep_last, settings.keep_best, self._whole, best_step
            self._if_ours(notes, lambda: notes.extend(retention.retain(self._run, *arguments)))
            checkpoint_format.write_point("retained", step, self._run)
        except Superseded:
            return Outcome("replaced")
        return Outcome("held", notes=tuple(notes))

    def _know_whole(self, step: int) -> None:
        self._whole[step] = retention.stamps(checkpoint_format.folder_of_step(self._run, step))

    def _if_ours(self, notes: list[str], action: Callable[[], object]) -> None:
        """Do it if no newer launch holds the folder; a disk that refuses is noted. Raises Superseded."""
        launches.refuse_replaced(self._run, self._launch)
        with noted(notes):
            action()

    def _point(self, pointer: str, step: int, named: int) -> None:
        mark = checkpoint_format.mark_latest if pointer == "latest" else checkpoint_format.mark_best
        mark(checkpoint_format.folder_of_step(self._run, named))
        checkpoint_format.write_point(pointer, step, self._run)

    # --- beside saving ----------------------------------------------------------------------------------------------

    def resume(self, state: State, found: Found | None) -> State:
        """Put every host's checkpoints in order as a launch begins; returns the state to go on from. Collective.

        What was passed over as damaged is set aside. `best` names the run's best checkpoint where a host holds it;
        where none does (its only host is gone), the best of those that are held takes its place. Where this launch
        evaluates other held-out rows, the next evaluation decides anew.
        """
        notes: list[str] = []
        if self.writes and found:
            if found.own_step >= 0:
                self._know_whole(found.own_step)
            for checkpoint in found.damaged:
                with noted(notes):
                    if checkpoint_format.verify(checkpoint):  # still
                        notes.append(f"{checkpoint} is damaged: moved to {retention.set_aside(checkpoint)}")
            if found.own_step >= 0 and checkpoint_format.named_by(self._run, "latest") != found.own_step:
                with noted(notes):
                    checkpoint_format.mark_latest(checkpoint_format.folder_of_step(self._run, found.own_step))

        changed = any("run.eval_rows" in (one.get("changes") or {}) for one in run_folder.read_changes(self._run))
        was_changed = any(self._control.gather(changed))
        state, note = best_over(state, self._engine.recipe.run.eval_rows, was_changed)
        notes += [note] if note and self._control.rank == 0 else []
        if self._engine.recipe.run.keep_best and state.best_step >= 0:
            held = held_best(self._run, state) if self.writes else {}
            state, note = best_held(state, self._control.gather(sorted(held.items())))
            notes += [note] if note and self._control.rank == 0 else []
            if state.best_step in held and checkpoint_format.named_by(self._run, "best") != state.best_step:
                with noted(notes):
                    checkpoint_format.mark_best(checkpoint_format.folder_of_step(self._run, state.best_step))

        for host, theirs in zip(self._control.hosts, self._control.gather(notes), strict=True):
            for note in theirs:
                self._say(f"{host}: {note}")
        return state

    def write_weights(self, path: Path) -> list[str]:
        """Write the fp32 weights of the last applied step on the ranks that keep checkpoints. Collective.

        Returns what went wrong on any rank, with its host's name; the same on all.
        """
        own, problem = self._snapshot()
        gathering, problem = self._prepare(problem)
        if problems := self._named(problem):
            return problems
        assert own is not None and gathering is not None
        disk = _Disk()
        file = disk.attempt(lambda: _begun(path, own.shapes)) if self.writes and not self.superseded else None

        def write(values: Tensor) -> None:
            disk.attempt(lambda: file and file.write(values))

        gathering.stream(own.shapes, spans_of_kind(own, "model"), write if self.writes else None)
        if file:
            disk.attempt(file.sync)
            file.close()
        if disk.error or gathering.problem:
            checkpoint_format.remove(path)
        return self._named(gathering.problem or (_told(disk.error) if disk.error else None))

    def _named(self, problem: str | None) -> list[str]:
        """Every rank's problem with its host's name, on every rank. Collective."""
        everyone = zip(self._control.hosts, self._control.gather(problem), strict=True)
        return [f"{host}: {one}" for host, one in everyone if one is not None]

    def sign_off(self, step: int) -> None:
        """Leave a sign that a signal ended the run with a whole checkpoint: exit codes do not outlive the launcher."""
        if self.writes and not self.superseded:
            with contextlib.suppress(OSError):  # the exit code says so as well
                run_folder.tell_stopped(self._run, step)

    def write_done(self, step: int, content: Mapping[str, Any]) -> None:
        """Write done.json, with the last checkpoint's hash, on all hosts that can. Collective.

        Raises:
            Superseded: a newer launch holds a host's folder.
            TrainingError: no host holds the checkpoint, or none can write the file.
        """
        if any(self._control.gather(self.superseded)):
            raise Superseded
        checkpoint, own = checkpoint_format.folder_of_step(self._run, step), None
        with contextlib.suppress(OSError):
            own = checkpoint_format.manifest_sha256(checkpoint) if self.writes else None
        everyone = zip(self._control.hosts, self._control.gather(own), strict=True)
        held = {host: sha256 for host, sha256 in everyone if sha256}  # of a host's ranks one writes
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
        if len(problems) == len(self._writers):
            raise TrainingError("; ".join(problems))
        for one in problems:
            self._say(one)


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """What a disk refuses within it is added to the notes."""
    try:
        yield
    except OSError as error:
        notes.append(f"the checkpoints could not be put in order: {error}")


class _Disk:
    """A disk that may fail, or memory: after the first failure nothing more is tried."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """The action's result; None where it or one before it failed."""
        if self.error is None:
            try:
                return action()
            except Exception as error:  # also what is no disk's fault: the others wait for this rank's next message
                self.error = error
        return None


class _Attempt:
    """A checkpoint being written on a disk that may fail."""

    def __init__(self, run: Path, step: int) -> None:
        self._disk = _Disk()
        self._writer = self._disk.attempt(lambda: checkpoint_format.Writer(run, step))
        self._file: TensorFile | None = None

    def _attempt(self, action: Callable[[checkpoint_format.Writer], Result]) -> Result | None:
        writer = self._writer
        result = self._disk.attempt(lambda: action(writer)) if writer else None
        if self._disk.error:
            self.abandon()
        return result

    def open(self, file_name: str, shapes: Shapes) -> None:
        """Begin a safetensors file."""
        self._file = self._attempt(lambda writer: writer.open_tensors(file_name, shapes))

    def write(self, values: Tensor) -> None:
        """The next values of it."""
        if file := self._file:
            self._attempt(lambda writer: file.write(values))

    def close(self, file_name: str) -> None:
        """End it."""
        if file := self._file:
            self._attempt(lambda writer: writer.end_tensors(file_name, file))
        self._file = None

    def end(self, content: Mapping[str, Any], allowed: Callable[[], None]) -> Outcome:
        """Give the checkpoint its name, if that is still allowed."""
        self._attempt(lambda writer: writer.commit(content, allowed))
        if self._disk.error is None:
            return Outcome("held")
        if isinstance(self._disk.error, Superseded):
            return Outcome("replaced")
        return Outcome("failed", _told(self._disk.error))

    def abandon(self) -> None:
        """Remove what was written, and give its room back."""
        if self._file:
            self._file.close()
            self._file = None
        if self._writer:
            self._writer.abandon()


def _stream(gathering: Gathering, attempt: _Attempt | None, file_name: str, shapes: Shapes, own: list[Span]) -> None:
    """Gather one file's tensors and write them."""
    if attempt is None:
        gathering.stream(shapes, own, None)
        return
    attempt.open(file_name, shapes)
    gathering.stream(shapes, own, attempt.write)
    attempt.close(file_name)


def _begun(path: Path, shapes: Shapes) -> TensorFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an earlier launch
    return TensorFile(path, shapes)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
