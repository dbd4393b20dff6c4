"""Writing one checkpoint while training goes on, on the leaders of the first `checkpoint_copies` hosts.

    begin   every rank copies its partitions to host memory; training goes on
    thread  memory for it? -> gather, window by window, over its own gloo group -> files, hashes
            -> is the folder still ours? -> rename -> `latest`, `best`, retention, each after the same question
    finish  wait for the thread; the result of the save on every host

A step counts as saved if at least one writer holds it whole. A full disk, or a lack of memory, costs a host its copy,
not the run: the writer goes on receiving, so that the others need not wait, and reports it. A host deletes its older
checkpoints only once it holds the new one, and the best one only once it holds a better one.

Known gap: the copy takes host memory while a save is in flight: 12 bytes a parameter over all ranks, 6 with 8-bit
moments. In addition a rank needs one window of values (gathering.py), a writer three.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import retention
from ds_slm.checkpoint.gathering import Gathering, Shapes, Span, notes_of, spans_of_kind
from ds_slm.checkpoint.resume import file_of_kind
from ds_slm.checkpoint.tensor_file import TensorFile
from ds_slm.engine import masters, partitions
from ds_slm.engine.engine import Engine
from ds_slm.engine.partitions import Snapshot
from ds_slm.errors import ReplacedByNewerLaunch, UserError
from ds_slm.files import write_point
from ds_slm.recipe.schema import Recipe
from ds_slm.run import folder as run_folder
from ds_slm.run import launches
from ds_slm.run.launches import Launch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome:
    """The result of a save on one rank."""

    kind: Literal["held", "failed", "replaced", "no writer"]
    reason: str = ""
    notes: tuple[str, ...] = ()
    """What else the user should know."""


@dataclass(frozen=True)
class Saved:
    """The result of a save, the same on every rank."""

    held_by: tuple[str, ...] = ()
    """Hosts that hold the checkpoint whole."""
    failed: tuple[str, ...] = ()
    """Host and reason for each host that does not."""
    replaced: bool = False
    """Whether a newer launch holds a host's folder."""

    @property
    def durable(self) -> bool:
        """Whether the checkpoint is whole on a disk."""
        return bool(self.held_by)


def keepers(writers: list[int], recipe: Recipe) -> list[int]:
    """The ranks, among those with their own folder, whose hosts keep checkpoints and records."""
    return writers[: recipe.run.checkpoint_copies]


