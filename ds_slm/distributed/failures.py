"""Failures of ranks: who failed first, and what each rank prints, so that every error is printed once.

the first that fails   waits a moment for the others' mistakes and prints all of them; it prints a crash at once
another that fails     prints what the first did not
a rank that did not    ends, and says so if no rank of its host failed
"""

import json
import socket
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ds_slm.distributed.problems import merged
from ds_slm.distributed.store import Intervals, Store, wait_until
from ds_slm.errors import EXIT_FAILURE, EXIT_USER_ERROR, MeetingError, UserError, describe

POLL_S = 0.05


@dataclass(frozen=True)
class Failure:
    """Why a rank cannot go on."""

    rank: int
    host: str
    code: int
    text: str
    """What its user reads."""
    problems: tuple[str, ...] = ()
    """If it is a user's mistake: a sentence for each problem."""
    is_final: bool = False
    """Whether another launch would only repeat it."""

    @property
    def place(self) -> str:
        """The rank and its host, for people."""
        return f"rank {self.rank} on {self.host}"


def failure_of(error: BaseException, rank: int) -> Failure:
    """A rank's description of an error: sentences for a user's mistake, a traceback for a fault of this program."""
    problems = tuple(error.told) if isinstance(error, UserError) else ()
    text, code = describe(error) or ("".join(traceback.format_exception(error)).rstrip(), EXIT_FAILURE)
    if isinstance(error, SystemExit) and error.code == EXIT_USER_ERROR:
        code = EXIT_USER_ERROR
    is_final = code == EXIT_USER_ERROR and not isinstance(error, MeetingError)
    return Failure(rank, socket.gethostname(), code, text, problems, is_final)


class FailureBoard:
    """The place in the launch's store where ranks post their failures."""

    def __init__(self, store: Store, size: int, intervals: Intervals) -> None:
        self._store, self._size, self._intervals = store, size, intervals
        self._told: list[Failure] = []
        """The failures that the first rank prints, as far as is known here."""

    @property
    def is_empty(self) -> bool:
        """Whether no rank has failed."""
        return self._store.count("failed") == 0

    def post(self, own: Failure, was_told: bool) -> str | None:
        """Post a rank's failure; returns what this rank must print, if anything, before it calls `mark_told`."""
        self._store.set(f"failed/{own.rank}", json.dumps(asdict(own)))
        if self._store.count("failed", 1) > 1:
            self.await_told()
            self.read()
            return None if was_told else self.left_to_tell(own)
        if not own.problems or was_told:
            self._told = [own]
            return None if was_told else own.text
        wait_until(self._nobody_is_underway, self._intervals.together_s, POLL_S)
        self._told = [one for one in self.failures() if one.problems]
        return all_problems(self._told)

    def mark_told(self) -> None:
        """Let the other ranks end: the first failure is printed."""
        if not self._store.has("told"):
            self._store.set("told", json.dumps([one.rank for one in self._told]))

    def await_told(self, or_else: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the first failure is printed, or something else happens, for a limited time; whether it is."""
        limit_s = self._intervals.together_s + self._intervals.come_out_s
        wait_until(lambda: self._store.has("told") or or_else(), limit_s, POLL_S)
        return self._store.has("told")

    def read(self) -> list[Failure]:
        """All posted failures, and which of them are printed. After that, `left_to_tell` needs no store."""
        told = json.loads(self._store.get("told")) if self._store.has("told") else []
        failures = self.failures()
        self._told = [one for one in failures if one.rank in told]
        return failures

    def failures(self) -> list[Failure]:
        """All posted failures, in the order of ranks."""
        posted = [rank for rank in range(self._size) if self._store.has(f"failed/{rank}")]
        found = [json.loads(self._store.get(f"failed/{rank}")) for rank in posted]
        return [Failure(**{**one, "problems": tuple(one["problems"])}) for one in found]

    def left_to_tell(self, own: Failure) -> str | None:
        """The part of this rank's failure that the first rank did not print, as `read` found it."""
        if own.rank in [one.rank for one in self._told] or own.text in [one.text for one in self._told]:
            return None
        if self._told and not own.problems:  # most often the rank waited for something that will never come
            return f"{own.place} ends, too ({self._told[0].place} had failed): {own.text.splitlines()[-1]}"
        return own.text

    def code_of(self, own: Failure) -> int:
        """The exit code of a rank that failed: 2 where a user's mistake tore it away, though its own would be 1."""
        return max(one.code for one in (own, *self._told))

    def _nobody_is_underway(self) -> bool:
        """Whether all ranks have failed, or are ready and can no longer fail."""
        return self._store.count("failed") + self._store.count("arrived") >= self._size


def all_problems(failures: list[Failure]) -> str:
    """Every problem once; with its host if not all failed hosts have it."""
    return "error: " + "\n  ".join(merged([one.host for one in failures], [one.problems for one in failures]))
