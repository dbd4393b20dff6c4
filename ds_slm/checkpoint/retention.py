"""Which checkpoints are kept: the newest whole ones, the best one, and what `latest` names.

    damaged      -> checkpoints/damaged/: out of the way, for a user to look at; `ds-slm verify` still lists them
    superfluous  -> deleted; if it is a link, only the link
    temporary folders that killed writers of this host left -> deleted, once their process is gone

Nothing outside the folder is ever deleted. Inside it, what does not look like a checkpoint is set aside, not deleted.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from ds_slm.checkpoint.files import MANIFEST, checkpoints_folder, folder_of_step, named_by, remove, steps, verify
from ds_slm.files import lives, writer_name

DAMAGED = "damaged"

Stamps = dict[str, tuple[int, int, int]]
"""Name of a checkpoint's file -> its size, and when its content and its inode changed, in ns."""


def retain(
    run: Path, keep_last: int, keep_best: bool, whole: dict[int, Stamps] | None = None, best_step: int | None = None
) -> list[str]:
    """Delete all but the newest whole checkpoints and the best; set aside what has their name and is not whole.

    Args:
        run: the run folder.
        keep_last: number of whole checkpoints to keep.
        keep_best: whether to keep what `best` names, and `best_step`.
        whole: steps known to be whole, with the stamps of their files at that time (`stamps`). A checkpoint that is
            found whole is added, so that each is read once. If its files have changed since, it is read again.
        best_step: the run's best step, which `best` may not name yet on this disk.

    Returns:
        A line for each thing that was set aside or could not be put in order.
    """
    known = {} if whole is None else whole
    kept = {named_by(run, "latest"), *((named_by(run, "best"), best_step) if keep_best else ())}
    said: list[str] = []
    newest = 0

    # Checkpoints older than the ones to keep are deleted unread.
    for step in reversed(steps(run)):
        checkpoint = folder_of_step(run, step)
        if newest < keep_last and _is_whole(checkpoint, step, known):
            newest += 1
        elif newest >= keep_last and (step in known or _looks_like_one(checkpoint)):
            if step not in kept:
                _attempt(said, checkpoint, _delete)
        else:
            _attempt(said, checkpoint, lambda path: said.append(f"{path} is damaged: moved to {set_aside(path)}"))

    _delete_leftovers(run)
    return said


def stamps(checkpoint: Path) -> Stamps:
    """The state of a checkpoint's files now: equal stamps mean that none was changed, cut, removed or put back."""
    with contextlib.suppress(OSError):
        found = {path.name: path.lstat() for path in checkpoint.iterdir()}
        return {name: (one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in found.items()}
    return {}


def _is_whole(checkpoint: Path, step: int, known: dict[int, Stamps]) -> bool:
    """Whether a checkpoint is whole; if nothing changed since it was, only its files' names and sizes are checked."""
    now = stamps(checkpoint)
    whole = not verify(checkpoint, read=not now or known.pop(step, None) != now)
    if whole:
        known[step] = now
    return whole


def set_aside(checkpoint: Path) -> Path:
    """Move a damaged checkpoint, or whatever has the name of one, into `checkpoints/damaged/`. Returns its new path."""
    folder = checkpoint.parent / DAMAGED
    folder.mkdir(exist_ok=True)
    place, number = folder / checkpoint.name, 1
    while os.path.lexists(place):
        number += 1
        place = folder / f"{checkpoint.name}.{number}"
    os.rename(checkpoint, place)
    return place


def set_aside_ones(run: Path) -> list[Path]:
    """What was set aside."""
    return sorted((checkpoints_folder(run) / DAMAGED).glob("step-*"))


def _looks_like_one(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _attempt(said: list[str], path: Path, action: Callable[[Path], None]) -> None:
    """Run the action; if it fails, note that, so that one checkpoint does not keep others from being put in order."""
    try:
        action(path)
    except OSError as error:
        said.append(f"{path} could not be put in order: {error.strerror or error}")


def _delete(checkpoint: Path) -> None:
    """Rename, then delete: a kill half-way through deleting must not leave what looks like a damaged checkpoint."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.tmp-{writer_name()}-deleted")
    remove(leaving)
    os.rename(checkpoint, leaving)
    remove(leaving)
    if os.path.lexists(leaving):
        raise OSError(errno.ENOTEMPTY, f"{leaving} could not be removed")


def _delete_leftovers(run: Path) -> None:
    """Delete what killed writers of this host left; what a living process writes stays."""
    ours = re.compile(rf"\.step-[0-9]+\.tmp-{re.escape(socket.gethostname())}-([0-9]+)(-[a-z]+)?")
    for leftover in checkpoints_folder(run).glob(".step-*.tmp-*"):
        match = ours.fullmatch(leftover.name)
        if match and (int(match[1]) == os.getpid() or not lives(int(match[1]))):
            remove(leftover)
