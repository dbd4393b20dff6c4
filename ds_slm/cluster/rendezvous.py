"""A rendezvous for torchrun that acts on what torch's own only records: `torchrun --rdzv-backend ds-slm ...`.

torch provides heartbeats, membership, rounds and ranks. This one adds, on every host:

    a host that is lost             its heartbeats are overdue: the ranks of all other hosts are started again
    a store that does not answer    for `lease` seconds: this host is cut off. Its ranks get `grace` seconds to end
    a rank without progress         for `hang` seconds (ds_slm/pulse.py): it is killed, and that is a failure
    a rank that no restart can help for example a user's mistake: the whole run ends with its exit code
    failures without progress       more than `restarts` in a row, none of which applied a new step: the run ends
    the supervisor's message        an exit code in the store: all ranks save, and end

A cut-off host must have no ranks left before the others take a step: the others miss its heartbeats only after `lease +
grace`. Hosts compare each other's heartbeats by the clock, so their clocks must not differ by more than a few seconds.

Known gap: one of torch's private names is read, `_state_holder.state.participants`; without it `create` fails.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousInfo,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token

from ds_slm import pulse
from ds_slm.cluster.limits import END, HEARTBEAT_S, NAME, Limits
from ds_slm.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED

STARTED = "ds_slm/started"
"""The store's counter of agents that were started."""
HOST_SAYS = "supervised: "
"""The prefix of an agent's lines about its ranks."""
LAST_CALL = timedelta(seconds=2)
"""How long a round that could begin waits for more hosts."""
FOREVER = timedelta(days=365)
LOOK_S = 0.5


def handler() -> Callable[[RendezvousParameters], DynamicRendezvousHandler]:
    """The function that the entry point `torchrun.handlers` names."""
    return create


def create(params: RendezvousParameters) -> "Handler":
    """The rendezvous of this host's agent.

    Raises:
        RendezvousConnectionError: the store does not answer.
        RuntimeError: this was not written for the installed version of torch.
    """
    limits = Limits.of_conf(params.config)

    # Ranks meet at a new port in every round: a shared store would still hold addresses of the round before.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if not os.environ.get(pulse.FOLDER):
        os.environ[pulse.FOLDER] = tempfile.mkdtemp(prefix="ds-slm-")
        atexit.register(shutil.rmtree, os.environ[pulse.FOLDER], ignore_errors=True)
    pulses = Path(os.environ[pulse.FOLDER])

    backend = AnsweringBackend(connect(params.endpoint), params.run_id)
    made = Handler.from_backend(
        params.run_id,
        connect(params.endpoint),
        backend,
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        RendezvousTimeout(join=FOREVER, last_call=LAST_CALL),
        HEARTBEAT_S,
        limits.missed_heartbeats,
    )
    made.begin(limits, backend, pulses)
    return made


def connect(endpoint: str) -> TCPStore:
    """The store at HOST:PORT, which another process serves."""
    address, _, port = endpoint.rpartition(":")
    try:
        return TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    except RuntimeError as error:
        raise RendezvousConnectionError(f"no store answers at {endpoint}") from error


class RunEnded(RendezvousError):
    """The store says that all agents must end, with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the run ends with exit code {code}")
        self.code = code


class AnsweringBackend(C10dRendezvousBackend):
    """The round's state in a store. Notes when the store last answered, and raises RunEnded if the store says so."""

    def __init__(self, store: Store, run_id: str) -> None:
        super().__init__(store, run_id)
        self.store = store
        self.answered_s = time.monotonic()

    @property
    def name(self) -> str:
        """See base class."""
        return NAME

    def get_state(self) -> tuple[bytes, Token] | None:
        """See base class."""
        try:
            code = int(self.store.get(END)) if self.store.check([END]) else None
        except RuntimeError as error:
            raise RendezvousConnectionError("the store is gone") from error
        if code is not None:
            raise RunEnded(code)
        state = super().get_state()
        self.answered_s = time.monotonic()
        return state

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """See base class."""
        found = super().set_state(state, token)
        self.answered_s = time.monotonic()
        return found


