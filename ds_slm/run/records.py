"""The records of a run, metrics.jsonl and TensorBoard, on every host that keeps its checkpoints.

    record --Records--> metrics.jsonl, tb/      each host's own: what it measures of itself may differ, steps do not
    resume --share--> a host that was away is given the records that it missed

A host may be lost, and its run goes on elsewhere: every host from which the run can be resumed tells all of it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_slm.distributed.ranks import Control
from ds_slm.files import replace_text, sha256_of_json
from ds_slm.run import folder as run_folder
from ds_slm.run import launches
from ds_slm.run.board import Board
from ds_slm.run.folder import METRICS
from ds_slm.run.launches import Launch


@dataclass(frozen=True)
class _Kept:
    """The lines of metrics.jsonl that stay when a run goes on behind a step."""

    lines: list[str]
    names: list[tuple[str, int]]
    """Kind and step of each."""
    story_sha256: str
    """Hash of what is the same on all hosts: kinds, steps and losses, but no time that a host measured."""
    is_all: bool
    """Whether no line is left out."""


class Records:
    """Takes the records of a launch to this host's disk. A full disk costs records, not the run."""

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None],
        first_step: int = 0,
        launch: Launch | None = None,
        is_given: bool = False,
    ) -> None:
        """Drop the records of steps that a resumed run takes again.

        Args:
            folder: the run folder.
            warn: takes a line, once, where the disk is full.
            first_step: the step behind which the run goes on.
            launch: nothing is written once another one holds the folder; None looks for none.
            is_given: the records came from another host: TensorBoard does not have them yet.

        Raises:
            ReplacedByNewerLaunch: another launch holds the folder.
        """
        if launch:
            launches.refuse_replaced(folder, launch)
        self._folder, self._warn, self._launch = folder, warn, launch
        self._lost_records = False
        self._seen_replaced: bool | None = None

        kept = _kept(folder, first_step)
        if not kept.is_all:
            replace_text(folder / METRICS, "".join(kept.lines))
        self._earlier = set(kept.names)
        self._metrics = (folder / METRICS).open("a", buffering=1)

        self._board = Board(folder / "tb", -1 if is_given else first_step)
        if is_given:
            for record in map(json.loads, kept.lines):
                self._board.record(record.pop("kind"), record.pop("step"), record)

    def were_made(self, kind: str, step: int) -> bool:
        """Whether an earlier launch left such a record of this step."""
        return (kind, step) in self._earlier

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record of a step."""
        with self._disk() as may_write:
            if may_write:
                self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
                self._board.record(kind, step, values)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in TensorBoard, in Markdown."""
        with self._disk() as may_write:
            if may_write:
                self._board.text(tag, text, step)

    def compare_by(self, recipe: Mapping[str, Any]) -> None:
        """Put the run into TensorBoard's table of runs; `recipe`: section -> key -> value."""
        with self._disk() as may_write:
            if may_write:
                self._board.compare_by(recipe)

    def close(self) -> None:
        """Flush and close everything."""
        for file in (self._metrics, self._board):
            with self._disk():
                file.close()

    def is_replaced(self) -> bool:
        """Whether another launch holds the folder: as the last record found it, where none asked since.

        So one look serves a step: its record is written behind it, and the next step begins with what it found.
        """
        seen, self._seen_replaced = self._seen_replaced, None
        return self._look() if seen is None else seen

    def _look(self) -> bool:
        return self._launch is not None and launches.is_replaced(self._folder, self._launch)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[bool]:
        """Whether this launch may write; a disk that is full is told once."""
        try:
            self._seen_replaced = self._look()
            yield not self._seen_replaced
        except OSError as error:
            if not self._lost_records:
                self._warn(f"RECORDS ARE LOST: {self._folder}: {error}. Training goes on.")
            self._lost_records = True


def share(control: Control, folder: Path, keepers: list[int], step: int, generation: int, source: int) -> list[int]:
    """Give the records up to a step, and all changes, to the keepers that have others. Collective.

    Args:
        control: the ranks' connection.
        folder: the run folder, each host's own.
        keepers: the ranks that keep records.
        step: behind which the run goes on.
        generation: of this launch; what is replaced on a host stays beside, under its number.
        source: the rank whose host has the checkpoint: its records are of these weights. Where it has none, as older
            versions left a host that was not rank 0's, the keeper with the most records stands in.

    Returns:
        The keepers that were given records.
    """
    reads = control.rank == source or control.rank in keepers
    kept = _kept(folder, step) if reads else _Kept([], [], "", True)
    everyone = control.gather([len(kept.lines), kept.story_sha256])
    if not everyone[source][0]:
        source = max(keepers, key=lambda rank: (everyone[rank][0], -rank))

    changes = control.gather(run_folder.read_changes(folder) if reads else [])
    if control.rank in keepers:
        run_folder.merge_changes(folder, [changes[source], *changes])

    given = [rank for rank in keepers if everyone[rank][1] != everyone[source][1]]
    if not given:
        return []

    own = "".join(kept.lines).encode()
    size = control.broadcast(len(own), source)
    is_source = control.rank == source and own
    text = torch.frombuffer(bytearray(own), dtype=torch.uint8) if is_source else torch.empty(size, dtype=torch.uint8)
    text = control.broadcast_tensor(text, source)

    if control.rank in given:
        run_folder.keep_records(folder, generation)
        replace_text(folder / METRICS, text.numpy().tobytes().decode())
    return given


def _kept(folder: Path, step: int) -> _Kept:
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    kept = [line for line in lines if _step_of(line) <= step]
    records = [json.loads(line) for line in kept]
    story = sha256_of_json([[one["kind"], one["step"], repr(one.get("loss"))] for one in records])
    return _Kept(kept, [(one["kind"], one["step"]) for one in records], story, len(kept) == len(lines))


def _step_of(line: str) -> float:
    """The step of a record; a line that was cut, damaged or is no record belongs to none that is kept."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return math.inf
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return math.inf
    step = record.get("step")
    return step if isinstance(step, int) else math.inf
