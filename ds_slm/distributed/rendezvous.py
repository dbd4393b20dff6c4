"""How the ranks of a launch meet, and how one that fails ends the others, over a store that rank 0 serves.

    open      a thread connects to the store: the first thing a launch does, while data are prepared
    arrive    this rank is ready; returns once all ranks are, with each rank's message
    fail      this rank cannot go on: it tells the others, the error is printed once, the process ends at once

The thread increments this rank's heartbeat and looks for failures until the launch ends. Before the ranks have met,
rank 0 ends the launch if a heartbeat stands still or a rank never came. Only counters are compared, never clocks.

A rank that fails neither destroys the process group nor waits for a save: the others may be inside a collective that
would never end. It ends, and then their launcher, or this thread, ends the others.

Known gaps: if a rank is killed after the ranks have met, only the others' collectives notice; a thread that holds
Python's lock for longer than `silent_s` counts as a dead rank.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ds_slm import pulse
from ds_slm.distributed import network
from ds_slm.distributed import world as worlds
from ds_slm.distributed.failures import POLL_S, Failure, FailureBoard, failure_of
from ds_slm.distributed.store import Intervals, Store, await_server, first_line, wait_until
from ds_slm.distributed.world import World
from ds_slm.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    RAISED_ON_ALL_RANKS,
    MeetingError,
    UserError,
    describe,
    print_any_name,
)

INTERVALS = Intervals()
NAMED = 8
"""The most missing ranks that are named one by one."""


class Rendezvous:
    """This process's end of the store."""

    def __init__(
        self, world: World, intervals: Intervals, terminal: int = 2, end: Callable[[int], Any] = os._exit
    ) -> None:
        """Does not connect yet.

        Args:
            world: this process among all.
            intervals: how long to wait.
            terminal: file descriptor that users read, whatever happens to stderr.
            end: ends the process with an exit code.
        """
        self.world, self._intervals, self._terminal, self._end = world, intervals, terminal, end
        self._host = socket.gethostname()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._message: str | None = None
        self._messages: list[Any] = []
        self._failure: Failure | None = None
        self._was_told = self._follows = False
        self._wake, self._met, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._opened = threading.Event()
        self._contact_s = time.monotonic()

    def open(self) -> None:
        """Begin to connect. Later calls have no effect; a launch of one rank need not connect."""
        if self.world.size > 1 and self._thread is None:
            import torch.distributed  # if the import fails, the main thread reports it

            network.reserve_variables()
            network.choose_accelerator(torch.version)
            self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
            self._thread.start()

    def connected(self) -> Store:
        """The store, once this process is connected to it; only if there are several ranks.

        Raises:
            KeyboardInterrupt: SIGINT came, or SIGTERM.
        """
        self.open()
        with _interrupted_by_sigterm():
            while not self._opened.wait(self._intervals.beat_s):
                pass
        assert self._store is not None
        return self._store

    def arrive(self, message: Any) -> list[Any]:
        """Wait until all ranks are ready; returns every rank's JSON message, in the order of ranks.

        The process ends if another rank fails meanwhile.

        Raises:
            MeetingError: rank 0's host no longer answers.
            KeyboardInterrupt: SIGINT came, or SIGTERM.
        """
        if self.world.size == 1:
            return [message]
        self.open()
        self._message = json.dumps(message)
        self._wake.set()
        with _interrupted_by_sigterm():
            while not self._met.wait(self._intervals.beat_s):
                if self._store and time.monotonic() - self._contact_s > self._intervals.silent_s:
                    raise MeetingError(f"rank 0's host, {self.world.master}, no longer answers: look into its output.")
        return self._messages

    def close(self) -> None:
        """Stop looking for failures: the launch ends on all ranks together."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=self._intervals.come_out_s)

    def fail(self, error: BaseException) -> None:
        """Report the error once to the other ranks and the user; then end this process with its exit code."""
        failure, was_open = failure_of(error, self.world.rank), self._thread is not None
        if failure.is_final:
            pulse.final(failure.code)
        patience_s, is_interrupted = self._patience_s(failure.code), failure.code == EXIT_INTERRUPTED

        # The thread already ends this process, because another rank failed.
        if self._thread is not None and is_interrupted and self._follows:  # the launcher ends the remaining ranks
            self._thread.join(patience_s)
            self._leave(failure.code)

        # Before the thread runs, and after an interruption, the error is printed without the store.
        if not was_open or is_interrupted:
            wait_s = self._intervals.interrupted_s if is_interrupted else self._intervals.together_s
            self._tell_in_turn(failure.text, 0 if self.world.size == 1 else wait_s)

        # The other ranks must know of it, unless the launcher on this host ends them.
        on_its_own = self.world.size == 1 or (self.world.on_one_host and not was_open)
        if not on_its_own:
            self._failure = failure
            with contextlib.suppress(ImportError):  # without torch on this host the others cannot be reached
                self.open()
            self._wake.set()

        if self._thread is not None:  # it ends the process, unless the store does not answer
            self._thread.join(min(self._intervals.first_word_s, patience_s))
            self._tell_once(failure.text)
            self._thread.join(patience_s)
        self._tell_once(failure.text)
        self._leave(failure.code)

    # ---- the thread

    def _run(self) -> None:
        import torch.distributed as dist

        try:
            if await_server(self.world, self._intervals, self._is_needless, self._tell_for_host):
                self._store = Store(self.world, self._intervals)
                self._opened.set()
                self._watch(self._store, FailureBoard(self._store, self.world.size, self._intervals))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            self._lost(error)
        except Exception as error:  # no error may be lost in a thread
            failure = self._failure or failure_of(error, self.world.rank)
            self._tell_once(failure.text)
            self._leave(failure.code)

    def _is_needless(self, waited_s: float) -> bool:
        """Whether to stop looking for rank 0: this launch is over, or a failure was offered for long enough."""
        failure = self._failure
        return self._closed.is_set() or (failure is not None and waited_s > self._patience_s(failure.code))

    def _patience_s(self, code: int) -> float:
        """How long a failure is offered to ranks that are still starting."""
        return self._intervals.interrupted_s if code == EXIT_INTERRUPTED else self._intervals.linger_s

    def _watch(self, store: Store, board: FailureBoard) -> None:
        """Until the launch ends: increment the heartbeat, look for failures, and at first for the other ranks."""
        world, limit = self.world, self._intervals
        store.set(f"host/{world.rank}", self._host)
        opened_s = time.monotonic()
        beats: dict[int, tuple[int, float]] = dict.fromkeys(range(1, world.size), (0, opened_s))
        next_word_s = limit.first_word_s

        while not self._closed.is_set():
            store.count(f"beat/{world.rank}", 1)
            self._contact_s = time.monotonic()

            # A failure ends the watch: this rank's own, or another's.
            if self._failure is not None:
                return self._report(self._failure, store, board)
            if not board.is_empty:
                return self._follow(store, board)

            # Once this rank is ready, check whether all others have come.
            waits = self._message is not None and not self._met.is_set()
            if waits and self._all_are_there(store):
                continue
            if waits and self._contact_s - opened_s >= next_word_s:
                self._say_who_is_missing(store, self._contact_s - opened_s)
                next_word_s += limit.word_every_s

            # Until all have met, rank 0 looks for ranks that died or never came.
            if world.rank == 0 and not self._met.is_set():
                self._failure = self._silent_rank(store, beats) or self._failure

            self._wake.wait(limit.poll_s if waits else limit.beat_s)
            self._wake.clear()

    def _all_are_there(self, store: Store) -> bool:
        key = f"message/{self.world.rank}"
        if not store.has(key):
            assert self._message is not None
            store.set(key, self._message)
            store.count("arrived", 1)
        if store.count("arrived") < self.world.size:
            return False
        self._messages = [json.loads(store.get(f"message/{rank}")) for rank in range(self.world.size)]
        self._met.set()
        return True

    def _say_who_is_missing(self, store: Store, waited_s: float) -> None:
        """Print which ranks are missing; the lowest rank that waits does it."""
        missing = [rank for rank in range(self.world.size) if not store.has(f"message/{rank}")]
        if not missing or any(rank not in missing for rank in range(self.world.rank)):
            return
        states = [
            f"rank {rank} on {store.get(f'host/{rank}')} (preparing)"
            if store.has(f"host/{rank}")
            else f"rank {rank} (not connected)"
            for rank in missing[:NAMED]
        ]
        more = f" and {len(missing) - NAMED} more" if missing[NAMED:] else ""
        self._tell(
            f"waiting at {self.world.master} for {len(missing)} of {self.world.size} ranks, {waited_s:.0f} s so far: "
            f"{', '.join(states)}{more}"
        )

    def _silent_rank(self, store: Store, beats: dict[int, tuple[int, float]]) -> Failure | None:
        """The failure of a rank that did not come, or whose heartbeat stands still; it ends the launch."""
        now_s = time.monotonic()
        for rank, (count, since_s) in beats.items():
            found = store.count(f"beat/{rank}")
            if found != count:
                beats[rank] = found, now_s
            elif now_s - since_s > (self._intervals.silent_s if count else self._intervals.connect_s):
                where = f" on {store.get(f'host/{rank}')}" if store.has(f"host/{rank}") else ""
                what = "has given no sign of life" if count else "has not connected"
                text = (
                    f"error: rank {rank}{where} {what} for {now_s - since_s:.0f} s, so the {self.world.size} ranks "
                    f"cannot meet at {self.world.master}: look into that host's output, and start again."
                )
                return Failure(0, self._host, EXIT_FAILURE, text)
        return None

    def _lost(self, error: Exception) -> None:
        """The store is gone, and rank 0 with it."""
        if self._closed.is_set() or self._met.is_set():
            return  # the launch may have ended; if it did not, collectives fail
        time.sleep(self._intervals.together_s)  # a launcher on this host ends this process, and rank 0 has printed why
        gone = f"error: rank 0 at {self.world.master} ended before the ranks had met ({first_line(error)}): "
        self._tell_once(self._failure.text if self._failure else gone + "look into its host's output.")
        self._leave(self._failure.code if self._failure else EXIT_FAILURE)

    # ---- failures

    def _report(self, own: Failure, store: Store, board: FailureBoard) -> None:
        """This rank's failure: post it, print what is left to print, end."""
        if text := board.post(own, self._was_told):
            self._tell_once(text)
        self._was_told = True
        board.mark_told()
        _note_final(board.failures())
        store.count("left", 1)
        self._leave_in_order(board.code_of(own), store)

    def _follow(self, store: Store, board: FailureBoard) -> None:
        """Another rank failed: end as soon as it has printed why."""
        self._follows = True
        if not board.await_told(or_else=lambda: self._failure is not None) and self._failure is not None:
            return self._report(self._failure, store, board)

        # The last that this rank asks of the store, which rank 0 takes along when it ends.
        failures = board.read()
        store.count("left", 1)
        _note_final(failures)

        # The main thread may fail as well, with more to report.
        if self._met.is_set():
            wait_until(lambda: self._failure is not None, self._intervals.come_out_s, self._intervals.poll_s)
        if own := self._failure:
            if text := board.left_to_tell(own):
                self._tell_once(text)
            self._was_told = True
            return self._leave_in_order(board.code_of(own), store)

        if failures and self._host not in {one.host for one in failures} and not pulse.is_watched():
            first = failures[0]
            self._tell_for_host(f"{self._host} ends, too: {first.place} failed: {first.text.splitlines()[-1]}")
        self._was_told = True
        self._leave_in_order(max((one.code for one in failures), default=EXIT_FAILURE), store)

    def _leave_in_order(self, code: int, store: Store) -> None:
        """End; rank 0 once the others need its store no more: torch prints a stack where one finds it gone."""
        world = self.world
        if world.rank == 0:
            offered_s, come_out_s = self._patience_s(code), self._intervals.come_out_s
            before_s = min(offered_s, come_out_s) if world.on_one_host else offered_s
            limit_s = come_out_s if self._met.is_set() else before_s
            wait_until(lambda: store.count("left") >= self._count_connected(store), limit_s, POLL_S)
        self._leave(code)

    def _count_connected(self, store: Store) -> int:
        """The number of ranks to serve to the end. A launcher on the same host ends those that have not connected."""
        size = self.world.size
        return sum(store.has(f"claim/{rank}") for rank in range(size)) if self.world.on_one_host else size

    def _leave(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._end(code)

    def _tell_in_turn(self, text: str, wait_s: float) -> None:
        """Without the store: the first rank of a host prints, another rank only if the first does not end it."""
        if not worlds.first_on_host():
            time.sleep(wait_s)
        self._tell_once(text)

    def _tell_once(self, text: str) -> None:
        if not self._was_told:
            self._was_told = True
            self._tell(text)

    def _tell_for_host(self, text: str) -> None:
        if worlds.first_on_host():
            self._tell(text)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._terminal, f"{text}\n".encode(errors="backslashreplace"))


