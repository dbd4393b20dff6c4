"""Signals: SIGTERM and SIGINT stop a run, on all ranks after the same micro-batch; SIGUSR1 saves and goes on.

    signal --wakeup pipe--> a thread notes the request, and from the first stop on counts the seconds of grace
    each step, with its sums: every rank's request --the largest--> STOP: Stopped is raised
    a step that takes longer than VOTE_EVERY_S: also within the step, over gloo, during a backward pass
    a newer launch writes into the run folder --a request, too, and the largest--> ReplacedByNewerLaunch is raised
    no more grace --> this process ends: with 75 if the last applied step is saved, else with 1
    a compiler that runs then --> is ended: what it leaves undone runs eagerly, so that the vote comes in time

C code writes the pipe, so a request is noted even while Python waits for a compiler or a kernel. Further signals have
no effect: the launcher sends SIGTERM to all ranks as soon as one has ended. The death of the launcher, or of the
command above it, counts as a SIGTERM.

Known gap: a vote is taken after a number of micro-batches: the number that fitted into VOTE_EVERY_S two steps before
(until that is known, after each). A request waits for a micro-batch that suddenly takes longer.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ds_slm.distributed.ranks import Control
from ds_slm.distributed.world import launcher, signal_at_launchers_death
from ds_slm.errors import EXIT_FAILURE, EXIT_STOPPED, ReplacedByNewerLaunch, Stopped

LOOK_EVERY_S = 0.1
"""Seconds between two looks of a stopping rank for compilers that keep it from stopping."""
RUNNER_EVERY_S = 1.0
"""Seconds between two looks of a rank whether the command that started its launcher is still there."""
VOTE_EVERY_S = 1.0
"""Seconds between two votes within a step; a micro-batch that takes longer has a vote after it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Request(IntEnum):
    """What a rank asks for; if ranks ask for different things, the largest request counts."""

    NONE = 0
    SAVE = 1
    STOP = 2
    REPLACED = 3


class Vote:
    """A vote of all ranks on their requests, in progress; empty in a step that is too short for one."""

    def __init__(self, interrupt: "Interrupt | None" = None, requests: Any = None, pending: Any = None) -> None:
        self._interrupt, self._requests, self._pending = interrupt, requests, pending

    def wait(self) -> None:
        """Do what all ranks agree on. Raises Stopped or ReplacedByNewerLaunch, on all ranks, if any asks for it."""
        if self._pending is not None:
            self._pending.wait()
        if self._interrupt is not None:
            self._interrupt.act_on(Request(int(self._requests)))


