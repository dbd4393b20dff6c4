"""Signals: SIGTERM and SIGINT stop a run, on all ranks after the same micro-batch; SIGUSR1 saves and goes on.

    signal --wakeup pipe--> a thread notes the wish, and from the first stop on counts the seconds of grace
    each step, with its sums: every rank's wish --the largest--> STOP: Stopped is raised
    a step that takes longer than VOTE_EVERY_S: meanwhile, too, over gloo, behind a backward pass
    a newer launch writes into the run folder --a wish, too, and the largest--> Superseded is raised
    no more grace --> this process ends: with 75 where the last applied step is saved, else with 1
    a compiler that runs then --> is ended: what it leaves undone runs eagerly, so that the vote comes in time

The pipe is written in C, so a wish is noted also while Python waits for a compiler or a kernel. Further signals change
nothing: DeepSpeed's launcher sends SIGTERM to all as soon as one rank has left. Its own death counts as a SIGTERM,
and so does that of the `deepspeed` command above it.

Known gap: a vote is taken after a number of micro-batches, as many as fit into VOTE_EVERY_S at the pace of the step
before: one that suddenly takes longer is waited for, and so is each single one, however long.
"""

import contextlib
import ctypes
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

from ds_slm.errors import EXIT_FAILURE, EXIT_STOPPED, Stopped, Superseded
from ds_slm.train.control import Control

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h."""
LOOK_EVERY_S = 0.1
"""So often a rank that is to stop looks for compilers that keep it from stopping."""
RUNNER_EVERY_S = 1.0
"""So often a rank looks whether the command that started its launcher is still there."""
VOTE_EVERY_S = 1.0
"""So often, or after each micro-batch that takes longer, ranks ask each other within a step."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Wish(IntEnum):
    """What a rank asks for; of several ranks' wishes the largest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    GIVE_WAY = 3


class Interrupt:
    """Within it signals are wishes; outside they do what they always did."""

    def __init__(self, control: Control, grace_s: float) -> None:
        self._control, self._grace_s = control, grace_s
        self._wish, self._lock = Wish.NOTHING, threading.Lock()
        self._watchdog: threading.Thread | None = None
        self._ended = threading.Event()
        self.sign_off: Callable[[], bool] = lambda: False
        """Whether a whole checkpoint of the last applied step lies on disk; leaves the sign of it, too."""
        self.save_wanted = False
        """Whether all ranks agreed to save after this step."""

    def __enter__(self) -> "Interrupt":
        self._terminal = os.dup(2)  # what is printed later goes to a log
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, _expect_dead_compilers) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        _stop_with_launcher()
        if launcher := _launcher():
            threading.Thread(target=self._stop_with_runner, args=(launcher,), name="runner", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        stopping = self._wish >= Wish.STOP
        _let_compiling_fail(False)
        for number, handler in self._handlers.items():
            # a stopped rank waits for the others, and may be told once more meanwhile
            signal.signal(number, signal.SIG_IGN if stopping else handler)
        os.close(self._writer)
        if not isinstance(error, Stopped):  # the run came to its end before the wish counted
            self._ended.set()

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            wish = Wish.SAVE if number[0] == signal.SIGUSR1 else Wish.STOP
            is_first_stop = wish == Wish.STOP > self._wish
            self._note(wish)
            if is_first_stop:
                _tell_siblings()
        os.close(self._reader)

    def _stop_with_runner(self, launcher: psutil.Process) -> None:
        """SIGTERM to `deepspeed` ends that process alone: its launcher and the ranks would train on, unseen."""
        with contextlib.suppress(psutil.Error):
            runner = launcher.ppid()
            while not self._ended.wait(RUNNER_EVERY_S):
                if launcher.ppid() != runner:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    def _note(self, wish: Wish) -> None:
        """Remember a wish; from the first stop on the time runs."""
        with self._lock:
            if wish == Wish.STOP and self._watchdog is None:
                self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._watchdog.start()
            self._wish = max(self._wish, wish)

    def _watch(self) -> None:
        deadline_s = time.monotonic() + self._grace_s
        while not self._ended.wait(min(LOOK_EVERY_S, max(deadline_s - time.monotonic(), 0))):
            _end_compilers()
            if time.monotonic() >= deadline_s:
                self._give_up()

    def _give_up(self) -> None:
        saved = self.sign_off()
        what = "the last step is saved" if saved else "the last step is not saved, earlier checkpoints are whole"
        message = f"stopped: no more grace after {self._grace_s:g} s; {what}.\n"
        os.write(self._terminal, message.encode())
        os._exit(EXIT_STOPPED if saved else EXIT_FAILURE)

    def vote(self) -> Callable[[], None]:
        """Begin to ask all ranks for their wish. Collective, and so is the answer: a function to be called later.

        It raises Stopped or Superseded, on all ranks, where any wants to stop or to give way.
        """
        wishes = torch.tensor([int(self.wish)])
        pending: Any = None
        if self._control.world_size > 1:
            pending = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._control.group, async_op=True)

        def answer() -> None:
            if pending is not None:
                pending.wait()
            self.act_on(Wish(int(wishes)))

        return answer

    @property
    def wish(self) -> Wish:
        """What this rank asks for."""
        return self._wish

    def act_on(self, wish: Wish) -> None:
        """Do what all ranks agreed on: the largest wish of theirs. Raises Stopped or Superseded."""
        if wish == Wish.GIVE_WAY:
            raise Superseded
        if wish == Wish.STOP:
            self._note(Wish.STOP)  # on the ranks that no signal came to, too
            raise Stopped
        self.save_wanted |= wish == Wish.SAVE

    def give_way(self) -> None:
        """Wish that all ranks leave the run folder to a newer launch."""
        self._note(Wish.GIVE_WAY)

    def saved(self) -> None:
        """What was wanted is done."""
        self.save_wanted = False
        with self._lock:
            if self._wish == Wish.SAVE:
                self._wish = Wish.NOTHING


def micro_batches_per_vote(micro_batch_s: float) -> int:
    """After how many micro-batches ranks vote, where the slowest rank takes so long for one; 0 s: not known yet."""
    return max(int(VOTE_EVERY_S / micro_batch_s), 1) if micro_batch_s > 0 else 1


def _expect_dead_compilers(number: int, frame: Any) -> None:
    """Python's handler, in the main thread: torch's switches are each thread's own."""
    if number != signal.SIGUSR1:
        _let_compiling_fail(True)


