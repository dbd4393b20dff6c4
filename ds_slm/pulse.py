"""Signs of life of a supervised rank, in files: ranks write them, the agent of their host reads them.

    $DS_SLM_PULSES/PID.pulse    touched whenever the rank makes progress; holds the newest step it has applied
    $DS_SLM_PULSES/PID.stopped  a signal stopped the rank, and the newest step is saved
    $DS_SLM_PULSES/PID.final    the exit code of a rank that no restart can help

A rank is watched from its first sign on: preparing data or compiling before that may take any time. Without
$DS_SLM_PULSES ranks are not watched, and nothing is written.
"""

import contextlib
import os
from pathlib import Path

FOLDER = "DS_SLM_PULSES"
"""The environment variable that names the folder."""


def is_watched() -> bool:
    """Whether this rank's run is supervised: then one terminal shows the output of all hosts."""
    return bool(os.environ.get(FOLDER))


def beat(applied_step: int | None = None) -> None:
    """Note that this rank makes progress; it may have applied a step."""
    _write("pulse", None if applied_step is None else str(applied_step))


def stopped() -> None:
    """Note that this rank ends because a signal stopped all ranks, which is not a failure."""
    _write("stopped")


def final(code: int) -> None:
    """Note that this rank ends with an exit code that a restart would only repeat."""
    _write("final", str(code))


def _write(kind: str, text: str | None = None) -> None:
    if folder := os.environ.get(FOLDER):
        path = Path(folder, f"{os.getpid()}.{kind}")
        with contextlib.suppress(OSError):  # a full disk must not end a run
            path.touch() if text is None else path.write_text(text, encoding="utf-8")


def stamp(folder: Path, pid: int) -> int | None:
    """A number that changes with every sign of a rank; None before its first sign."""
    try:
        return (folder / f"{pid}.pulse").stat().st_mtime_ns
    except OSError:
        return None


def newest_step(folder: Path) -> int:
    """The newest step that any rank has applied; 0 if none has."""
    return max(_numbers(folder, "pulse"), default=0)


def final_code(folder: Path) -> int | None:
    """The exit code of a rank that no restart can help; None if there is none."""
    return max(_numbers(folder, "final"), default=None)


def was_stopped(folder: Path) -> bool:
    """Whether ranks ended because of a signal."""
    return any(folder.glob("*.stopped"))


def forget(folder: Path) -> None:
    """Remove all signs, before other ranks are started."""
    for path in folder.glob("*.*"):
        path.unlink(missing_ok=True)


def _numbers(folder: Path, kind: str) -> list[int]:
    texts = [path.read_text(encoding="utf-8") for path in folder.glob(f"*.{kind}")]
    return [int(text) for text in texts if text]  # a rank that is killed while it writes leaves an empty file
