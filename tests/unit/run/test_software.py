"""Hosts that train together: the same code and libraries, and the network interface that leads to each other."""

import hashlib
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.distributed import network
from ds_slm.errors import ConfigError, DeviceError
from ds_slm.run import software
from ds_slm.train import agreement

HOSTS = ["node1", "node2", "node2"]


def host(**changes: Any) -> dict[str, Any]:
    """What software.describe says of a host."""
    versions = {**dict.fromkeys(software.PACKAGES, "1.0"), "torch": "2.13.0+cpu", **changes.pop("versions", {})}
    found = {"commit": "c" * 40, "sources_sha256": "5" * 64, "script_sha256": "5" * 64}
    found |= {"python": "3.11.7", "torch_cuda": "none"}
    return {**found, "versions": versions, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"script_sha256": "6" * 64}, "the launched script"),
        ({"sources_sha256": "6" * 64}, "the source files of ds_slm"),
        ({"commit": "unknown", "sources_sha256": "6" * 64}, "the source files of ds_slm"),
        ({"python": "3.12.1"}, "Python"),
        *[({"versions": {name: "1.1"}}, name) for name in software.PACKAGES],
        ({"versions": {"bitsandbytes": None}}, "bitsandbytes"),
    ],
)
def test_a_host_with_other_software(changes: dict[str, Any], told: str) -> None:
    """Oracle: one sentence for one difference, with every host's value."""
    found = [host(), host(**changes), host(**changes)]
    (sentence,) = software.differences(HOSTS, found)
    assert sentence.startswith(f"the hosts differ in {told} (")
    assert "on node1" in sentence and "on node2" in sentence


def test_hosts_that_are_alike() -> None:
    """A tree outside of git is told by its sources; another build of torch, or device, is only noted."""
    other = host(commit="unknown", versions={"torch": "2.13.0+cu128"}, torch_cuda="12.8")
    assert software.differences(HOSTS, [host(), other, other]) == []
    assert software.notes(HOSTS, [host()] * 3, ["cpu"] * 3) == []
    device, build = software.notes(HOSTS, [host(), other, other], ["EPYC", "H200", "H200"])
    assert "(EPYC on node1; H200 on node2)" in device
    assert "2.13.0+cpu, CUDA none on node1; 2.13.0+cu128, CUDA 12.8 on node2" in build


@pytest.mark.parametrize("commit", ["d" * 40, "c" * 40 + "-dirty"])
def test_another_commit_of_the_same_sources_is_noted(commit: str) -> None:
    """Oracle: no difference, and one note with both; where the sources differ as well, two differences and no note."""
    found = [host(), host(commit=commit), host(commit=commit)]
    assert software.differences(HOSTS, found) == []
    (note,) = software.notes(HOSTS, found, ["cpu"] * 3)
    assert "the commit of ds_slm" in note and f"{commit} on node2" in note and "not in the source files" in note
    found = [host(), *2 * [host(commit=commit, sources_sha256="6" * 64)]]
    sources, commits = software.differences(HOSTS, found)
    assert "source files" in sources and "the commit of ds_slm" in commits
    assert software.notes(HOSTS, found, ["cpu"] * 3) == []


def test_the_launched_script_is_part_of_the_code(tmp_path: Path) -> None:
    """Oracle: the file's own hash; none for what is no file."""
    script = tmp_path / "mine.py"
    script.write_text("x = 1")
    assert software.script_sha256(script) == hashlib.sha256(b"x = 1").hexdigest()
    assert software.script_sha256(tmp_path) == software.UNKNOWN


