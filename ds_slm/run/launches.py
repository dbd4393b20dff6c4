"""Launches that write into one run folder: which of them holds it, and which of them live.

    RUN/env.json                 generation and launch: the one that holds the folder
    RUN/logs/.launch-ID.lock     locked by each of its writers for as long as it lives

A launch has a generation, one more than any before it, and a random id. If launches begin at the same moment, with the
same generation, the one with the greater id holds every host's folder. The others end and write nothing more. No clock
decides anything.

Known gap: if a file system has no locks, launches that begin within the same instant may both end without knowing it;
if hosts share a disk, its locks must reach all of them.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_slm.errors import ReplacedByNewerLaunch
from ds_slm.files import locked_file, read_json
from ds_slm.run import folder as run_folder

if TYPE_CHECKING:
    from ds_slm.distributed.ranks import Control


@dataclass(frozen=True)
class Launch:
    """One launch of a run, the same on all its ranks."""

    generation: int = 0
    id: str = ""
    """Random; empty in folders of older versions."""
    host: str = ""
    pid: int = 0
    """Process id of rank 0, on its host."""
    began: str = ""
    """When it began, for people; nothing depends on it."""

    @property
    def order(self) -> tuple[int, str]:
        """The launch with the greater order holds the folder."""
        return self.generation, self.id

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}, since {self.began}" if self.host else f"launch {self.generation}"

    def facts(self) -> dict[str, Any]:
        """What env.json says of this launch."""
        described = asdict(self)
        return {"generation": described.pop("generation"), "launch": described}


def begin(control: "Control", run: Path) -> Launch:
    """A new launch, newer than any that a host's folder names. Collective."""
    generation = max(control.gather(run_folder.generation(run))) + 1
    began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    launch = Launch(generation, uuid.uuid4().hex, socket.gethostname(), os.getpid(), began)
    return Launch(**control.broadcast(asdict(launch), 0))


def holder(run: Path) -> Launch:
    """The launch that holds a run folder; generation 0 if none does, or if its env.json cannot be read.

    Every step asks this, so env.json is read again only if the file has changed.
    """
    path = run / "env.json"
    try:
        # A shared disk asks its server when a file is opened; its facts on a closed file may be a minute old.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return _holder_in(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    except OSError:
        return Launch()


@lru_cache(maxsize=1)
def _holder_in(path: Path, stamp: tuple[int, ...]) -> Launch:
    """The launch that a file names; `stamp` changes with the file. Raises OSError if it cannot be read now."""
    environment = read_json(path)
    if environment is None:
        raise OSError(f"{path} cannot be read.")
    generation, described = environment.get("generation"), environment.get("launch")
    if not isinstance(generation, int):
        return Launch()
    if not isinstance(described, dict):  # of an older version, or damaged
        return Launch(generation)
    kinds = {one.name: type(one.default) for one in fields(Launch)}
    known = {name: described[name] for name, kind in kinds.items() if isinstance(described.get(name), kind)}
    return Launch(**{**known, "generation": generation})


def is_replaced(run: Path, launch: Launch) -> bool:
    """Whether another launch holds the folder. A folder that cannot be read (its disk is bad) counts as ours."""
    found = holder(run)
    return found.generation > 0 and found.order != launch.order


def refuse_replaced(run: Path, launch: Launch) -> None:
    """Raise ReplacedByNewerLaunch if another launch holds the folder."""
    if is_replaced(run, launch):
        raise ReplacedByNewerLaunch(str(holder(run)))


@contextlib.contextmanager
def claiming(run: Path, launch: Launch) -> Iterator[None]:
    """Within it no other launch writes env.json. Raises ReplacedByNewerLaunch if a newer one already did."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    with locked_file(run / "logs" / ".claim.lock", wait=True):
        found = holder(run)
        if found.order > launch.order:
            raise ReplacedByNewerLaunch(str(found))
        yield


@contextlib.contextmanager
def living(run: Path, launch: Launch) -> Iterator[None]:
    """Within it other launches see that this one lives."""
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    sign, unlocked = folder / f".launch-{launch.id}.lock", folder / f".launch-{launch.id}.new"
    with locked_file(unlocked):  # the file gets its name once it is locked and written
        unlocked.write_text(json.dumps(asdict(launch)), encoding="utf-8")
        unlocked.rename(sign)
        try:
            yield
        finally:
            sign.unlink(missing_ok=True)


def take_over(control: "Control", run: Path, launch: Launch, writers: list[int], held: ExitStack) -> list[str]:
    """Show that this launch lives, for as long as `held` is open. Collective.

    Returns, on rank 0, a line for each living launch that is replaced, for the user to read before anything is written.
    """
    found: list[str] = []
    if control.rank in writers:
        with contextlib.suppress(OSError):  # if the disk refuses this, it refuses env.json too, which is reported
            held.enter_context(living(run, launch))
            found = others_alive(run, launch)
    others = dict.fromkeys(one for theirs in control.gather(found) for one in theirs)
    return [
        f"{run} is being written by another launch ({other}): this one takes it over, that one ends at its next step"
        for other in (others if control.rank == 0 else ())
    ]


def others_alive(run: Path, launch: Launch) -> list[str]:
    """A line for each launch that writes into the folder now. Files of killed launches are removed."""
    found = []
    for sign in sorted((run / "logs").glob(".launch-*.lock")):
        if sign.name == f".launch-{launch.id}.lock":
            continue
        try:
            with locked_file(sign):
                sign.unlink()
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(str(Launch(**json.loads(sign.read_text(encoding="utf-8")))))
        except OSError:  # it has just ended, or is not one of our files
            continue
    return found
