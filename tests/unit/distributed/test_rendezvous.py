"""How ranks meet, and how one that fails ends the others. The ranks of a launch are threads of this process.

Oracle throughout: what users read, and the exit code of every rank.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm import pulse
from ds_slm.distributed import rendezvous
from ds_slm.distributed.rendezvous import Rendezvous
from ds_slm.distributed.store import Store
from ds_slm.errors import DataError
from tests.support.launches import QUICK, Launch, arrives, fails, prepares

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    made: list[Launch] = []

    def make(size: int, on_one_host: bool = False, **intervals: float) -> Launch:
        made.append(Launch(size, tmp_path, replace(QUICK, **intervals), on_one_host))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_ranks_that_meet_know_what_each_says(launch: Callable[..., Launch]) -> None:
    """Oracle: all three messages, in the order of ranks, on every rank; the terminal stays empty."""
    three = launch(3)
    messages: list[list[str]] = []
    three.run(*(lambda rank: messages.append(rank.arrive(f"I am {rank.world.rank}")) for _ in range(3)))
    assert messages == [["I am 0", "I am 1", "I am 2"]] * 3
    assert three.told == "" and three.codes == {}


def test_one_rank_meets_itself_without_a_store(launch: Callable[..., Launch]) -> None:
    """Oracle: its own message; neither a thread nor a store was made."""
    (rank,) = launch(1).ranks
    assert rank.arrive("alone") == ["alone"]
    assert rank._thread is None and rank._store is None


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_on_one_rank_ends_those_that_wait_and_those_that_prepare(
    launch: Callable[..., Launch], failing: int
) -> None:
    """Oracle: exit code 2 of a user's mistake on all ranks; both problems in one paragraph, once."""
    three = launch(3, linger_s=60, together_s=0.1)
    actions = [arrives, prepares]
    actions.insert(failing, fails(DataError(["this is wrong", "and this"])))
    three.run(*actions)
    three.await_codes(3)
    assert three.codes == {0: 2, 1: 2, 2: 2}
    assert three.told == "error: this is wrong\n  and this\n"


def test_the_same_mistake_on_all_ranks_is_told_once_and_at_once(launch: Callable[..., Launch]) -> None:
    """Oracle: the sentence once, and sooner than the 15 s for which a rank would wait for others' mistakes."""
    three, began_s = launch(3, together_s=15, linger_s=15), time.monotonic()
    three.run(*[fails(DataError("this is wrong"))] * 3)
    assert three.codes == {0: 2, 1: 2, 2: 2}
    assert three.told == "error: this is wrong\n"
    assert time.monotonic() - began_s < 10


def test_mistakes_of_several_ranks_are_told_together(launch: Callable[..., Launch]) -> None:
    """Oracle: by hand: both sentences in one paragraph, in the order of ranks; both ranks end with 2."""
    two = launch(2, linger_s=60, together_s=60)
    two.run(fails(DataError("left is wrong")), fails(DataError("right is wrong")))
    assert two.codes == {0: 2, 1: 2}
    assert two.told == "error: left is wrong\n  right is wrong\n"


@pytest.mark.parametrize("error", [ImportError("no module"), MemoryError("no memory"), SystemExit(3), ValueError("x")])
def test_any_error_before_the_ranks_meet_ends_all(launch: Callable[..., Launch], error: BaseException) -> None:
    """Oracle: Python's own line of an error that was never raised; exit code 1 on the rank that waits, too."""
    two = launch(2, linger_s=60)
    two.run(arrives, fails(error))
    two.await_codes(2)
    assert two.codes == {0: 1, 1: 1}
    assert two.told == f"{type(error).__name__}: {error}\n"


def test_an_error_before_the_store_is_open_ends_all(launch: Callable[..., Launch]) -> None:
    """As argparse's, or that of a recipe only this host lacks."""
    two = launch(2, linger_s=60)
    two.run(arrives, fails(DataError("this host has no recipe"), when_open=False))
    two.await_codes(2)
    assert two.codes == {0: 2, 1: 2}
    assert two.told == "error: this host has no recipe\n"


