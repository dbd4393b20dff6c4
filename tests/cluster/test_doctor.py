"""`ds-slm doctor` on two real hosts: all is well, and faults that are really there. Part of `make cluster-test`.

Every fault is made with the system's own means on one host, several independent ones at a time. The oracle is the list
of what was made: nothing more is a failure, and each says how it is mended.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pydantic
import pytest

from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import TwoHosts
from ds_slm.recipe import loading
from tests.cluster.commands import mounted, on

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE, RUN = "runs/small.toml", "runs/small"
DOCTOR = ["ds-slm", "doctor", "--hostfile", "hostfiles/two_node", "--recipe", RECIPE]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts, each with the recipe, its text and the same prepared data in folders of its own."""
    if problems := missing_requirements():
        pytest.fail("two hosts cannot be made here. " + " ".join(problems), pytrace=False)
    with TwoHosts(CHECKOUT, tmp_path_factory.mktemp("hosts")) as two_hosts:
        for node in two_hosts.nodes:
            write_recipe(two_hosts.runs(node))
        done = two_hosts.launch(["ds-slm", "prepare", RECIPE], TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        shutil.copytree(two_hosts.data("node1"), two_hosts.data("node2"), dirs_exist_ok=True)
        yield two_hosts


def write_recipe(runs: Path, *overrides: str) -> None:
    """A small recipe, and text for it, where each host has its own."""
    (runs / "texts").mkdir(exist_ok=True)
    for number in range(20):
        sentences = (f"Sentence number {number * place} of a small text.\n\n" for place in range(100))
        (runs / "texts" / f"{number}.txt").write_text("".join(sentences))
    source = ["data.source.0.kind=files", "data.source.0.path=runs/texts", "data.val_fraction=0.2"]
    shape = ["tokenizer.vocab_size=300", "model.vocab_size=300"]
    (runs / "small.toml").write_text(loading.to_toml(loading.load("demo", [*source, *shape, *overrides])))


def failures(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """What is not well, by what it is about. Fails where the command did not end as one that has found it."""
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("FAILURE"):
            _, about, said = line.split(maxsplit=2)
            found.setdefault(about, []).append(said)
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(done.stdout)
    return found


def etc(hosts: TwoHosts, node: str, name: str) -> Path:
    """One of a host's own settings."""
    return hosts.runs(node).parent / "etc" / name


@contextlib.contextmanager
def edited(path: Path, before: bytes, after: bytes) -> Iterator[None]:
    """A file with some other bytes for a time; the same file, since it may be mounted somewhere."""
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))
    try:
        yield
    finally:
        path.write_bytes(content)


def sshd(hosts: TwoHosts, node: str) -> psutil.Process:
    """The host's server."""
    settings = str(etc(hosts, node, "sshd_config"))
    return next(one for one in psutil.process_iter(["cmdline"]) if settings in (one.info["cmdline"] or []))


@contextlib.contextmanager
def without_forwarding(hosts: TwoHosts, node: str) -> Iterator[None]:
    """The host's server does not forward ports."""
    settings = etc(hosts, node, "sshd_config")
    started = settings.parent.parent / "sshd.pid"

    def reload() -> None:
        started.unlink()
        sshd(hosts, node).send_signal(signal.SIGHUP)
        while not started.exists():  # written when it listens
            time.sleep(0.02)

    try:
        with edited(settings, b"UseDNS no", b"UseDNS no\nAllowTcpForwarding no"):
            reload()
            yield
    finally:
        reload()


@contextlib.contextmanager
def firewall(hosts: TwoHosts, node: str, other: str) -> Iterator[None]:
    """Of all that the host sends to another one over TCP, only its sshd's words get out."""
    rules = ["prio 10 ipproto tcp sport 22 lookup main", f"prio 11 to {other} ipproto tcp blackhole"]
    on(hosts, node, "; ".join(f"ip rule add {rule}" for rule in rules))
    yield
    on(hosts, node, "ip rule del prio 11; ip rule del prio 10")


@contextlib.contextmanager
def launched(run: Path) -> Iterator[None]:
    """A launch that lives, as its lock shows it."""
    (run / "logs").mkdir(parents=True)
    with (run / "logs" / ".launch-0123.lock").open("w") as sign:
        sign.write(json.dumps({"generation": 1, "id": "0123", "host": "node2", "pid": 77, "began": "today"}))
        sign.flush()
        fcntl.flock(sign, fcntl.LOCK_EX)
        yield
    shutil.rmtree(run)