class Meeting:
    """A rendezvous with a host that says something else of itself."""

    world = SimpleNamespace(rank=0, size=2, address="127.0.0.1", port=1)

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def arrive(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        other = {**message["software"], **self.changes}
        return [message, {**message, "host": "node2", "software": other}]


def test_hosts_that_differ_are_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nothing is recorded of equal hosts; refused with the way out; recorded where allowed."""
    monkeypatch.setenv(network.GLOO, "lo")
    equal: Any = Meeting()
    assert agreement.meet(equal, allow_mixed=False) == {"mixed_hosts": []}
    other: Any = Meeting(python="3.0.0", sources_sha256="6" * 64)
    with pytest.raises(ConfigError) as refused:
        agreement.meet(other, allow_mixed=False)
    for part, problem in zip(("source", "Python", "--allow-mixed"), refused.value.problems, strict=True):
        assert part in problem
    assert len(agreement.meet(other, allow_mixed=True)["mixed_hosts"]) == 2


def test_the_sources_are_told_apart(tmp_path: Path) -> None:
    """Oracle: two dirty trees of one commit differ; caches and notes make no difference."""
    for folder in software.SOURCES:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    seen = [software.sources_sha256(tmp_path)]
    (tmp_path / "ds_slm" / "__pycache__").mkdir()
    (tmp_path / "ds_slm" / "__pycache__" / "a.pyc").write_text("")
    (tmp_path / "README.md").write_text("")
    assert software.sources_sha256(tmp_path) == seen[0]
    (tmp_path / "sft" / "a.py").write_text("x = 2\n")
    seen.append(software.sources_sha256(tmp_path))
    (tmp_path / "sft" / "a.py").rename(tmp_path / "sft" / "b.py")
    seen.append(software.sources_sha256(tmp_path))
    (tmp_path / "ds_slm" / "a.cpp").write_text("")
    seen.append(software.sources_sha256(tmp_path))
    assert len(set(seen)) == 4


def test_the_commit_of_a_tree(tmp_path: Path) -> None:
    """Oracle: git itself; a copy within another repository has none."""
    root = tmp_path.resolve()
    assert software._commit(root) == software.UNKNOWN

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (root / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "--quiet", "--message", "one")
    assert software._commit(root) == git("rev-parse", "HEAD")
    (root / "a.py").write_text("x = 1")
    assert software._commit(root) == git("rev-parse", "HEAD") + "-dirty"
    (root / "inner").mkdir()
    assert software._commit(root / "inner") == software.UNKNOWN


Entry = namedtuple("Entry", "address")
INTERFACES = {
    "lo": [Entry("127.0.0.1"), Entry("::1")],
    "docker0": [Entry("172.17.0.1")],
    "eth0": [Entry("192.0.2.11"), Entry("fe80::1%eth0")],
}


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: INTERFACES)


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize(
    ("addresses", "gloo", "nccl"),
    [
        (["127.0.0.1", "127.0.0.1"], "lo", None),
        (["192.0.2.11", "192.0.2.12"], "eth0", "=eth0"),
        (["fe80::1", "fe80::2"], "eth0", "=eth0"),
        (["127.0.0.1", "192.0.2.12"], "eth0", "=eth0"),  # rank 0's name is 127.0.1.1 on its own host
        ([None, "192.0.2.12"], None, None),
        (["198.51.100.1", "192.0.2.12"], None, None),
    ],
)
def test_the_interface_that_leads_to_the_others(
    addresses: list[str | None], gloo: str | None, nccl: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the table of interfaces above."""
    monkeypatch.setattr(network, "address_towards", lambda host, port: "192.0.2.11")
    environ: dict[str, str] = {}
    assert network.choose(addresses, 0, is_cuda=True, environ=environ) == gloo
    assert (environ.get(network.GLOO), environ.get(network.NCCL)) == (gloo, nccl)


@pytest.mark.usefixtures("interfaces")
def test_what_the_user_names_stays() -> None:
    """Oracle: the environment as the user made it, gloo's interface from it, and no complaint."""
    environ = {network.GLOO: "docker0", network.NCCL: "^docker"}
    assert network.choose(["192.0.2.11", "192.0.2.12"], 0, is_cuda=True, environ=environ) == "docker0"
    assert environ == {network.GLOO: "docker0", network.NCCL: "^docker"}
    network.refuse_unknown_interfaces(environ)
    network.refuse_unknown_interfaces({})


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize("name", [network.GLOO, network.NCCL])
@pytest.mark.parametrize("value", ["eth9", "eth9,wlan0", "=eth"])
def test_an_interface_that_is_not_there_is_said(name: str, value: str) -> None:
    """Oracle: the variable, its value, and the interfaces there are."""
    with pytest.raises(DeviceError, match=rf"{name}={value}: .*there are lo, docker0, eth0\. Name one"):
        network.refuse_unknown_interfaces({name: value})


def test_the_way_to_this_machine() -> None:
    """Oracle: the real table of interfaces."""
    assert network.address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.own_address("nowhere.invalid", 9) is None