def test_an_interruption_ends_all(launch: Callable[..., Launch]) -> None:
    """Oracle: 130, the documented exit code, on both ranks; one line, once."""
    two = launch(2, interrupted_s=60)
    two.run(arrives, fails(KeyboardInterrupt()))
    two.await_codes(2)
    assert two.codes == {0: 130, 1: 130}
    assert two.told == "interrupted: the same command goes on from what was saved last, if anything was.\n"


@pytest.mark.parametrize("number", [0, 1])
def test_an_interruption_waits_for_no_rank_that_never_came(launch: Callable[..., Launch], number: int) -> None:
    """Rank 0 has nobody to serve, or rank 1 finds nobody: both would offer another failure for a minute."""
    two = launch(2, linger_s=60)

    def interrupted(rank: Rendezvous) -> None:
        rank.open()
        rank._message = "I am here"
        rank.fail(KeyboardInterrupt())

    two.ranks = two.ranks[number : number + 1]
    two.run(interrupted)
    two.await_codes(1)
    assert two.codes == {number: 130}
    assert two.told == "interrupted: the same command goes on from what was saved last, if anything was.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_the_wait(launch: Callable[..., Launch], number: signal.Signals) -> None:
    """Further ones change nothing. Oracle: the exception that `run_rank` tells of; else the handlers there were."""
    two = launch(2)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}

    def send() -> None:
        deadline_s = time.monotonic() + 20
        while signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM] and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]:
            two.ranks[0]._met.set()  # the signal would end this process
        else:
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            arrives(two.ranks[0])
        assert all(signal.getsignal(one) == signal.SIG_IGN for one in handlers)
    finally:
        sender.join()
        for one, handler in handlers.items():
            signal.signal(one, handler)
    two.ranks[0]._met.set()
    arrives(two.ranks[0])
    assert {one: signal.getsignal(one) for one in handlers} == handlers


def test_who_waits_for_whom_is_said(launch: Callable[..., Launch]) -> None:
    """Oracle: by hand: rank 0 waits, rank 1 has connected, rank 2 has not; once both have come, all meet."""
    three = launch(3, first_word_s=0.2, word_every_s=0.2)
    waiting = threading.Thread(target=arrives, args=(three.ranks[0],))
    waiting.start()
    prepares(three.ranks[1])
    deadline_s = time.monotonic() + 20
    while "(preparing)" not in three.told and time.monotonic() < deadline_s:
        time.sleep(0.01)
    line, *_, again = [three.told.splitlines()[0], *three.told.splitlines()]
    host = socket.gethostname()
    assert re.match(rf"waiting at 127.0.0.1:{three.world.port} for 2 of 3 ranks, \d+ s so far: rank 1", line)
    assert again.endswith(f": rank 1 on {host} (preparing), rank 2 (not connected)")
    three.run(lambda rank: None, arrives, arrives)
    waiting.join(timeout=20)
    assert not waiting.is_alive() and three.codes == {}


def test_a_heartbeat_that_stops_ends_the_wait(launch: Callable[..., Launch]) -> None:
    """A rank that beat once and was killed then, as by SIGKILL or with its host."""
    two = launch(2, silent_s=0.3)
    two.ranks[0].open()
    while two.ranks[0]._store is None:
        time.sleep(0.01)
    dead = Store(replace(two.world, rank=1), QUICK)
    dead.set("host/1", "node2")
    dead.count("beat/1", 1)
    two.run(arrives)
    two.await_codes(1)
    assert two.codes == {0: 1}
    said = r"rank 1 on node2 has given no sign of life for \d+ s, so the 2 ranks cannot meet at 127.0.0.1:"
    assert re.search(said, two.told)


