"""The records of a run, metrics.jsonl and TensorBoard, on every host that keeps its checkpoints.

    record --Records--> metrics.jsonl, tb/      each host's own: measurements of hosts may differ, steps do not
    resume --share--> a host that was away receives the records that it missed

If a host is lost, its run goes on elsewhere: every host from which the run can be resumed has all records.
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
from ds_slm.run.launches import Launch
from ds_slm.run.metrics_file import METRICS


@dataclass(frozen=True)
class _Kept:
    """The lines of metrics.jsonl that stay when a run goes on after a step."""

    lines: list[str]
    names: list[tuple[str, int]]
    """Kind and step of each line."""
    story_sha256: str
    """Hash of what is the same on all hosts: kinds, steps and losses, without times that a host measured."""
    is_all: bool
    """Whether no line is left out."""


class Records:
    """Writes the records of a launch to this host's disk. A full disk costs records, not the run."""

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
            warn: takes a line, once, if the disk is full.
            first_step: the step after which the run goes on.
            launch: nothing is written once another launch holds the folder; None: this is not checked.
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
        """Whether an earlier launch left a record of this kind and step."""
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
        """Whether another launch holds the folder: the answer found by the last record, if nobody asked since.

        So one look per step is enough: the record is written after the step, and the next step uses its answer.
        """
        seen, self._seen_replaced = self._seen_replaced, None
        return self._look() if seen is None else seen

    def _look(self) -> bool:
        return self._launch is not None and launches.is_replaced(self._folder, self._launch)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[bool]:
        """Whether this launch may write; a full disk is reported once."""
        try:
            self._seen_replaced = self._look()
            yield not self._seen_replaced
        except OSError as error:
            if not self._lost_records:
                self._warn(f"RECORDS ARE LOST: {self._folder}: {error}. Training goes on.")
            self._lost_records = True


def share(control: Control, folder: Path, keepers: list[int], step: int, generation: int, source: int) -> list[int]:
    """Send the records up to a step, and all changes, to the keepers whose records differ. Collective.

    Args:
        control: the ranks' connection.
        folder: the run folder, each host's own.
        keepers: the ranks that keep records.
        step: the step after which the run goes on.
        generation: this launch's number; records that are replaced on a host are kept under it.
        source: the rank whose host has the checkpoint: its records belong to these weights. If it has none (in older
            versions only rank 0's host had them), the keeper with the most records takes its place.

    Returns:
        The keepers that received records.
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
    """The step of a record; a line that is cut, damaged or not a record gets a step that is not kept."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return math.inf
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return math.inf
    step = record.get("step")
    return step if isinstance(step, int) else math.inf
