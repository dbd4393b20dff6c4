"""The key-value store of a launch: rank 0 serves it from the start, and the other ranks connect to it.

It is torch's own TCPStore, on the port of the later process group: `init_process_group` shares the server. No call
waits for a key, so a thread can share it. The store of another launch at the same port is refused.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from ds_slm.distributed.world import World, launcher
from ds_slm.errors import DeviceError


@dataclass(frozen=True)
class Intervals:
    """How long ranks wait for each other, in seconds."""

    poll_s: float = 0.25
    """Time between two looks into the store while a rank waits for the others."""
    beat_s: float = 1.0
    """Time between two heartbeats of a rank that does something else."""
    first_word_s: float = 10.0
    """The first line on who waits for whom comes after this time, the next lines every `word_every_s`."""
    word_every_s: float = 60.0
    connect_s: float = 600.0
    """A rank must connect within this time: it does so before it prepares anything."""
    silent_s: float = 120.0
    """A rank whose heartbeat stands still for this time counts as dead."""
    together_s: float = 3.0
    """For this time the first rank that fails collects the others' problems, to print all of them at once."""
    come_out_s: float = 5.0
    """The main thread's time to end by itself once another rank has failed."""
    linger_s: float = 30.0
    """For this time a failure before the ranks have met is kept for ranks that are still starting."""
    interrupted_s: float = 0.5
    """The same time if the failure is a user's interruption, because users should not have to wait."""


class Store:
    """Keys and counters that all ranks of a launch see."""

    def __init__(self, world: World, intervals: Intervals) -> None:
        """Serve it if this is rank 0 and torchrun's agent does not; otherwise connect to the server.

        Raises:
            DeviceError: the port is taken, or serves another launch.
        """
        import torch.distributed as dist

        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = world.rank == 0 and not agent_serves

        try:
            store = dist.TCPStore(
                world.address,
                world.port,
                world.size,
                is_master=serves,
                timeout=timedelta(seconds=intervals.connect_s),
                wait_for_workers=False,
                multi_tenant=not agent_serves,
            )
        except dist.DistNetworkError as error:
            if serves and _is_taken(world.port):
                raise DeviceError(taken(world)) from error
            raise DeviceError(f"{world.master}: {first_line(error)}; look into the other hosts' output.") from error

        # If torchrun's agent serves, a restart finds the keys of the attempt before. Otherwise each attempt has its own
        # store, and agents may count their restarts differently.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_serves else "0"
        self._store = dist.PrefixStore(f"ds_slm/{attempt}", store)
        self._claim(world, serves or world.rank == 0, intervals)

    def _claim(self, world: World, is_first: bool, intervals: Intervals) -> None:
        """Register this rank; refuse a launch of another size or launcher, and a rank that is registered already."""
        host, above = socket.gethostname(), launcher()
        own = above.pid if above else None
        if is_first:
            self.set("size", str(world.size))
            self.set("launcher", json.dumps([host, own]))
        wait_until(lambda: self.has("launcher"), intervals.connect_s, intervals.poll_s)
        size, (their_host, theirs) = int(self.get("size")), json.loads(self.get("launcher"))
        other_launcher = their_host == host and None not in (theirs, own) and theirs != own
        if size != world.size or other_launcher or self.count(f"claim/{world.rank}", 1) > 1:
            raise DeviceError(taken(world))

    def set(self, name: str, value: str) -> None:
        """Give a key its value."""
        self._store.set(name, value)

    def get(self, name: str) -> str:
        """The value of an existing key."""
        return self._store.get(name).decode()

    def set_bytes(self, name: str, value: bytes) -> None:
        """Give a key a value that is not text."""
        self._store.set(name, value)  # pyright: ignore[reportArgumentType] - the binding takes both

    def get_bytes(self, name: str) -> bytes:
        """The value of an existing key, as bytes."""
        return self._store.get(name)

    def delete(self, name: str) -> None:
        """Forget a key."""
        self._store.delete_key(name)

    def has(self, name: str) -> bool:
        """Whether a key is there."""
        return self._store.check([name])

    def count(self, name: str, more: int = 0) -> int:
        """Add `more` to a counter; returns its value."""
        return self._store.add(name, more)


def await_server(
    world: World, intervals: Intervals, is_needless: Callable[[float], bool], say: Callable[[str], None]
) -> bool:
    """Wait until something listens at rank 0's address; says so meanwhile.

    Args:
        world: this process among all; rank 0 does not wait.
        intervals: how long to wait, and when to print a line.
        is_needless: gets the seconds waited; whether to give up silently.
        say: prints a line for the user.

    Returns:
        False if it became needless.

    Raises:
        DeviceError: the name is unknown, or nothing listened in time.
    """
    if world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True

    began_s = time.monotonic()
    next_word_s = intervals.first_word_s
    me = f"rank {world.rank} on {socket.gethostname()}"
    while not is_needless(time.monotonic() - began_s):
        # An unknown host name may become known: wait for it, but not as long as for a server that is not up yet.
        try:
            with socket.create_connection((world.address, world.port), timeout=5.0):
                return True
        except socket.gaierror as error:
            reason, patience_s = f"{world.address!r} is not a known host name: {error.strerror}", intervals.linger_s
        except OSError as error:
            reason, patience_s = f"{error.strerror or error}", intervals.connect_s

        waited_s = time.monotonic() - began_s
        if waited_s > patience_s:
            raise DeviceError(
                f"the {world.size} ranks did not meet: {me} found nobody at {world.master}, where rank 0 should listen "
                f"({reason}). Look into the output of rank 0's host, and whether this host reaches that address; "
                "MASTER_ADDR and MASTER_PORT may be those of an earlier launch."
            )
        if waited_s >= next_word_s:
            say(f"{me} waits for rank 0 at {world.master}, {waited_s:.0f} s so far ({reason})")
            next_word_s += intervals.word_every_s

        time.sleep(intervals.poll_s)

    return False


def wait_until(condition: Callable[[], bool], limit_s: float, poll_s: float) -> bool:
    """Whether a condition held within a time."""
    deadline_s = time.monotonic() + limit_s
    while not (holds := condition()) and time.monotonic() < deadline_s:
        time.sleep(poll_s)
    return holds


def taken(world: World) -> str:
    """The message about a port that another program uses."""
    return (
        f"{world.master} is in use, perhaps by another launch on this machine: name another port, --master_port 29501 "
        "(where `deepspeed` is typed, it stands before the script)."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
