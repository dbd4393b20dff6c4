"""The place of an export, or of an imported run: checked before weights are read; the folder appears whole, or not.

free_place --> .export.tmp-*/ is filled --> every file fsynced --> renamed to OUT
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ds_slm.errors import CheckpointError
from ds_slm.files import fsync, new_folder, obstacle, refuse_unwritable, remove_where_dead, writer_name

TEMPORARY = ".export.tmp"


def free_place(out: Path, run: Path | None = None, flag: str = "--out") -> Path:
    """The folder that `out` names, following links; does not make it.

    Args:
        out: the folder that the user named: a new one, or an empty one.
        run: the run folder that is exported; nothing may be put into it.
        flag: the flag that named it.

    Raises:
        CheckpointError: a finished folder cannot take that place in one step.
        OSError: the place cannot be written to.
    """
    if in_the_way := obstacle(out):
        raise CheckpointError(f"{flag} {in_the_way}")

    # Existing files must not be lost.
    place = out.resolve()
    if run is not None and place.is_relative_to(run.resolve()):
        raise CheckpointError(
            f"{flag} {out} lies in the run folder {run}, which is the trainer's: name another folder."
        )
    if place.is_dir():
        if any(place.iterdir()):
            raise CheckpointError(f"{flag} {out} is not an empty folder: name another one, or delete it.")
        if _is_mount_point(place):
            raise CheckpointError(f"{flag} {out} is a mount point, which cannot be replaced: name a folder in it.")
        if Path.cwd().is_relative_to(place):
            raise CheckpointError(f"{flag} {out} is the folder this command runs in: name a new folder in it.")

    refuse_unwritable(place.parent)
    return place


@contextlib.contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """Within it a folder is filled under a temporary name; then it becomes `out`. So a kill leaves `out` untouched.

    The next call for a folder beside it removes what a kill left.

    Args:
        out: a `free_place`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{TEMPORARY}-{socket.gethostname()}-*"):  # left by a process that was killed
        remove_where_dead(left)
    folder = out.with_name(f"{TEMPORARY}-{writer_name()}")
    new_folder(folder)
    try:
        yield folder

        # Everything is on the disk before the folder gets its name.
        for path in (*folder.rglob("*"), folder):
            fsync(path)
        os.rename(folder, out)
        fsync(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_mount_point(place: Path) -> bool:
    """Whether this is a mount point, even of a folder of the same file system, which os.path.ismount does not see."""
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if mounts.exists() else []
    spelled = str(place).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    return os.path.ismount(place) or any(line.split(" ")[4] == spelled for line in lines)
