"""The typed errors that a user can meet, and the one rule that turns them into exit codes.

Every error lists all the problems found, each as: what was got, what was expected, the way out.

Exit codes: 0 done; 2 the user's mistake, explained in one paragraph; 75 stopped by a signal with a whole checkpoint
saved; 130 interrupted before training began; 1 anything else.
"""

import errno
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
MOST_TOLD = 20
INTERRUPTED = "interrupted: the same command goes on from what was saved last, if anything was."
FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can mend. Holds every problem found, so that one round of mending is enough."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))

    @property
    def told(self) -> list[str]:
        """The problems that are printed: all, or the first of very many, such as one for each file."""
        more = len(self.problems) - MOST_TOLD
        return [*self.problems[:MOST_TOLD], f"and {more:,} more"] if more > 0 else self.problems


class RecipeError(UserError):
    """A recipe or an override that cannot be trained."""


class DataError(UserError):
    """A tokenizer, source or shard that is missing, damaged or does not fit the recipe."""


class ConfigError(UserError):
    """A DeepSpeed configuration, or a batch, that does not fit the recipe or the world size."""


class HostfileError(UserError):
    """A hostfile that is missing, malformed, or would launch on other machines than it names."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is damaged, belongs to another recipe, or is in the way."""


class DeviceError(UserError):
    """A device that lacks what the recipe asks for."""


class MeetingError(DeviceError):
    """Ranks that cannot reach each other. Another try, with other ports or other hosts, may succeed."""


class TrainingError(Exception):
    """Training cannot go on: a non-finite loss or gradient. Not the user's mistake; exit code 1, no traceback."""


class ReplacedByNewerLaunch(TrainingError):
    """A newer launch holds the run folder: it has one writer at a time, so the older launch ends."""

    def __init__(self, newer: str = "") -> None:
        """`newer` describes the launch that holds the folder now: its host, process and beginning."""
        which = f" ({newer})" if newer else ""
        super().__init__(f"a newer launch writes into this run folder{which}: this one ends, and leaves it alone.")


class Stopped(Exception):
    """A signal asked for the end. Not an error: exit code 75, once a whole checkpoint is saved."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class AgreedDataError(DataError):
    """Problems of any rank with data, gathered and raised on all ranks."""


RAISED_ON_ALL_RANKS = (Stopped, TrainingError, AgreedDataError)
"""Once the ranks have met, all of them raise these at the same place, so none is left inside a collective."""


def error_line(output: str) -> str | None:
    """The line of a failed program's output that says most: a compiler's error, else Python's, else the last one.

    None where there is no line. Long lines lose their beginning.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    by_tool, by_python = ([line for line in lines if re.search(p, line)] for p in (r"\berror: |cannot find", "Error: "))
    return next((line[-200:] for line in [*by_tool, *by_python, *lines[-1:]]), None)


def describe(error: BaseException) -> tuple[str, int] | None:
    """The text to print for an error instead of a traceback, and the exit code; None if a traceback is needed."""
    if isinstance(error, UserError):
        return "error: " + "\n  ".join(error.told), EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, EXIT_INTERRUPTED
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return f"error: {error.filename or 'a disk'}: {error.strerror}.", EXIT_USER_ERROR
    if isinstance(error, Stopped):
        return f"stopped by a signal: {error}", EXIT_STOPPED
    if isinstance(error, TrainingError):
        return f"stopped: {error}", EXIT_FAILURE
    return None


def attempt(problems: list[str], action: Callable[[], Result], place: str = "a file") -> Result | None:
    """The action's result; or None, with its problems added. `place` stands in if the error names no file."""
    try:
        return action()
    except (UserError, OSError) as error:
        problems += problems_of(error, place)
    return None


def problems_of(error: UserError | OSError, place: str) -> list[str]:
    """The problems that an error holds; `place` stands in if it names no file."""
    if isinstance(error, UserError):
        return error.problems
    return [f"{error.filename or place}: {error.strerror or error}."]


def print_any_name() -> None:
    """Let this process print names of files with characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's `main` and return its exit code; a user's mistake is printed on stderr without a traceback.

    A training program's ranks run under `ds_slm.distributed.rendezvous.run_rank` instead.
    """
    print_any_name()
    try:
        return main() or EXIT_OK
    except (Exception, KeyboardInterrupt) as error:
        described = describe(error)
        if described is None:
            raise
        message, code = described
    print(message, file=sys.stderr, flush=True)
    return code