def _let_compiling_fail(may: bool) -> None:
    dynamo = sys.modules.get("torch._dynamo")  # not there where nothing was compiled
    if dynamo:
        dynamo.config.suppress_errors = may


def _end_compilers() -> None:
    """End what this process started and what is no Python: compilers, and what they call."""
    with contextlib.suppress(psutil.Error):  # what ended meanwhile; the next look is soon
        for child in psutil.Process().children(recursive=True):
            if not child.name().startswith("python"):
                child.terminate()


def _launcher() -> psutil.Process | None:
    """DeepSpeed's launcher on this host, where it started this process."""
    with contextlib.suppress(psutil.Error):  # it may be ending
        parent = psutil.Process().parent()
        return parent if parent and "deepspeed.launcher.launch" in parent.cmdline() else None


def _tell_siblings() -> None:
    """The launcher tells its ranks one after another and waits for each: one that compiles would keep it waiting."""
    launcher, siblings = _launcher(), []
    with contextlib.suppress(psutil.Error):
        siblings = launcher.children() if launcher else []
    for sibling in siblings:
        with contextlib.suppress(psutil.Error):
            if sibling.pid != os.getpid():
                sibling.terminate()


def _stop_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when DeepSpeed's launcher dies: ranks alone would train on, unseen."""
    if sys.platform == "linux" and _launcher():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