class Handler(DynamicRendezvousHandler):
    """torch's rendezvous, which ends and restarts this host's ranks if that is needed."""

    def begin(
        self,
        limits: Limits,
        backend: AnsweringBackend,
        pulses: Path,
        ranks: Callable[[], list[psutil.Process]] = lambda: psutil.Process().children(),
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """Start to watch.

        Args:
            limits: the limits of the run.
            backend: holds the state of the rounds.
            pulses: the folder of the ranks' signs of life.
            ranks: the ranks of this host.
            end: ends the agent from another thread, because its own may be blocked.

        Raises:
            RuntimeError: torch has renamed the private name that is read here.
        """
        self._limits, self._backend, self._pulses, self._ranks, self._end = limits, backend, pulses, ranks, end
        self._rounds = self._failures = self._newest_step = 0
        self._members_changed = False
        self._ended = threading.Event()
        try:
            self._members = self._participants()
        except AttributeError as error:
            raise RuntimeError(f"this version of torch has no DynamicRendezvousHandler.{error.name}") from error
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round. Raises SystemExit if the run is over."""
        try:
            if self._rounds:
                self._refuse_useless_restart()
            else:
                self._await_all_hosts()

            pulse.forget(self._pulses)
            self._members_changed = False
            self._rounds += 1
            info = super().next_rendezvous()

        except RunEnded as end:
            raise SystemExit(EXIT_INTERRUPTED if end.code == EXIT_STOPPED else end.code) from None
        except RendezvousConnectionError:
            self._say("the supervisor is gone")
            raise SystemExit(EXIT_FAILURE) from None
        self._members = self._participants()
        return info

    def num_nodes_waiting(self) -> int:
        """More than 0 makes the agent restart its ranks: hosts are waiting, or lost. Raises SystemExit at the end."""
        try:
            waiting = super().num_nodes_waiting()
        except RunEnded as end:
            saved = self._stop_ranks(self._limits.save)
            raise SystemExit(EXIT_INTERRUPTED if end.code == EXIT_STOPPED and not saved else end.code) from None
        except RendezvousConnectionError:
            self._say("the supervisor is gone: this host's ranks save and end")
            saved = self._stop_ranks(self._limits.save)
            raise SystemExit(EXIT_STOPPED if saved else EXIT_FAILURE) from None

        # Ranks whose peers are gone cannot save: they may be inside a collective that never ends.
        lost = self._members - self._participants()
        if lost:
            self._say(f"{', '.join(sorted({node.addr for node in lost}))} left the round: this host's ranks restart")
            self._stop_ranks(self._limits.grace)
        self._members_changed |= bool(waiting or lost)
        return waiting + len(lost)

    def shutdown(self) -> bool:
        """End this agent. The others may go on: the supervisor ends them if the run is over."""
        self._ended.set()
        self._stop_heartbeats()
        return True

    def _participants(self) -> frozenset:
        return frozenset(self._state_holder.state.participants)

    def _await_all_hosts(self) -> None:
        """Let the first round begin with all hosts, not only with the fastest one."""
        store, deadline_s = self._backend.store, time.monotonic() + self._limits.gather
        store.add(STARTED, 1)
        while store.add(STARTED, 0) < self.settings.max_nodes and time.monotonic() < deadline_s:
            self._backend.get_state()
            time.sleep(LOOK_S)

    def _refuse_useless_restart(self) -> None:
        """End the run if a restart would only repeat what happened."""
        # Ranks that were left behind, while others went on without this host, do not count.
        super().num_nodes_waiting()  # reads the newest state
        code = pulse.final_code(self._pulses)
        if code is not None and self._this_node in self._participants():
            raise self._ended_run(code)
        if self._members_changed or pulse.was_stopped(self._pulses):
            return

        # This host's ranks failed. If a new step was reached, that is progress: the count of restarts begins again.
        newest = pulse.newest_step(self._pulses)
        if newest > self._newest_step:
            self._newest_step, self._failures = newest, 0
        self._failures += 1
        if self._failures > self._limits.restarts:
            self._say(f"{self._limits.restarts} restarts brought no step after {self._newest_step}: the run ends")
            raise self._ended_run(EXIT_FAILURE)
        self._say(f"a rank failed: restart {self._failures} of {self._limits.restarts} without a new step")

    def _ended_run(self, code: int) -> SystemExit:
        """Let all agents end with an exit code; returns the exception that ends this one."""
        with contextlib.suppress(RuntimeError):
            self._backend.store.compare_set(END, "", str(code))
        return SystemExit(code)

    def _watch(self) -> None:
        """Check, even if the agent is blocked, that the store answers and that each rank makes progress."""
        seen: dict[int, tuple[int, float]] = {}
        while not self._ended.wait(LOOK_S):
            if time.monotonic() - self._backend.answered_s > self._limits.lease:
                self._say(f"no answer from the supervisor for {self._limits.lease} s: this host's ranks end")
                saved = self._stop_ranks(self._limits.grace)
                shutil.rmtree(self._pulses, ignore_errors=True)  # os._exit would not do it
                self._end(EXIT_STOPPED if saved else EXIT_FAILURE)
                return
            for rank in self._ranks():
                if self._hangs(rank, seen):
                    self._say(f"process {rank.pid} did not get on for {self._limits.hang} s: it is killed")
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.kill()

    def _hangs(self, rank: psutil.Process, seen: dict[int, tuple[int, float]]) -> bool:
        """Whether a rank has shown no sign of life for too long, by this process's own clock."""
        sign, now_s = pulse.stamp(self._pulses, rank.pid), time.monotonic()
        if sign is None:
            return False
        known, since_s = seen.get(rank.pid, (None, now_s))
        if known != sign:
            seen[rank.pid] = sign, now_s
            return False
        return now_s - since_s > self._limits.hang

    def _stop_ranks(self, patience_s: float) -> bool:
        """End this host's ranks; returns whether all of them stopped with a checkpoint of the last step."""
        ranks = self._ranks()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        ended, left = psutil.wait_procs(ranks, timeout=patience_s)
        for rank in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(left, timeout=self._limits.grace)
        codes = {getattr(rank, "returncode", None) for rank in ended}
        return codes == {EXIT_STOPPED} and not left

    def _say(self, line: str) -> None:
        print(f"{HOST_SAYS}{line}", file=sys.stderr, flush=True)
