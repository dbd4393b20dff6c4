"""Hosts on one machine, real enough for `deepspeed --hostfile hostfiles/two_node` typed on the first of them.

    the machine         this process ── Hosts
                                          │ unshare, nsenter
    namespaces      node1 ──eth0── switch (a bridge) ──eth0── node2
                    sshd             no process but itself     sshd

Each host has its own network, host name, process list, System V IPC, /dev/shm, home, /run, /etc/hosts and ssh settings,
and its own `runs/` and `data/` mounted over those of the checkout. The checkout, the Python environment and /tmp are
shared, as if every host had them at the same paths.

A host can lose its power without any message, and get it back; its cable can be cut, and mended.

The machine itself does not change: bridge, addresses, mounts and ssh settings live in unnamed namespaces. They end with
their processes, which end with this process, even if it is killed. If `runs/` and `data/` are missing in the checkout,
they are made as places to mount on, and removed again.

Known gaps: /sys shows the machine's devices; /tmp (with torch's compile cache) and the clock are shared; each host may
use all cores (OMP_NUM_THREADS asks for one thread); because hosts have their own homes, they compile any DeepSpeed op
again. Needs root, and the programs that `host_tools.missing_requirements` names.
"""

import contextlib
import math
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from benchmarks.host_tools import UNSHARE, run, search_path, which

# A network reserved for documentation (RFC 5737): no real host answers on it.
ADDRESSES = {"node1": "192.0.2.11", "node2": "192.0.2.12"}
_ALL_ADDRESSES = {**ADDRESSES, "node3": "192.0.2.13", "head": "192.0.2.14"}
_PREFIX_LENGTH = 24
_INTERFACE = "eth0"
_START_DEADLINE_S = 30.0
_UNLIMITED_PACKETS = 100_000
_BURST_S, _QUEUE_S = 1e-3, 5.0
"""For a limited cable: what may pass at once after a pause, and what waits, so that hosts do not lose packets."""

# This runs inside a host's new namespaces as their first process. $HOST names the folder of the host's own files.
_BOOT = """
set -e
hostname "$NODE"
mount -t tmpfs tmpfs /dev/shm
[ -d /run/sshd ] || { mount -t tmpfs tmpfs /run; mkdir /run/sshd; }
if [ -d "$USER_SSH" ]; then mount -t tmpfs tmpfs "$USER_SSH"; fi
mount --bind "$HOST/etc/hosts" /etc/hosts
mount --bind "$HOST/etc/ssh_config" /etc/ssh/ssh_config
mount --bind "$HOST/etc/shadow" /etc/shadow
mount --bind "$HOST/runs" "$CHECKOUT/runs"
mount --bind "$HOST/data" "$CHECKOUT/data"
exec "$SSHD" -D -E "$HOST/sshd.log" -f "$HOST/etc/sshd_config"
"""

_SSHD_CONFIG = """
ListenAddress 0.0.0.0
HostKey {key}
AuthorizedKeysFile {key}.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
SetEnv {environment}
"""