def _note_final(failures: list[Failure]) -> None:
    """Note for a supervisor that no restart helps, whichever rank's mistake that is."""
    if any(one.is_final for one in failures):
        pulse.final(max(one.code for one in failures))


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, like SIGINT; after that the process ends and ignores both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        before = signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


_current: Rendezvous | None = None


def current() -> Rendezvous:
    """This process's rendezvous. Raises DeviceError if the environment does not come from a launcher."""
    global _current
    if _current is None:
        _current = Rendezvous(worlds.read(), INTERVALS, os.dup(2))
    return _current


def run_rank(main: Callable[[], int | None]) -> int:
    """Run a training program's `main` as one rank of its launch; returns the exit code where all ranks leave alike.

    If this rank fails alone, or may have failed alone, it prints its error and the process ends at once.
    """
    faulthandler.enable()  # a crash inside a library says where
    print_any_name()
    worlds.die_with_torchrun()
    note = worlds.ignored()

    try:
        meeting = current()
    except UserError as error:
        meeting = Rendezvous(World(), INTERVALS, os.dup(2))
        meeting.fail(error)
    if note:
        print(note, file=sys.stderr, flush=True)

    def fail_with_thread(failed: threading.ExceptHookArgs) -> None:
        """Let an error in any other thread end the process, too."""
        meeting.fail(failed.exc_value or SystemExit(EXIT_FAILURE))

    threading.excepthook = fail_with_thread

    code = EXIT_OK
    try:
        code = main() or EXIT_OK
    except RAISED_ON_ALL_RANKS as error:
        message, code = describe(error) or ("", EXIT_FAILURE)
        pulse.stopped() if code == EXIT_STOPPED else pulse.final(code)
        if worlds.first_on_host():
            print(message, file=sys.stderr, flush=True)
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, EXIT_OK)):
            meeting.fail(error)

    meeting.close()
    return code