def test_a_rank_that_never_connects_ends_the_wait(launch: Callable[..., Launch]) -> None:
    """Oracle: by hand: rank 1 does nothing for `connect_s`. Rank 0 names it, and ends with exit code 1."""
    two = launch(2, connect_s=0.3)
    two.run(arrives)
    two.await_codes(1)
    assert two.codes == {0: 1}
    assert re.search(r"rank 1 has not connected for \d+ s", two.told)


@pytest.mark.timeout(60)
def test_a_rank_that_prepares_beats(launch: Callable[..., Launch]) -> None:
    """Oracle: its counter in the store, which another rank sees growing while this one does something else."""
    two = launch(2)
    first, second = (rank.connected() for rank in two.ranks)
    counts = [first.count("beat/1")]
    while len(counts) < 5:
        if (count := first.count("beat/1")) > counts[-1]:
            counts.append(count)
    assert second is not first and two.codes == {} and two.told == ""


def test_a_rank_that_prepares_for_long_is_no_dead_rank(
    launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand, on this test's clock: heartbeats for ten times `silent_s` are fine, one more without is not."""
    now_s, beats = 0.0, 0
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now_s))
    rank, seen = launch(2, silent_s=10).ranks[0], {1: (0, 0.0)}
    store: Any = SimpleNamespace(count=lambda key: beats, has=lambda key: False)
    for _ in range(100):
        now_s, beats = now_s + 1, beats + 1
        assert rank._silent_rank(store, seen) is None
    now_s += 10
    assert rank._silent_rank(store, seen) is None
    now_s += 0.5
    failure = rank._silent_rank(store, seen)
    assert failure is not None and "rank 1 has given no sign of life for 10 s" in failure.text


def test_nobody_at_the_address_is_said(launch: Callable[..., Launch]) -> None:
    """As with the MASTER_ADDR of an earlier launch."""
    two = launch(2, connect_s=0.3, first_word_s=0)
    two.run(lambda rank: None, arrives)
    two.await_codes(1)
    assert two.codes == {1: 2}
    waits, *error = two.told.splitlines()
    assert "waits for rank 0 at 127.0.0.1:" in waits and "(Connection refused)" in waits
    assert f"found nobody at {two.world.master}, where rank 0 should listen" in error[-1]
    assert "MASTER_ADDR" in error[-1]


def test_an_unknown_address_is_said(launch: Callable[..., Launch]) -> None:
    """Oracle: RFC 2606: there is no host below .invalid; exit code 2 of a user's mistake."""
    two = launch(2, linger_s=0.1)
    two.ranks[1].world = replace(two.world, rank=1, address="nowhere.invalid")
    two.run(lambda rank: None, arrives)
    two.await_codes(1)
    assert two.codes == {1: 2}
    assert "'nowhere.invalid' is not a known host name" in two.told


def test_a_port_in_use_is_said(launch: Callable[..., Launch]) -> None:
    """Oracle: a socket of this test that listens there; exit code 2, and the flag that names another port."""
    two = launch(2)
    with socket.socket() as taken:
        taken.bind(("", two.world.port))
        taken.listen()
        two.run(arrives)
        two.await_codes(1)
    assert two.codes == {0: 2}
    assert "is in use" in two.told and "--master_port" in two.told


def test_a_rank_of_another_launch_is_refused(launch: Callable[..., Launch]) -> None:
    """Another launch's rank at the same port: it ends, and those that were there first meet."""
    two = launch(2)
    two.run(arrives, arrives)
    stranger = two.rank(1)
    two.ranks[1] = stranger
    two.run(lambda rank: None, arrives)
    two.await_codes(1)
    assert two.codes == {1: 2}
    assert "in use, perhaps by another launch" in two.told


def test_a_crash_after_the_ranks_have_met_ends_the_others(launch: Callable[..., Launch]) -> None:
    """The others are inside a collective, which this thread must end. Told is the crash alone."""
    three = launch(3)
    three.run(arrives, arrives, arrives)
    three.run(lambda rank: None, fails(ZeroDivisionError("division by zero")))
    three.await_codes(3)
    assert three.codes == {0: 1, 1: 1, 2: 1}
    assert three.told == "ZeroDivisionError: division by zero\n"


