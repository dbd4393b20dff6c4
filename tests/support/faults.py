"""Faults of a disk, put where `ds_slm.files.write_point` stands."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ds_slm.files import on_write_point

FULL = OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def fail_at(point: str, name: str = "*", error: BaseException = FULL, after: int = 0) -> Iterator[None]:
    """Within it a disk fails, or the process is interrupted, at a write point.

    Args:
        point: the write point's name.
        name: the pattern of the file's or folder's name.
        error: what is raised there.
        after: how often the point is passed before.
    """
    passed = 0

    def fault(at: str, path: Path) -> None:
        nonlocal passed
        if at == point and fnmatch(path.name, name):
            passed += 1
            if passed > after:
                raise error

    on_write_point.append(fault)
    try:
        yield
    finally:
        on_write_point.remove(fault)
