"""What tests do on a host with its own commands."""

import contextlib
from collections.abc import Iterator

from benchmarks.hosts import Hosts

TIMEOUT_S = 120.0


def on(hosts: Hosts, node: str, command: str) -> None:
    """Run a shell command on a host, to which the first one goes by ssh."""
    done = hosts.launch(["ssh", node, command], TIMEOUT_S)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def mounted(hosts: Hosts, node: str, mount: str, unmount: str) -> Iterator[None]:
    """A mount on a host, for a time."""
    on(hosts, node, mount)
    try:
        yield
    finally:
        on(hosts, node, unmount)
