"""What a checkpoint says, and resuming from whichever host has the newest whole one (saving.py writes them).

    resume   every host offers its newest whole checkpoint -> the newest wins -> its host sends it to all ranks

No shared file system is needed; if hosts share one, a single host writes for all (`Control.writers`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.distributed.problems import raise_on_all
from ds_slm.distributed.ranks import Control
from ds_slm.engine import masters, partitions
from ds_slm.engine.engine import Engine
from ds_slm.errors import AgreedDataError, CheckpointError, UserError
from ds_slm.model import decoder
from ds_slm.run import folder as run_folder


@dataclass(frozen=True)
class State:
    """Where a run stands: everything that a resumed run continues from, except the tensors."""

    step: int = 0
    """Optimiser steps applied."""
    position: int = 0
    """Global position in the order of rows: the next row to draw."""
    tokens: int = 0
    """Targets trained on."""
    ledger: str = ""
    """Hash chain: the data's hash, then the row ids of each step."""
    evaluated_step: int = -1
    """The last step whose evaluation was finished."""
    skipped_rows: tuple[tuple[int, int], ...] = ()
    """Ranges of global positions whose rows are left out (`ds_slm.data.skipping`)."""

    def after(self, position: int, tokens: int, ledger: str) -> "State":
        """The state after one more applied step."""
        return replace(self, step=self.step + 1, position=position, tokens=self.tokens + tokens, ledger=ledger)


def file_of_kind(kind: str) -> str:
    """The safetensors file that holds one kind of tensor."""
    return checkpoint_files.MODEL if kind == "model" else f"optimizer-{kind}.safetensors"


@dataclass(frozen=True)
class ResumePoint:
    """The newest whole checkpoint of all hosts."""

    source: int
    """The rank that can read it."""
    folder: Path | None
    """Its folder; None on all other ranks."""
    content: dict[str, Any]
    """Its state.json."""
    own_step: int = -1
    """The step of the newest whole checkpoint on this rank's host, if the rank leads its host."""
    damaged: tuple[Path, ...] = ()
    """The newer ones there that are not whole."""
    lost: str = ""
    """What to say of a newer step that was saved, and that no host of this launch holds whole."""


def find(
    control: Control, run: Path, identity: dict[str, Any], older: Mapping[str, str] | None = None
) -> ResumePoint | None:
    """The newest whole checkpoint of any host, or None. Collective.

    Args:
        control: the ranks' connection.
        run: the run folder, each host's own.
        identity: hashes of what this launch trains with.
        older: hashes by which an older version named the same things.

    Raises:
        CheckpointError: on every rank, if it was made from other data or another tokenizer, if there are checkpoints
            and none is whole, or if there is none although records say that one was saved.
    """
    if control.leads_host:
        checkpoint_files.put_back(run)
    own, damaged = checkpoint_files.newest_whole_and_damaged(run) if control.leads_host else (None, [])
    own_step = checkpoint_files.read_state(own)["step"] if own else -1
    offers = control.gather(own_step)
    source = offers.index(max(offers))

    # Records may know of a save that no host of this launch holds.
    saved, held_by = max(control.gather(run_folder.newest_saved(run) if control.leads_host else (0, [])))
    holders = f" on {', '.join(held_by)}" if held_by else ""

    # No host has a whole checkpoint: the run is new, unless something says that there was one.
    if offers[source] < 0:
        there = sorted({step for steps in control.gather(checkpoint_files.steps(run)) for step in steps})
        if there:
            raise CheckpointError(
                f"{run} holds checkpoints of steps {', '.join(map(str, there))}, none of them whole "
                f"(`ds-slm verify {run}` says why): restore one from a copy, or begin anew in another --run-dir."
            )
        if saved:
            raise CheckpointError(
                f"{run}: step {saved} was saved{holders}, and no host of this launch holds a checkpoint: mount the "
                "disk, or name the host, that does, and launch the same command again. To begin anew name another "
                "--run-dir, or move this folder away first (--resume never takes an empty one)."
            )
        return None

    # The host with the newest whole checkpoint sends its state to all ranks.
    is_source = control.rank == source
    content = control.broadcast(checkpoint_files.read_state(own) if is_source and own else None, source)
    refuse_other_beginning(run, content, identity, older or {})
    lost = (
        f"step {saved} was saved{holders}, and no host of this launch holds it whole" if saved > offers[source] else ""
    )

    return ResumePoint(source, own if is_source else None, content, own_step, tuple(damaged), lost)


