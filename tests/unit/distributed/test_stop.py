"""Signals as requests, in one process; the launcher's side is in tests/faults."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.distributed.stop import SIGNALS, Interrupt, Request
from ds_slm.errors import EXIT_FAILURE, EXIT_STOPPED, ReplacedByNewerLaunch, Stopped

PROGRAM = """
import os, signal, sys, time
from ds_slm.distributed.stop import Interrupt
class Alone:
    world_size = 1
with Interrupt(Alone(), grace_s=0.2) as interrupt:
    interrupt.mark_stopped = lambda: sys.argv[1] == "saved"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


class Alone:
    """A control of one rank."""

    world_size = 1


def control() -> Any:
    return Alone()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What a run that stopped leaves ignored is heard again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(interrupt: Interrupt, request: Request) -> None:
    """Until the listening thread has noted it."""
    deadline = time.monotonic() + 10
    while interrupt._request != request and time.monotonic() < deadline:
        time.sleep(0.001)
    assert interrupt._request == request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_raised_by_the_next_answer(number: signal.Signals) -> None:
    """Oracle: no exception where the signal arrives, Stopped at the vote behind it; afterwards signals are ignored."""
    with Interrupt(control(), grace_s=60) as interrupt:
        interrupt.start_vote().wait()
        os.kill(os.getpid(), number)
        wait_for(interrupt, Request.STOP)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped):
            interrupt.start_vote().wait()
    assert signal.getsignal(number) == signal.SIG_IGN  # the launcher may tell us again


def test_a_run_that_ends_by_itself_needs_no_grace() -> None:
    """The request came when there was nothing left to stop. Oracle: what would end this process is gone."""
    with Interrupt(control(), grace_s=60) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(interrupt, Request.STOP)
    assert interrupt._watchdog is not None
    interrupt._watchdog.join(10)
    assert not interrupt._watchdog.is_alive()


def test_a_stop_that_others_wanted_starts_the_time_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a vote that says STOP on a rank no signal came to: its own watchdog runs from then on."""
    import torch.distributed as dist

    class Two:
        world_size, group = 2, None

    def all_reduce(requests: Any, *_: Any, **__: Any) -> Any:
        requests.fill_(int(Request.STOP))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    two: Any = Two()
    interrupt = Interrupt(two, grace_s=60)
    with pytest.raises(Stopped):
        interrupt.start_vote().wait()
    assert interrupt._watchdog is not None
    interrupt._ended.set()


def test_giving_way_is_stronger_than_stopping() -> None:
    """Oracle: ReplacedByNewerLaunch, which saves nothing, though a signal asks for the end, too."""
    with Interrupt(control(), grace_s=60) as interrupt:
        interrupt.note_replaced()
        interrupt._note(Request.STOP)
        with pytest.raises(ReplacedByNewerLaunch):
            interrupt.start_vote().wait()
    assert interrupt._watchdog is not None
    interrupt._ended.set()


def test_compilers_may_fail_once_a_signal_came() -> None:
    """Oracle: torch's own switch, off before a stop and after it is over, on in between; not for SIGUSR1."""
    from torch._dynamo import config

    with Interrupt(control(), grace_s=60) as interrupt:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(interrupt, Request.SAVE)
        assert not config.suppress_errors
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(interrupt, Request.STOP)
        assert config.suppress_errors
    assert not config.suppress_errors


def test_a_wish_to_save_lasts_until_it_is_done() -> None:
    """Oracle: wanted after the vote, not before it, and not after the save."""
    with Interrupt(control(), grace_s=60) as interrupt:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(interrupt, Request.SAVE)
        assert not interrupt.save_requested
        interrupt.start_vote().wait()
        assert interrupt.save_requested
        interrupt.saved()
        interrupt.start_vote().wait()
        assert not interrupt.save_requested
    assert not [one for one in threading.enumerate() if one.name == "signals" and one.is_alive() and one.join(5)]


@pytest.mark.parametrize(("state", "code"), [("saved", EXIT_STOPPED), ("lost", EXIT_FAILURE)])
def test_without_grace_the_process_ends(state: str, code: int) -> None:
    """Oracle: a process that sleeps for a minute ends at once: with 75 where the last step is saved, else with 1."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, state], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert "no more grace after 0.2 s" in done.stderr
