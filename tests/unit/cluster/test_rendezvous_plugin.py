"""Our rendezvous against torch's interface alone: agents of two hosts are two handlers on one store, in this process.

The ranks are processes that sleep. Oracle: what the design says an agent does, and torch's own rounds.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.registry import _register_out_of_tree_handlers

from ds_slm import pulse
from ds_slm.cluster import rendezvous
from ds_slm.cluster.limits import END, HEARTBEAT_S, NAME, Limits
from ds_slm.cluster.rendezvous import Handler

PATIENCE_S = 30.0
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
SAVING = STUBBORN.replace("signal.SIG_IGN", "lambda *_: exit(75)")


class Relay:
    """Between agents and the store: it can go silent, as a cut cable does, or close, as a dead supervisor does."""

    def __init__(self, port: int) -> None:
        self._to, self.is_silent = port, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self._to))
            self._open += [inner, outer]
            for source, target in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.is_silent:
                    time.sleep(0.05)
                target.sendall(data)

    def close(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class Host:
    """The agent of one host, its rank, and what became of it."""

    missed_beats = 30
    """Seconds without a heartbeat after which torch counts a host as lost."""

    def __init__(self, port: int, folder: Path, limits: Limits, hosts: int, rank: str = STUBBORN) -> None:
        self.pulses = folder
        self.pulses.mkdir()
        self.ends: list[int] = []
        self.ranks: list[psutil.Process] = []
        self._rank, self._started = rank, list[subprocess.Popen]()
        params = RendezvousParameters("ds-slm", f"127.0.0.1:{port}", "run", 1, hosts, folder.name)
        backend = rendezvous.AnsweringBackend(rendezvous.connect(params.endpoint), "run")
        self.handler = Handler.from_backend(
            "run",
            rendezvous.connect(params.endpoint),
            backend,
            1,
            hosts,
            folder.name,
            rendezvous.RendezvousTimeout(last_call=rendezvous.LAST_CALL),
            1,
            self.missed_beats,
        )
        self.handler.begin(limits, backend, self.pulses, lambda: self.ranks, self.ends.append)

    def start_rank(self) -> psutil.Process:
        process = subprocess.Popen([sys.executable, "-c", self._rank], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        self._started.append(process)
        self.ranks[:] = [psutil.Process(process.pid)]
        return self.ranks[0]

    def sign(self, kind: str, text: str = "") -> None:
        (self.pulses / f"{self.ranks[0].pid if self.ranks else 1}.{kind}").write_text(text)

    def end(self) -> None:
        self.handler.shutdown()
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


Start = Callable[..., Host]


@pytest.fixture
def store() -> TCPStore:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@pytest.fixture
def start(store: TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    hosts: list[Host] = []

    def make(name: str, hosts_of_run: int = 2, port: int = store.port, rank: str = STUBBORN, **limits: int) -> Host:
        made = Host(port, tmp_path / name, Limits(**{"grace": 1, "save": 1, **limits}), hosts_of_run, rank)
        hosts.append(made)
        return made

    yield make
    for host in hosts:
        host.end()


def join(*hosts: Host) -> list[tuple[int, int]]:
    """Each host's place in the next round: (rank, number of hosts)."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        joined: list[Future] = [pool.submit(host.handler.next_rendezvous) for host in hosts]
        infos = [one.result(PATIENCE_S) for one in joined]
    return [(info.rank, info.world_size) for info in infos]


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to that"
        time.sleep(0.05)