def refuse_other_beginning(
    run: Path, content: Mapping[str, Any], identity: Mapping[str, Any], older: Mapping[str, str]
) -> None:
    """Raise CheckpointError if a run began with other data, another tokenizer or another base than this launch.

    Args:
        run: the run folder.
        content: the content of a checkpoint's state, or of done.json.
        identity: hashes of what this launch trains with.
        older: hashes by which an older version named the same things.
    """
    if "imported" in content:
        raise CheckpointError(
            f"{run} holds an imported model, which has no data and no moments to go on with: name another --run-dir, "
            f"and train it further with `ds-slm train RECIPE --base {run}`, or fine-tune it with `ds-slm sft RECIPE "
            f"--base {run}`."
        )

    began_with, base = content.get(checkpoint_files.BASE), identity.get(checkpoint_files.BASE)
    if began_with and not base:
        raise CheckpointError(
            f"{run} began with a base, of weights {began_with}, and this launch names none: add --base MODEL, the same."
        )
    if base and not began_with:
        raise CheckpointError(
            f"{run} began without a base: leave out --base to go on with it, or name another --run-dir."
        )

    same = {key: (identity[key], older.get(key, identity[key])) for key in identity if key != "recipe_sha256"}
    other = [key for key, hashes in same.items() if content.get(key) not in hashes]
    if other:
        raise CheckpointError(
            [f"{run} was trained with {key} {content.get(key)}, this launch has {identity[key]}." for key in other]
            + ["Restore what it was trained with, or choose another --run-dir."]
        )


def begin(engine: Engine, weights: Iterable[tuple[str, Tensor]] | None) -> None:
    """Give a new run its fp32 weights: the weights passed in, or the recipe's initialisation. Collective.

    Raises:
        DataError: on all ranks, if one of them cannot read the weights.
    """
    recipe, problems = engine.recipe, []
    if weights is None:
        held = partitions.places(engine.deepspeed)
        shapes = {name: shape for name, shape in partitions.shapes(engine.deepspeed).items() if name in held}
        weights = decoder.initial_weights(shapes, recipe.model, recipe.train.seed)
    try:
        masters.fill(engine.deepspeed, weights)
    except UserError as error:
        problems = error.problems
    raise_on_all(engine.control, problems, AgreedDataError)
    partitions.refresh_half_precision(engine.deepspeed)
    masters.check(engine.deepspeed, engine.control)


def load(engine: Engine, found: ResumePoint) -> State:
    """Give every rank its part of a checkpoint. Collective."""
    same_topology = is_same_topology(found.content["topology"], engine.topology)
    notes = _broadcast_notes(engine, found.folder, found.source) if same_topology else {}

    def tensors(kind: str) -> Iterator[tuple[str, Tensor]]:
        assert found.folder is not None
        with checkpoint_files.open_tensors(found.folder / file_of_kind(kind)) as stored:
            for name in partitions.shapes(engine.deepspeed):
                yield name, stored.get_tensor(name)

    partitions.scatter(
        engine.deepspeed,
        tensors if found.folder else None,
        found.source,
        found.content["optimizer_steps"],
        notes,
        engine.control,
    )
    masters.check(engine.deepspeed, engine.control)
    _restore_scaler(engine, found.content["loss_scaler"])
    state = State(**{key: found.content.get(key, default) for key, default in asdict(State()).items()})
    return replace(state, skipped_rows=tuple((first, end) for first, end in state.skipped_rows))


def is_same_topology(stored: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's block scales may belong to this launch's partitions.

    Older checkpoints have no hash of the partitions: then each scale is checked before it is used.
    """
    return {**here, **stored} == here


def _broadcast_notes(engine: Engine, checkpoint: Path | None, source: int) -> dict[str, Tensor]:
    control, own = engine.control, {}
    if checkpoint and (checkpoint / checkpoint_files.ABSMAX).is_file():
        with checkpoint_files.open_tensors(checkpoint / checkpoint_files.ABSMAX) as stored:
            own = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    sizes = control.broadcast({name: note.numel() for name, note in own.items()}, source)
    return {
        name: control.broadcast_tensor(own[name] if name in own else torch.empty(numel), source)
        for name, numel in sizes.items()
    }


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaler_state(engine: Engine) -> dict[str, float] | None:
    """Scale and counters of fp16's loss scaler; None in other precisions."""
    scaler = engine.loss_scaler
    return {name: getattr(scaler, name) for name in SCALER_FIELDS} if scaler else None


def _restore_scaler(engine: Engine, stored: dict[str, float] | None) -> None:
    if engine.loss_scaler and stored:
        for name, value in stored.items():
            setattr(engine.loss_scaler, name, value)
