"""Files that appear whole or not at all: durable writes, atomic replacement, locks. Every package may import this one.

content --> .NAME.tmp-HOST-PID --> fsync --> rename over NAME --> fsync of the folder

File systems differ. If one lacks a feature (fsync of a folder, locks), this is reported once, and the feature is left
out if that is safe. Links are followed where a user may have put one, but never for this program's own files: temporary
files and locks are opened with O_NOFOLLOW, and a temporary is always a new file.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds_slm.errors import UserError

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""Errors of file systems without fsync for folders: some network and FUSE ones."""
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without flock."""
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a file system or folder in which this user may not write."""


on_write_point: list[Callable[[str, Path], None]] = []
"""Tests add a function of (point, path) here; an error that it raises simulates a fault of the path's disk."""


def write_point(point: str, path: Path) -> None:
    """Mark a point in writing, at which tests can let a disk fail, or end the process: DS_SLM_DIE_AT=POINT.

    syncing              before a file's or folder's content is waited for
    replacing, replaced  before and after a small file gets its name
    finishing            before the shards of a source get their names
    POINT@STEP           in a save (`ds_slm.checkpoint.files.WRITE_POINTS`)
    """
    if os.environ.get("DS_SLM_DIE_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
    for fault in on_write_point:
        fault(point, path)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one atomic step."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace a small file in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp-{writer_name()}")
    try:
        temporary.unlink(missing_ok=True)  # of a killed writer that had the same number, or a link laid there
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(content)
        fsync(temporary)
        write_point("replacing", path)
        os.replace(temporary, path)
    except OSError:  # a disk that is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)
    write_point("replaced", path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one atomic step."""
    replace_text(path, json.dumps(content, indent=1, sort_keys=True))  # no line end: cut by one byte it is not JSON


def sha256_of_json(content: Any) -> str:
    """Hash of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None if the file is missing, cannot be read, or does not hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not UTF-8 is a ValueError as well
        return None
    return content if isinstance(content, dict) else None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one per line; damaged lines, and a file that cannot be read, are passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def fsync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk.

    One warning says if a folder's file system cannot do this: after a power failure its names may be older ones.
    """
    write_point("syncing", path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC or not path.is_dir():
            raise
        _tell_once(
            f"warning: {path}: its file system cannot sync folders ({error.strerror}): after a power failure the last "
            "save may be missing; earlier ones are whole."
        )


def new_folder(path: Path) -> None:
    """Make an empty folder for temporary files; removes what has its name, such as a link or a killed writer's rest."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.mkdir()


@dataclass(frozen=True)
class NeededFolder:
    """A folder that every host of a launch needs, at the same path."""

    name: str
    """Its name for users, different for each folder of a launch."""
    path: Path
    files: tuple[str, ...] | None
    """Its files, relative to it, if it is whole on this host; the last one marks it as whole. None if it is not."""
    is_absent: bool
    """Whether this host lacks it and has nothing in its place: only then may it be received."""
    lock: Path
    """The folder whose lock keeps other processes from writing there."""


def is_plain_name(name: object) -> bool:
    """Whether a file's name, read from some manifest, names a file beside that manifest and nothing else."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def obstacle(folder: Path) -> str | None:
    """Why a folder can neither be used nor made, with the way out; None if nothing is in its way."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            return None
        if place.is_symlink():
            return f"{folder}: {place} is a link to nothing: mend or remove it."
        if place.exists() and not place.is_dir():  # another rank may have made it just now
            return f"{folder}: {place} is a file, expected a folder: name another place."
    return None


def refuse_unwritable(folder: Path) -> None:
    """Raise OSError, with the place and the reason, if a folder cannot be made, or no file can be made in it.

    Leaves no file behind. Permission bits are not enough: they do not bind root, and a mount may be read-only.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


class Waiting(str):
    """A line that says that another process holds a lock: on a host with several ranks usually the first rank."""


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process of this host in at a time; the lock ends with the process that holds it.

    If the folder's file system has no locks, a file in this machine's own temporary folder stands in for it.

    Args:
        folder: the folder to lock; made if it is missing.
        say: takes a `Waiting` line if another process holds the lock, and a warning if there are no locks.

    Raises:
        UserError: something other than a file of this program has the lock's name.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open_lock(folder / ".lock")
    try:
        try:
            _wait_for_lock(descriptor, folder, say)
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            say(
                f"warning: {folder}: its file system has no locks ({error.strerror}): processes of this host wait for "
                "each other; do not prepare there from two hosts at once."
            )

            # A file of this machine's own, named after the folder.
            os.close(descriptor)
            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
            descriptor = _open_lock(Path(tempfile.gettempdir()) / f"ds_slm-{os.getuid()}-{name}.lock")
            _wait_for_lock(descriptor, folder, say)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path} is a link or a folder, expected a file that this program makes: remove it.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is a pipe or a device, expected a file that this program makes: remove it.")
    return descriptor


def _wait_for_lock(descriptor: int, folder: Path, say: Callable[[str], None]) -> None:
    try:
        take_lock(descriptor)
    except BlockingIOError:
        say(Waiting(f"{folder}: another process, such as another rank of this launch, prepares or checks it: waiting"))
        take_lock(descriptor, wait=True)


@contextlib.contextmanager
def locked_file(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file's lock; the file is made if it is missing. On a file system without locks nothing is held.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the path is a link, or cannot be written to.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            take_lock(descriptor, wait)
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
        yield
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, wait: bool = False) -> None:
    """Lock an open file, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: with one of `CANNOT_LOCK`, if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except PermissionError as error:  # some network file systems answer so, rather than that it would block
        raise BlockingIOError(*error.args) from error


@cache
def _tell_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def writer_name() -> str:
    """A name that distinguishes writers of several hosts that share a disk."""
    return f"{socket.gethostname()}-{os.getpid()}"


def remove_where_dead(temporary: Path) -> None:
    """Remove a temporary folder named after a writer of this host, `NAME-HOST-PID`, unless that process lives."""
    pid = temporary.name.rpartition("-")[2]
    if pid.isdecimal() and (int(pid) == os.getpid() or not lives(int(pid))):
        shutil.rmtree(temporary, ignore_errors=True)


def lives(pid: int) -> bool:
    """Whether a process of this host is alive."""
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


NAMES_TOLD = 5
"""The most files that a message names one by one."""


def printable(name: str) -> str:
    """A file's name for a terminal: bytes that are not UTF-8, or would control a terminal, are spelled out."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shortened(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    told = ", ".join(printable(name) for name in names[:NAMES_TOLD])
    return f"{told} and {len(names) - NAMES_TOLD:,} more" if len(names) > NAMES_TOLD else told