def exit_code(action: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as ended:
        wait_for(lambda: action() is None)
    return ended.value.code


def test_torchrun_finds_it_by_its_name(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's registry. It gives each attempt's ranks a store of their own."""
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", pulse.FOLDER):
        monkeypatch.setenv(name, "")  # put back afterwards
    _register_out_of_tree_handlers()
    params = RendezvousParameters(NAME, f"127.0.0.1:{store.port}", "run", 1, 1, "node1", lease="7")
    made = rendezvous_handler_registry.create_handler(params)
    assert isinstance(made, Handler) and not made.use_agent_store
    assert made.next_rendezvous().world_size == 1
    made.shutdown()
    assert Path(os.environ[pulse.FOLDER]).is_dir()


def test_fails_loudly_where_torch_has_renamed_what_is_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error names what is read, a name that no torch has, as soon as the host begins."""

    def without_members(self: Handler) -> frozenset:
        return frozenset(self._no_such_holder.state.participants)  # type: ignore[attr-defined]

    monkeypatch.setattr(Handler, "_participants", without_members)
    with pytest.raises(RuntimeError, match="_no_such_holder"):
        start("node1")


@pytest.mark.parametrize(("lease", "grace"), [(15, 5), (7, 2), (60, 30), (1, 0)])
def test_a_host_that_is_cut_off_is_empty_before_the_others_miss_it(lease: int, grace: int) -> None:
    """Contract: they count its heartbeats only after the lease and its ranks' time to end."""
    limits = Limits(lease=lease, grace=grace)
    assert lease + grace <= limits.missed_heartbeats * HEARTBEAT_S


def test_a_lost_host_restarts_the_others_without_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """node2's agent dies: no heartbeat comes any more. Oracle: torch's next round has one host."""
    monkeypatch.setattr(Host, "missed_beats", 2)
    one, two = start("node1"), start("node2")
    assert sorted(join(one, two)) == [(0, 2), (1, 2)]
    rank = one.start_rank()
    assert one.handler.num_nodes_waiting() == 0
    two.handler.shutdown()
    wait_for(lambda: one.handler.num_nodes_waiting() == 1)
    assert not rank.is_running()
    assert join(one) == [(0, 1)]


def test_a_host_that_comes_back_is_taken_in(start: Start) -> None:
    """No restart is allowed, and a change of hosts takes none. Oracle: torch's next round has both hosts."""
    one = start("node1", gather=0)
    assert join(one) == [(0, 1)]
    two = start("node2")
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(two.handler.next_rendezvous)
        wait_for(lambda: one.handler.num_nodes_waiting() == 1)
        assert join(one)[0][1] == 2
        assert joined.result(PATIENCE_S).world_size == 2


def test_an_agent_whose_store_is_silent_ends_its_ranks_and_itself(start: Start, store: TCPStore) -> None:
    """A cut cable: nothing is refused, nothing answers. The rank ignores SIGTERM, and is killed after the grace."""
    relay = Relay(store.port)
    host = start("node1", 1, relay.port, lease=2)
    rank = host.start_rank()
    join(host)
    relay.is_silent = True
    wait_for(lambda: host.ends)
    assert host.ends == [1] and not rank.is_running()
    relay.is_silent = False
    relay.close()


def test_a_short_silence_is_ridden_out(start: Start, store: TCPStore) -> None:
    """1.5 s of silence under a lease of 5 s. Oracle: the rank and its agent live on, and no host counts as lost."""
    relay = Relay(store.port)
    host = start("node1", 1, relay.port, lease=5)
    join(host)
    rank = host.start_rank()
    relay.is_silent = True
    time.sleep(1.5)
    relay.is_silent = False
    assert host.handler.num_nodes_waiting() == 0
    assert rank.is_running() and not host.ends
    relay.close()


@pytest.mark.parametrize(("rank", "code"), [(SAVING, 75), (STUBBORN, 1)])
def test_when_the_supervisor_dies_ranks_save_and_all_ends(start: Start, store: TCPStore, rank: str, code: int) -> None:
    """Its store closes. The agent's exit code says whether its ranks have saved."""
    relay = Relay(store.port)
    host = start("node1", 1, relay.port, rank, save=30 if rank == SAVING else 1)
    join(host)
    process = host.start_rank()
    relay.close()
    assert exit_code(host.handler.num_nodes_waiting) == code
    assert not process.is_running()


def test_a_rank_that_does_not_get_on_is_killed(start: Start) -> None:
    """A stopped process, too; one that never gave a sign may be compiling."""
    host = start("node1", 1, hang=1)
    join(host)
    silent = host.start_rank()
    time.sleep(1.6)
    assert silent.is_running()
    host.sign("pulse", "3")
    os.kill(silent.pid, signal.SIGSTOP)
    wait_for(lambda: silent.status() == psutil.STATUS_ZOMBIE)


def test_a_mistake_ends_all_hosts_with_its_exit_code(start: Start) -> None:
    """Oracle: 2, the code that a rank of node1 left behind: node2's agent ends with it, too."""
    one, two = start("node1"), start("node2")
    join(one, two)
    one.sign("final", "2")
    assert exit_code(one.handler.next_rendezvous) == 2
    assert exit_code(two.handler.num_nodes_waiting) == 2


def test_the_supervisors_word_ends_a_host_that_waits(start: Start, store: TCPStore) -> None:
    """node2 never comes, and the run needs two hosts."""
    host = start("node1")
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(host.handler.next_rendezvous)
        store.set(END, "75")
        assert isinstance(joined.exception(PATIENCE_S), SystemExit)


@pytest.mark.parametrize(("rank", "code"), [(SAVING, 75), (STUBBORN, 130)])
def test_the_supervisors_word_lets_ranks_save(start: Start, store: TCPStore, rank: str, code: int) -> None:
    """Code 75 says that a whole checkpoint is saved, so an agent whose ranks did not save does not say it."""
    host = start("node1", 1, rank=rank, save=30 if rank == SAVING else 1)
    join(host)
    host.start_rank()
    store.set(END, "75")
    assert exit_code(host.handler.num_nodes_waiting) == code


def test_failures_count_until_a_new_step_is_applied(start: Start) -> None:
    """Oracle: counted by hand, with 2 restarts: at step 24 one, two; 25 is new, so one, two, and the third ends."""
    host = start("node1", 1, restarts=2)
    join(host)
    for step in ("24", "24", "25", ""):  # the last one fails before any step
        host.sign("pulse", step)
        join(host)
    host.sign("pulse", "25")
    assert exit_code(host.handler.next_rendezvous) == 1


def test_a_stop_is_not_a_failure(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """No restart is allowed. Oracle: torch's next round, which a failure would not reach; no restart is told of."""
    host = start("node1", 1, restarts=0)
    join(host)
    host.sign("stopped")
    assert join(host) == [(0, 1)]
    assert "restart" not in capfd.readouterr().err