def fails_behind(launch: Launch, error: BaseException) -> Callable[[Rendezvous], None]:
    """As a rank whose collective fails because another rank ended."""

    def action(rank: Rendezvous) -> None:
        while not launch.told:
            time.sleep(0.01)
        rank.fail(error)

    return action


def test_no_restart_follows_a_mistake_that_tore_another_rank_away(
    launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exit code 2 of a user's mistake, as final, from the rank that made it and from the one torn away."""
    finals: list[tuple[str, int]] = []
    monkeypatch.setattr(pulse, "final", lambda code: finals.append((threading.current_thread().name, code)))
    two = launch(2, linger_s=60, come_out_s=60, together_s=0.1)
    two.run(arrives, arrives)
    for rank in two.ranks:
        assert rank._thread is not None
        rank._thread.name = f"rank {rank.world.rank}"
    two.run(fails_behind(two, RuntimeError("connection closed by peer")), fails(DataError("this is wrong")))
    two.await_codes(2)
    assert two.codes == {0: 2, 1: 2} and ("rank 0", 2) in finals
    assert {code for _, code in finals} == {2}


@pytest.fixture
def asked_of_the_store(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads of ranks that used the store, in order, but for rank 0's own."""
    asked: list[str] = []

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def use(*args: object) -> object:
            asked.append(threading.current_thread().name)
            return real(*args)

        return use

    for name in ("get", "set", "has", "count"):
        monkeypatch.setattr(Store, name, watched(getattr(Store, name)))
    return asked


@pytest.mark.parametrize("have_met", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_rank_0_serves_the_store_until_no_rank_of_its_host_asks(
    launch: Callable[..., Launch], failing: int, have_met: bool, asked_of_the_store: list[str]
) -> None:
    """Oracle: no other rank uses the store once rank 0 has ended, where torch would print a stack; all end with 2."""
    three = launch(3, on_one_host=True, together_s=0.1, linger_s=60, come_out_s=60, beat_s=0.2)
    for rank in three.ranks:
        rank.connected()
    if have_met:
        three.run(arrives, arrives, arrives)
    used_at_end: list[int] = []
    end = three.ranks[0]._end

    def end_rank_0(code: int) -> None:
        used_at_end.append(sum(not name.startswith("rank 0") for name in asked_of_the_store))
        end(code)

    three.ranks[0]._end = end_rank_0
    assert three.ranks[0]._thread is not None
    three.ranks[0]._thread.name = "rank 0"

    error = DataError("this is wrong")
    waits = fails_behind(three, error) if have_met else arrives
    actions = [waits, waits]
    actions.insert(failing, fails(error))
    three.run(*actions)
    three.await_codes(3)
    assert three.codes == {0: 2, 1: 2, 2: 2} and three.told == "error: this is wrong\n"
    assert used_at_end[0] == sum(not name.startswith("rank 0") for name in asked_of_the_store)


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero", 1),
        (DataError("this is wrong"), "error: this is wrong", 2),
    ],
)
def test_what_follows_from_a_crash_is_one_line(
    error: Exception, told: str, code: int, launch: Callable[..., Launch]
) -> None:
    """A rank whose collective fails because another is gone says so, under the name of the first; with its code."""
    two = launch(2, linger_s=60, come_out_s=60, together_s=0.1)
    two.run(arrives, arrives)
    two.run(fails_behind(two, RuntimeError("connection closed by peer")), fails(error))
    two.await_codes(2)
    first, second = two.told.splitlines()
    host = socket.gethostname()
    assert first == told and two.codes == {0: code, 1: code}
    assert (
        second == f"rank 0 on {host} ends, too (rank 1 on {host} had failed): RuntimeError: connection closed by peer"
    )