class BackgroundSave:
    """Writes checkpoints one at a time, in a thread of every rank."""

    def __init__(
        self, engine: Engine, run: Path, launch: Launch, writers: list[int], say: Callable[[str], None]
    ) -> None:
        """Collective.

        Args:
            engine: whose weights and moments are saved.
            run: the run folder, each host's own.
            launch: this launch; if another one holds the folder, nothing is written.
            writers: ranks that may keep checkpoints; the first `checkpoint_copies` of them do.
            say: takes a line.
        """
        self.run, self.control = run, engine.control.background()
        self.writers = keepers(writers, engine.recipe)
        self.engine, self.say, self._launch = engine, say, launch
        self._has_folder = engine.control.rank in writers
        self._thread: threading.Thread | None = None
        self._result = Saved()
        self.durable_step = -1
        """The step of the newest checkpoint that this launch wrote and knows to be on a disk."""
        self._whole: dict[int, retention.Stamps] = {}
        """Steps of this host's checkpoints that this launch wrote or read to the end, with their files' stamps then."""

    @property
    def writes(self) -> bool:
        """Whether this rank keeps checkpoints."""
        return self.control.rank in self.writers

    @property
    def is_replaced(self) -> bool:
        """Whether another launch holds this host's run folder."""
        return self.writes and launches.is_replaced(self.run, self._launch)

    def begin(self, content: Mapping[str, Any]) -> None:
        """Copy this rank's part, and write it in a thread. Wait for the save before with `finish`.

        Raises TrainingError, on all ranks, if the weights to write are not the weights that the model computes with.
        """
        assert self._thread is None, "one save at a time"
        masters.check(self.engine.deepspeed, self.engine.control)
        self._result = Saved(failed=("the save did not come to its end",))
        own, problem = self.snapshot()
        self._thread = threading.Thread(target=self._save, args=(own, problem, content), name="saving")
        self._thread.start()

    def finish(self) -> Saved | None:
        """Wait for the save in flight, and return its result; None if there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._result

    def snapshot(self) -> tuple[Snapshot | None, str | None]:
        """This rank's part, or why there is no memory for it."""
        try:
            return partitions.snapshot(self.engine.deepspeed), None
        except (MemoryError, RuntimeError) as error:
            return None, reason_of(error)

    def gathering(self, problem: str | None) -> tuple[Gathering | None, str | None]:
        """What gathers tensors on the writers, or why there is no memory for it."""
        if problem is not None:
            return None, problem
        try:
            return Gathering(self.writers, self.control), None
        except (MemoryError, RuntimeError) as error:
            return None, reason_of(error)

    def know_whole(self, step: int) -> None:
        """Remember that this launch wrote this host's checkpoint of a step, or read it to the end."""
        self._whole[step] = retention.stamps(checkpoint_files.folder_of_step(self.run, step))

    # --- in the thread; collective, whatever fails on a rank --------------------------------------------------------

    def _save(self, own: Snapshot | None, problem: str | None, content: Mapping[str, Any]) -> None:
        step, hosts = content["step"], self.control.hosts
        outcome = self._write(own, problem, content)

        # All ranks learn of every host's outcome, and so agree on what was saved.
        outcomes = [Outcome(**theirs) for theirs in self.control.gather(asdict(outcome))]
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
                self.say(f"step {step}: {host}: {note}")

    def _leave_sign(self, step: int, saved: Saved) -> None:
        """Record the save in every host's folder, for a later launch on hosts that hold no checkpoint."""
        if saved.durable and self._has_folder and not launches.is_replaced(self.run, self._launch):
            with contextlib.suppress(OSError):  # the checkpoint is there
                run_folder.tell_saved(self.run, step, saved.held_by)

    def _tell(self, step: int, saved: Saved) -> None:
        name, failed = checkpoint_files.folder_of_step(self.run, step).name, "; ".join(saved.failed)
        if not saved.durable:
            self.say(f"step {step} COULD NOT BE SAVED: {failed}. The next save tries again.")
        elif failed:
            self.say(f"step {step}: saved {name} on {', '.join(saved.held_by)}, BUT NOT on {failed}")
        else:
            self.say(f"step {step}: saved {name}")

    def _write(self, own: Snapshot | None, problem: str | None, content: Mapping[str, Any]) -> Outcome:
        # Every rank allocates the memory it needs before anything is sent.
        gathering, problem = self.gathering(problem)
        if any(self.control.gather(problem is not None)):
            return Outcome("failed", problem) if problem else Outcome("no writer")
        assert own is not None and gathering is not None

        # All tensors, in the order of their files.
        attempt = _Attempt(self.run, content["step"]) if self.writes else None
        for kind in partitions.KINDS:
            _stream(gathering, attempt, file_of_kind(kind), own.shapes, spans_of_kind(own, kind))
        shapes, notes = notes_of(own, self.control)
        if shapes:
            _stream(gathering, attempt, checkpoint_files.ABSMAX, shapes, notes)

        # A rank that could not read its own values has sent other values: no writer names such a checkpoint.
        if any(self.control.gather(gathering.problem is not None)):
            if attempt:
                attempt.abandon()
            return Outcome("failed", gathering.problem) if gathering.problem else Outcome("no writer")
        if attempt is None:
            return Outcome("no writer")
        content = {**content, "optimizer_steps": own.optimizer_steps, "topology": self.engine.topology}
        outcome = attempt.end(content, lambda: launches.refuse_replaced(self.run, self._launch))
        return self._put_in_order(content) if outcome.kind == "held" else outcome

    def _put_in_order(self, content: Mapping[str, Any]) -> Outcome:
        """Update `latest`, `best` and retention once the checkpoint is durable: a failure here costs no checkpoint."""
        step, best_step, settings = content["step"], content["best_step"], self.engine.recipe.run
        self.know_whole(step)
        notes: list[str] = []
        try:
            self._if_ours(notes, lambda: self._point("latest", step, step))
            if best_step in self._whole and checkpoint_files.named_by(self.run, "best") != best_step:
                self._if_ours(notes, lambda: self._point("best", step, best_step))
            arguments = settings.keep_last, settings.keep_best, self._whole, best_step
            self._if_ours(notes, lambda: notes.extend(retention.retain(self.run, *arguments)))
            write_point(f"retained@{step}", self.run)
        except ReplacedByNewerLaunch:
            return Outcome("replaced")
        return Outcome("held", notes=tuple(notes))

    def _if_ours(self, notes: list[str], action: Callable[[], object]) -> None:
        """Act if no newer launch holds the folder; note it if the disk refuses. Raises ReplacedByNewerLaunch."""
        launches.refuse_replaced(self.run, self._launch)
        with noted(notes):
            action()

    def _point(self, pointer: str, step: int, named: int) -> None:
        mark = checkpoint_files.mark_latest if pointer == "latest" else checkpoint_files.mark_best
        mark(checkpoint_files.folder_of_step(self.run, named))
        write_point(f"{pointer}@{step}", self.run)


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Within it, errors of the disk are added to the notes."""
    try:
        yield
    except OSError as error:
        notes.append(f"the checkpoints could not be put in order: {error}")


class Disk:
    """A disk, or memory, that may fail: after the first failure nothing more is tried."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """The action's result; None if it or an earlier one failed."""
        if self.error is None:
            try:
                return action()
            except Exception as error:  # whatever it is: the others wait for this rank's next message
                self.error = error
        return None


class _Attempt:
    """A checkpoint being written on a disk that may fail."""

    def __init__(self, run: Path, step: int) -> None:
        self._disk = Disk()
        self._writer = self._disk.attempt(lambda: checkpoint_files.Writer(run, step))
        self._file: TensorFile | None = None

    def _attempt(self, action: Callable[[checkpoint_files.Writer], Result]) -> Result | None:
        writer = self._writer
        result = self._disk.attempt(lambda: action(writer)) if writer else None
        if self._disk.error:
            self.abandon()
        return result

    def open(self, file_name: str, shapes: Shapes) -> None:
        """Begin a safetensors file."""
        self._file = self._attempt(lambda writer: writer.begin_tensors(file_name, shapes))

    def write(self, values: Tensor) -> None:
        """Write the file's next values."""
        if file := self._file:
            self._attempt(lambda writer: file.write(values))

    def close(self, file_name: str) -> None:
        """End the file."""
        if file := self._file:
            self._attempt(lambda writer: writer.end_tensors(file_name, file))
        self._file = None

    def end(self, content: Mapping[str, Any], allowed: Callable[[], None]) -> Outcome:
        """Give the checkpoint its name, if that is still allowed."""
        self._attempt(lambda writer: writer.commit(content, allowed))
        if self._disk.error is None:
            return Outcome("held")
        if isinstance(self._disk.error, ReplacedByNewerLaunch):
            return Outcome("replaced")
        return Outcome("failed", reason_of(self._disk.error))

    def abandon(self) -> None:
        """Remove what was written, which frees its space."""
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


def reason_of(error: Exception) -> str:
    """The text of an error, for the user."""
    return str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
