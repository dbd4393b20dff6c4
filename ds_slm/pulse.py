"""Signs of life of a supervised rank, in files: ranks write them, the agent of their host reads them.

    $DS_SLM_PULSES/PID.pulse    touched whenever the rank gets on; holds the newest step it has applied
    $DS_SLM_PULSES/PID.stopped  a signal stopped the rank, and the newest step is saved
    $DS_SLM_PULSES/PID.final    the exit code of a rank that no restart can help

A rank is watched from its first sign on: what comes before, preparing data or compiling, may take any time. Without
$DS_SLM_PULSES nobody watches, and nothing is written.
"""

import contextlib
import os
from pathlib import Path

FOLDER = "DS_SLM_PULSES"
"""The environment variable that names the folder."""


def is_watched() -> bool:
    """Whether this rank's run is supervised: what all hosts print then comes together on one terminal."""
    return bool(os.environ.get(FOLDER))


def beat(applied_step: int | None = None) -> None:
    """This rank gets on; it may have applied a step."""
    _write("pulse", None if applied_step is None else str(applied_step))


def stopped() -> None:
    """This rank ends because a signal stopped all ranks: that is not a failure."""
    _write("stopped")


def final(code: int) -> None:
    """This rank ends with an exit code that a restart would only repeat."""
    _write("final", str(code))


def _write(kind: str, text: str | None = None) -> None:
    if folder := os.environ.get(FOLDER):
        path = Path(folder, f"{os.getpid()}.{kind}")
        with contextlib.suppress(OSError):  # a full disk must not end a run
            path.touch() if text is None else path.write_text(text, encoding="utf-8")


def stamp(folder: Path, pid: int) -> int | None:
    """What changes with every sign of a rank; None before its first one."""
    try:
        return (folder / f"{pid}.pulse").stat().st_mtime_ns
    except OSError:
        return None


def newest_step(folder: Path) -> int:
    """The newest step that any rank has applied; 0 where none has."""
    return max(_numbers(folder, "pulse"), default=0)


def final_code(folder: Path) -> int | None:
    """The exit code of a rank that no restart can help; None where there is none."""
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
    return [int(text) for text in texts if text]  # one that was killed while it wrote leaves an empty file