_SSH_CONFIG = """
Host *
    User root
    IdentityFile {key}
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


@dataclass
class _Namespaces:
    """A process of ours, and the namespaces in which it was started."""

    process: subprocess.Popen[bytes]
    name: str
    first_pid: int = field(default=0)
    """The first process of its process list, as this machine numbers it."""


class Hosts:
    """Some hosts, for the time of a `with` block. Launches are typed on the first one."""

    def __init__(self, checkout: Path, workdir: Path, nodes: tuple[str, ...]) -> None:
        """Nothing is started before the `with` block.

        Args:
            checkout: the folder in which launches are typed; its `runs/` and `data/` are replaced on each host.
            workdir: an empty folder for the hosts' own files, kept afterwards; no spaces in its path.
            nodes: the hosts' names: node1, node2, node3 or head.
        """
        self.nodes = nodes
        self._checkout = checkout.resolve()
        self._workdir = workdir.resolve()
        self._hosts: dict[str, _Namespaces] = {}
        self._switch: _Namespaces | None = None
        self._made: list[Path] = []
        self._launches = 0

    def runs(self, node: str) -> Path:
        """The folder that the host sees as CHECKOUT/runs."""
        return self._folder(node) / "runs"

    def data(self, node: str) -> Path:
        """The folder that the host sees as CHECKOUT/data."""
        return self._folder(node) / "data"

    def launch(
        self, argv: list[str], timeout_s: float, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as if typed on the first host in the checkout, and wait for it.

        Args:
            argv: the command, unchanged.
            timeout_s: after this time every process on all hosts except sshd is ended.
            env: more environment, for the command and, through DeepSpeed's environment file, for all hosts' ranks.

        Raises:
            subprocess.TimeoutExpired: with the output until then.
        """
        process = self.start(argv, subprocess.PIPE, subprocess.PIPE, env)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:
            self.end_processes()
            output, errors = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise subprocess.TimeoutExpired(argv, timeout_s, output, errors) from None
            raise
        return subprocess.CompletedProcess(argv, process.returncode, output, errors)

    def start(
        self, argv: list[str], output: int | IO[str], errors: int | IO[str], env: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command as if typed on the first host in the checkout; see `launch`."""
        self._launches += 1
        variables = self._workdir / f"deepspeed_env-{self._launches}"
        variables.write_text("".join(f"{key}={value}\n" for key, value in (env or {}).items()))
        first = self.nodes[0]
        return subprocess.Popen(
            # A working folder given to nsenter would be the machine's, in which nothing is mounted on runs/.
            self._enter(first, "sh", "-c", 'cd "$0" && exec "$@"', str(self._checkout), *argv),
            env={**self._environment(first), "DS_ENV_FILE": str(variables), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            errors="replace",
        )

    def power_off(self, node: str) -> None:
        """Turn a host's power off: first cut the cable, so that no message of its end leaves it."""
        assert self._switch is not None
        self._ip(self._switch.first_pid, "link", "delete", node)
        host = self._hosts.pop(node)
        os.kill(host.first_pid, signal.SIGKILL)
        host.process.wait()

    def power_on(self, node: str) -> None:
        """Start a host again with its old disk. Returns when it can be reached."""
        (self._folder(node) / "sshd.pid").unlink(missing_ok=True)
        self._start_host(node)
        self._await(f"sshd of {node} to listen", (self._folder(node) / "sshd.pid").exists)

    def cut(self, node: str) -> None:
        """Cut a host's cable in the middle, so that neither end notices."""
        assert self._switch is not None
        self._ip(self._switch.first_pid, "link", "set", node, "nomaster")

    def mend(self, node: str) -> None:
        """Mend the cable."""
        assert self._switch is not None
        self._ip(self._switch.first_pid, "link", "set", node, "master", "bridge")

    def limit(self, node: str, gbit_per_s: float) -> None:
        """Limit what a host sends, like a slower cable; `math.inf` removes the limit.

        Limits at both ends act like a limit of the cable.
        """
        if math.isinf(gbit_per_s):
            shaping = f"qdisc replace dev {_INTERFACE} root pfifo limit {_UNLIMITED_PACKETS}"
            self._ip(self._hosts[node].first_pid, *shaping.split(), program="tc")
            return

        rate = f"rate {gbit_per_s * 1e9:.0f}bit burst {gbit_per_s * 1e9 / 8 * _BURST_S:.0f}"
        shaping = f"qdisc replace dev {_INTERFACE} root tbf {rate} latency {_QUEUE_S * 1000:.0f}ms"
        self._ip(self._hosts[node].first_pid, *shaping.split(), program="tc")

    def sent_bytes(self, node: str) -> int:
        """Bytes that a host has sent since it started, including headers."""
        counters = Path(f"/proc/{self._hosts[node].first_pid}/net/dev").read_text()
        return int(counters.partition(f"{_INTERFACE}:")[2].split()[8])

    def processes(self, node: str) -> list[psutil.Process]:
        """The host's processes except its sshd: what launches have left running."""
        first_pid = self._hosts[node].first_pid
        namespace = os.readlink(f"/proc/{first_pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if process.pid != first_pid and os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found.append(process)
        return found

    def end_processes(self) -> None:
        """End every process on all hosts except their sshd."""
        left = [process for node in self._hosts for process in self.processes(node)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def __enter__(self) -> Self:
        """Start all hosts; returns when each can reach the others by ssh."""
        try:
            self._start()
        except BaseException as error:
            self._stop()
            for log in sorted(self._workdir.glob("*/*.log")):
                error.add_note(f"{log}:\n{log.read_text()}")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End every process of all hosts; their namespaces, mounts and network go with them."""
        self._stop()

    def _start(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        for name in ("runs", "data"):
            if not (self._checkout / name).exists():
                (self._checkout / name).mkdir()
                self._made.append(self._checkout / name)
        key = self._workdir / "ssh_key"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        self._start_switch()
        for node in self.nodes:
            self._write_files(node, key)
            self._start_host(node)
        for node in self.nodes:
            self._await(f"sshd of {node} to listen", (self._folder(node) / "sshd.pid").exists)
        for node in self.nodes:
            for other in self.nodes:
                run(*self._enter(node, "ssh", other, "true"))

    def _stop(self) -> None:
        started = [*self._hosts.values(), *([self._switch] if self._switch else [])]
        for namespaces in started:
            # When a host's first process ends, all its processes end; `unshare` waits for that.
            with contextlib.suppress(ProcessLookupError):
                os.kill(namespaces.first_pid or namespaces.process.pid, signal.SIGKILL)
        for namespaces in started:
            namespaces.process.wait()
        self._hosts.clear()
        self._switch = None
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()

    def _start_switch(self) -> None:
        """Start a separate network with the bridge that joins the hosts."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._switch = _Namespaces(process, "switch", process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        self._ip(process.pid, "link", "add", "bridge", "type", "bridge")
        self._ip(process.pid, "link", "set", "bridge", "up")

    def _start_host(self, node: str) -> None:
        folder = self._folder(node)
        variables = {
            "PATH": search_path(),
            "NODE": node,
            "HOST": str(folder),
            "CHECKOUT": str(self._checkout),
            "USER_SSH": str(Path(pwd.getpwuid(0).pw_dir) / ".ssh"),
            "SSHD": str(which("sshd")),
        }
        with (folder / "boot.log").open("wb") as log:
            process = subprocess.Popen(
                [*UNSHARE, "sh", "-c", _BOOT], env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        host = self._hosts[node] = _Namespaces(process, node)
        self._await(f"the first process of {node}", lambda: _first_child(host))
        self._connect(node)

    def _connect(self, node: str) -> None:
        """Lay a cable from the host's eth0 to the switch."""
        assert self._switch is not None
        switch, host = self._switch.first_pid, self._hosts[node].first_pid
        # The card's address must not change when the host starts again, because the others remember it for a while.
        card = f"02:00:00:00:00:{_ALL_ADDRESSES[node].rpartition('.')[2]}"
        peer = ["peer", "name", _INTERFACE, "address", card, "netns", str(host)]
        self._ip(switch, "link", "add", node, "type", "veth", *peer)
        self._ip(switch, "link", "set", node, "master", "bridge", "up")
        self._ip(host, "link", "set", "lo", "up")
        self._ip(host, "address", "add", f"{_ALL_ADDRESSES[node]}/{_PREFIX_LENGTH}", "dev", _INTERFACE)
        self._ip(host, "link", "set", _INTERFACE, "up")

    def _write_files(self, node: str, key: Path) -> None:
        folder = self._folder(node)
        for name in ("etc", "home", "runs", "data"):
            (folder / name).mkdir(parents=True)
        names = "".join(f"{address} {name}\n" for name, address in _ALL_ADDRESSES.items())
        environment = " ".join(f"{name}={value}" for name, value in self._environment(node).items())
        files = {
            "hosts": f"127.0.0.1 localhost\n127.0.1.1 {node}\n{names}",  # as Debian writes it
            "ssh_config": _SSH_CONFIG.format(key=key),
            "sshd_config": _SSHD_CONFIG.format(key=key, folder=folder, environment=environment),
            # No password, but not locked either: sshd without PAM lets nobody into a locked account, key or not.
            "shadow": "root:*:19000:0:99999:7:::\n",
        }
        for name, text in files.items():
            (folder / "etc" / name).write_text(text)

    def _environment(self, node: str) -> dict[str, str]:
        """The environment of a login on the host: its own home, one thread."""
        return {
            "PATH": search_path(),
            "HOME": str(self._folder(node) / "home"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }

    def _folder(self, node: str) -> Path:
        assert node in self.nodes, node
        return self._workdir / node

    def _enter(self, node: str, *argv: str) -> list[str]:
        pid = self._hosts[node].first_pid
        return ["nsenter", "--target", str(pid), "--net", "--uts", "--ipc", "--mount", "--pid", *argv]

    def _ip(self, pid: int, *arguments: str, program: str = "ip") -> None:
        run("nsenter", "--target", str(pid), "--net", program, *arguments)

    def _await(self, what: str, condition: Callable[[], object]) -> None:
        """Poll until the condition holds; fails at the deadline or when a host has ended."""
        deadline = time.monotonic() + _START_DEADLINE_S
        while not condition():
            ended = [host.name for host in self._hosts.values() if host.process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"waited for {what}; ended meanwhile: {', '.join(ended) or 'none'}")
            time.sleep(0.02)


class TwoHosts(Hosts):
    """The hosts of `hostfiles/two_node`: node1 and node2."""

    def __init__(self, checkout: Path, workdir: Path) -> None:
        super().__init__(checkout, workdir, ("node1", "node2"))


def _first_child(host: _Namespaces) -> bool:
    """Note the host's first process once it is started; returns whether it is."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(host.process.pid).children()
        host.first_pid = children[0].pid if children else 0
    return host.first_pid != 0