def test_hosts_that_are_well(hosts: TwoHosts) -> None:
    """Exit code 0, one line a finding, under 15 seconds, though each host's own name means 127.0.1.1 to it."""
    done = hosts.launch([*DOCTOR, "--json"], TIMEOUT_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(done.stdout)
    print(f"two hosts in {found['seconds']} s")
    assert found["fit"] and found["seconds"] < 15

    said = {one["about"]: one["said"] for one in found["findings"]}
    assert {one["level"] for one in found["findings"]} <= {"ok", "warning"}
    assert "eth0 (192.0.2.11)" in said["interface"] and "eth0 (192.0.2.12)" in said["interface"]
    assert "127.0.1.1" in said["names"]
    assert said["data"].startswith("small: the same ")
    expected = (
        "programs ssh python versions slots clocks names network all-reduce forwarding launches recipe data disk memory"
    )
    assert set(expected.split()) <= set(said)


def test_faults_of_what_a_run_reads_and_writes(hosts: TwoHosts) -> None:
    """On node2: another recipe, a changed shard, a read-only run folder, a full home; and a bad variable."""
    shard = next(hosts.data("node2").rglob("train-*.bin"))
    recipe = hosts.runs("node2") / "small.toml"
    home, runs = hosts.runs("node2").parent / "home", CHECKOUT / "runs"
    fill = f"mount -t tmpfs -o size=64k tmpfs {home} && head -c 64k /dev/zero > {home}/full"

    with (
        edited(recipe, b"\nseed = 1337", b"\nseed = 7"),
        edited(shard, shard.read_bytes()[:2], b"\x11\x00"),
        mounted(hosts, "node2", f"mount -o remount,bind,ro {runs}", f"mount -o remount,bind,rw {runs}"),
        mounted(hosts, "node2", fill, f"umount -l {home}"),
    ):
        found = failures(hosts.launch(DOCTOR, TIMEOUT_S, env={"# NCCL_DEBUG": "INFO"}))

    assert set(found) == {"variables", "recipe", "data", "disk"}
    (variable,), (differs,), (changed,) = found["variables"], found["recipe"], found["data"]
    full_home, read_only = found["disk"]
    assert "comments out the whole launch" in variable
    assert "the hosts differ in runs/small.toml" in differs and "copy the right one" in differs
    assert "node2: data/small/" in changed and "was changed" in changed and "prepare again" in changed
    assert "its home" in full_home and "No space left on device" in full_home
    assert "node2" in read_only and "Read-only file system" in read_only and "--run-dir" in read_only


def test_a_host_without_the_project_or_with_a_broken_package_says_so(hosts: TwoHosts) -> None:
    """On node2 an empty folder hides pydantic first, then the project's code. Oracle: one failure each, and no more."""
    for folder, about, part in (
        (Path(pydantic.__file__).parent, "launches", "from 'pydantic' (unknown location): `make setup` there"),
        (CHECKOUT / "ds_slm", "checkout", f"node2 has no {CHECKOUT}"),
    ):
        with mounted(hosts, "node2", f"mount -t tmpfs tmpfs {folder}", f"umount -l {folder}"):
            found = failures(hosts.launch(DOCTOR, TIMEOUT_S))
        assert list(found) == [about]
        (said,) = found[about]
        assert part in said


def test_faults_between_the_hosts(hosts: TwoHosts) -> None:
    """A firewall and no forwarding on node2, where node1's name means somebody else; and a launch that lives there."""
    names = etc(hosts, "node2", "hosts")
    with (
        edited(names, b"192.0.2.11 node1", b"192.0.2.99 node1"),
        without_forwarding(hosts, "node2"),
        firewall(hosts, "node2", "192.0.2.11"),
        launched(hosts.runs("node2") / "small"),
    ):
        found = failures(hosts.launch(DOCTOR, TIMEOUT_S))

    assert set(found) == {"names", "network", "forwarding", "launches"}
    (name,), (forwarding,), (launch,) = found["names"], found["forwarding"], found["launches"]
    assert "on node2 the name node1 means 192.0.2.99" in name
    assert "write `192.0.2.11 node1` in /etc/hosts of node2" in name
    assert [said.partition(" (")[0] for said in sorted(found["network"])] == [
        "node1 cannot connect to node2",
        "node2 cannot connect to node1",
    ]
    assert "node2" in forwarding and "AllowTcpForwarding yes" in forwarding
    assert "node2, process 77, since today" in launch and "--run-dir" in launch


def test_hosts_that_do_not_answer_are_named_within_5_seconds(hosts: TwoHosts, tmp_path: Path) -> None:
    """node2's sshd is stopped, node9 does not exist, 192.0.2.77 is nobody's. The rest is looked at nevertheless.

    The seconds are counted from the first line, before which Python starts.
    """
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in ("node1", "node2", "node9", "192.0.2.77")))
    stamped = 'while read -r line; do echo "$(date +%s.%N) $line"; done'
    command = f"{{ ds-slm doctor --hostfile {hostfile}; echo exit $?; }} | {stamped}"

    server = sshd(hosts, "node2")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        done = hosts.launch(["sh", "-c", command], TIMEOUT_S)
    finally:
        os.kill(server.pid, signal.SIGCONT)

    stamps, lines = zip(*(line.split(maxsplit=1) for line in done.stdout.splitlines()), strict=True)
    print("\n".join(lines))
    named = {line.split()[2]: float(stamp) for stamp, line in zip(stamps, lines, strict=True) if "FAILURE" in line}
    assert set(named) == {"node2:", "node9:", "192.0.2.77:"}
    assert max(named.values()) - float(stamps[0]) < 5
    assert any("there is no host of that name" in line for line in lines)
    assert any(line.startswith("ok") and "versions" in line and line.endswith("on node1") for line in lines)
    assert lines[-1] == "exit 2"