class Interrupt:
    """Within it signals are requests; outside they have their usual effect."""

    def __init__(self, control: Control, grace_s: float) -> None:
        self._control, self._grace_s = control, grace_s
        self._request, self._lock = Request.NONE, threading.Lock()
        self._watchdog: threading.Thread | None = None
        self._ended = threading.Event()
        self.mark_stopped: Callable[[], bool] = lambda: False
        """Whether a whole checkpoint of the last applied step is on disk; if so, notes that a signal ended the run."""
        self.save_requested = False
        """Whether all ranks agreed to save after this step."""

    def __enter__(self) -> "Interrupt":
        self._terminal = os.dup(2)  # later output goes to a log
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, _expect_dead_compilers) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        if above := launcher():
            signal_at_launchers_death(signal.SIGTERM)
            threading.Thread(target=self._stop_with_runner, args=(above,), name="runner", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        stopping = self._request >= Request.STOP
        _let_compiling_fail(False)
        for number, handler in self._handlers.items():
            # a stopped rank waits for the others, and may get the signal again meanwhile
            signal.signal(number, signal.SIG_IGN if stopping else handler)
        os.close(self._writer)
        if not isinstance(error, Stopped):  # the run ended before the request counted
            self._ended.set()

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            request = Request.SAVE if number[0] == signal.SIGUSR1 else Request.STOP
            is_first_stop = request == Request.STOP > self._request
            self._note(request)
            if is_first_stop:
                _tell_siblings()
        os.close(self._reader)

    def _stop_with_runner(self, above: psutil.Process) -> None:
        """Stop if `deepspeed` is gone: SIGTERM ends only that process; launcher and ranks would train on, unseen."""
        with contextlib.suppress(psutil.Error):
            runner = above.ppid()
            while not self._ended.wait(RUNNER_EVERY_S):
                if above.ppid() != runner:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    def _note(self, request: Request) -> None:
        """Remember a request; the time of grace begins with the first stop."""
        with self._lock:
            if request == Request.STOP and self._watchdog is None:
                self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._watchdog.start()
            self._request = max(self._request, request)

    def _watch(self) -> None:
        deadline_s = time.monotonic() + self._grace_s
        while not self._ended.wait(min(LOOK_EVERY_S, max(deadline_s - time.monotonic(), 0))):
            _end_compilers()
            if time.monotonic() >= deadline_s:
                self._give_up()

    def _give_up(self) -> None:
        saved = self.mark_stopped()
        what = "the last step is saved" if saved else "the last step is not saved, earlier checkpoints are whole"
        message = f"stopped: no more grace after {self._grace_s:g} s; {what}.\n"
        os.write(self._terminal, message.encode())
        os._exit(EXIT_STOPPED if saved else EXIT_FAILURE)

    def start_vote(self) -> "Vote":
        """Begin to ask all ranks for their request. Collective, and so is waiting for the answer."""
        requests = torch.tensor([int(self.request)])
        pending: Any = None
        if self._control.world_size > 1:
            pending = dist.all_reduce(requests, dist.ReduceOp.MAX, group=self._control.group, async_op=True)

        return Vote(self, requests, pending)

    @property
    def request(self) -> Request:
        """This rank's own request."""
        return self._request

    def act_on(self, request: Request) -> None:
        """Do what all ranks agreed on: their largest request. Raises Stopped or ReplacedByNewerLaunch."""
        if request == Request.REPLACED:
            raise ReplacedByNewerLaunch
        if request == Request.STOP:
            self._note(Request.STOP)  # also on ranks that did not get a signal
            raise Stopped
        self.save_requested |= request == Request.SAVE

    def note_replaced(self) -> None:
        """Request that all ranks leave the run folder to a newer launch."""
        self._note(Request.REPLACED)

    def saved(self) -> None:
        """Note that the checkpoint that a signal asked for is saved."""
        self.save_requested = False
        with self._lock:
            if self._request == Request.SAVE:
                self._request = Request.NONE


def micro_batches_per_vote(micro_batch_s: float) -> int:
    """Micro-batches between two votes, if the slowest rank takes `micro_batch_s` for one; 0 s: not known yet."""
    return max(int(VOTE_EVERY_S / micro_batch_s), 1) if micro_batch_s > 0 else 1


def _expect_dead_compilers(number: int, frame: Any) -> None:
    """Python's handler, in the main thread: torch's switches are each thread's own."""
    if number != signal.SIGUSR1:
        _let_compiling_fail(True)


def _let_compiling_fail(may: bool) -> None:
    dynamo = sys.modules.get("torch._dynamo")  # missing if nothing was compiled
    if dynamo:
        dynamo.config.suppress_errors = may


def _end_compilers() -> None:
    """End the processes that this one started and that do not run Python: compilers, and what they call."""
    with contextlib.suppress(psutil.Error):  # a process ended meanwhile; the next look is soon
        for child in psutil.Process().children(recursive=True):
            if not child.name().startswith("python"):
                child.terminate()


def _tell_siblings() -> None:
    """Send the signal to the other ranks of this host: the launcher stops ranks one by one, and waits for each."""
    above, siblings = launcher(), []
    with contextlib.suppress(psutil.Error):
        siblings = above.children() if above else []
    for sibling in siblings:
        with contextlib.suppress(psutil.Error):
            if sibling.pid != os.getpid():
                sibling.terminate()
