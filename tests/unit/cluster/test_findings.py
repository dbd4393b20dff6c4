"""What a doctor makes of injected facts, finding by finding. Oracle: the one thing that is wrong."""

from typing import Any

import pytest

from ds_slm.cluster import content_findings, findings, link_findings
from ds_slm.cluster.content_findings import Needs
from ds_slm.cluster.findings import Finding
from ds_slm.cluster.hostfile import Host

PYTHON, CHECKOUT, FOLDER = "/opt/ds_slm/.venv/bin/python", "/opt/ds_slm", "/opt/runs"
HOSTS = [Host("node1", 2), Host("node2", 2)]
GB = 10**9
ADDRESSES = {"node1": ["192.0.2.11"], "node2": ["192.0.2.12"]}


def described(**changes: Any) -> dict[str, dict[str, Any]]:
    """Two hosts that are well, but for what is changed on node2."""
    folder = {"path": "runs/demo", "place": "/opt/runs", "free_bytes": 50 * GB, "problem": None}
    answer = {
        "identity": "boot net",
        "addresses": ADDRESSES["node1"],
        "python": {"executable": PYTHON, "version": "3.11.7"},
        "checkout": True,
        "folder": True,
        "folders": {name: dict(folder) for name in ("run", "data", "home")},
        "memory_bytes": 20 * GB,
        "cores": 4,
        "gpus": 0,
        "python_header": True,
        "ninja": True,
    }
    return {"node1": answer, "node2": {**answer, "identity": "boot other", **changes}}


def installed(**changes: Any) -> dict[str, dict[str, Any]]:
    """Their software, but for what is changed on node2."""
    answer = {
        "commit": "c" * 40, "sources_sha256": "5" * 64, "script_sha256": "unknown", "python": "3.11.7",
        "versions": dict.fromkeys(
            ("torch", "deepspeed", "transformers", "tokenizers", "bitsandbytes", "numpy", "safetensors"), "1.0"
        ),
        "torch_cuda": "none", "compilers": {"cpu": "/usr/bin/g++", "cuda": "/usr/bin/gcc"},
    }  # fmt: skip
    return {"node1": answer, "node2": {**answer, **changes}}


def assert_only(found: list[Finding], level: str, *parts: str) -> Finding:
    """The one finding, of a level, that says some words; one that is not well says how it is mended."""
    (finding,) = found
    assert finding.level == level, finding
    assert all(part in f"{finding.said}: {finding.mend}" for part in parts), finding
    assert finding.level == "ok" or finding.mend
    return finding


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("root@node2: Permission denied (publickey).", ["ssh-copy-id node2"]),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            ["ssh-keygen -R node2"],
        ),
        ("No ED25519 host key is known\nHost key verification failed.", ["ssh-keyscan node2"]),
        ("ssh: Could not resolve hostname node2: Name or service not known", ["correct the hostfile", "/etc/hosts"]),
        ("ssh: connect to host node2 port 22: Connection refused", ["systemctl start ssh"]),
        ("ssh: connect to host node2 port 22: Connection timed out", ["ping node2"]),
        ("Connection timed out during banner exchange", ["ping node2"]),
        ("ssh: connect to host node2 port 22: No route to host", ["ping node2"]),
        ("kex_exchange_identification: read: Connection reset by peer", ["Connection reset by peer", "ssh node2 true"]),
        ("", ["without a word"]),
    ],
)
def test_each_failure_of_ssh_has_its_own_way_out(said: str, parts: list[str]) -> None:
    """Oracle: OpenSSH's own messages."""
    assert_only([findings.of_ssh("node2", said)], "failure", "node2", *parts)


def test_the_user_of_a_host_is_not_part_of_its_name() -> None:
    """Oracle: ssh-keygen knows hosts, ssh-copy-id takes the user too."""
    assert "ssh-keygen -R node2`" in findings.of_ssh("ann@node2", "REMOTE HOST IDENTIFICATION HAS CHANGED!").mend
    assert "ssh-copy-id ann@node2" in findings.of_ssh("ann@node2", "Permission denied").mend


def test_a_missing_program_is_named_with_its_package() -> None:
    """Oracle: Debian's package of ssh, which has another name than the program; with both programs all is well."""
    packages = {"ssh": "openssh-client", "pdsh": "pdsh"}
    found = findings.of_programs({"ssh": None, "pdsh": "/usr/bin/pdsh"}, packages)
    assert_only(found, "failure", "ssh not installed here", "`apt-get install openssh-client`")
    assert_only(findings.of_programs(dict.fromkeys(packages, "/usr/bin/x"), packages), "ok")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "blank"),
        ("# NCCL_DEBUG=INFO", "comments out the whole launch"),
        ("# only words", "traceback"),
        ("export A=1", "`export A`"),
        ("A=one two", "A='...'"),
        ("A=1 # why", "A='...'"),
    ],
)
def test_traps_in_the_file_of_variables(line: str, part: str) -> None:
    """Oracle: what DeepSpeed's launcher makes of the line, `export {LINE}` for the remote shell."""
    found = findings.of_environment_file(".deepspeed_env", f"NCCL_DEBUG=INFO\n{line}\nB=2\n")
    assert_only(found, "failure", "line 2", part)


def test_variables_that_reach_the_hosts_are_fine() -> None:
    """Oracle: a shell, which reads `export LINE` of each as one assignment."""
    text = "NCCL_SOCKET_IFNAME==eth0\nA='one two'\nPATH=/opt/bin:$PATH\nB=\n"
    assert_only(findings.of_environment_file(".deepspeed_env", text), "ok")


def test_one_machine_under_two_names() -> None:
    """Oracle: by hand: node2 gives node1's boot and network as its own; other hosts give their own."""
    assert not findings.of_machines(described())
    assert_only(findings.of_machines(described(identity="boot net")), "failure", "node1, node2 are one machine")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"checkout": False}, [f"node2 has no {CHECKOUT}", "rsync"]),
        ({"python": {"executable": "/usr/bin/python3", "version": "3.9.2"}}, [PYTHON, "3.9.2", "make setup"]),
        ({"folder": False}, [FOLDER, "mkdir"]),
    ],
)
def test_what_a_launch_starts_is_at_the_same_path(change: dict, parts: list[str]) -> None:
    """Oracle: by hand: node2 lacks the checkout, the interpreter or the folder; a host that has all three is well."""
    assert_only(findings.of_installation(described(**change), PYTHON, CHECKOUT, FOLDER), "failure", "node2", *parts)
    assert_only(findings.of_installation(described(), PYTHON, CHECKOUT, FOLDER), "ok", "3.11.7")


@pytest.mark.parametrize(
    ("change", "level", "parts"),
    [
        ({"python": "3.12.1"}, "failure", ["Python", "3.12.1 on node2"]),
        ({"versions": {**installed()["node1"]["versions"], "torch": "1.1"}}, "failure", ["torch", "1.1 on node2"]),
        ({"sources_sha256": "6" * 64, "commit": "d" * 40}, "failure", ["source files", "git pull"]),
    ],
)
def test_other_code_or_versions(change: dict, level: str, parts: list[str]) -> None:
    """Oracle: run/software.py, which compares them at a launch, too."""
    found = findings.of_software(installed(**change))
    assert_only(found[:1], level, *parts)
    assert_only(findings.of_software(installed()), "ok", "node1, node2")


def test_a_missing_package_is_not_only_another_version() -> None:
    """Oracle: by hand: node2 lacks deepspeed. That is one finding, and not a difference in versions as well."""
    versions = {**installed()["node1"]["versions"], "deepspeed": None}
    assert_only(findings.of_software(installed(versions=versions)), "failure", "node2 lacks deepspeed", "make setup")


def test_another_build_of_torch_is_noted() -> None:
    """Oracle: by hand: torch of one version, built for CUDA on node2 alone: a warning, and all else is well."""
    note, rest = findings.of_software(installed(torch_cuda="12.8"))
    assert (note.level, rest.level) == ("warning", "ok")
    assert "CUDA 12.8 on node2" in note.said and "rounded differently" in note.said


CPU = {"node1": "none", "node2": "none"}
CUDA = {"node1": "12.8", "node2": "12.8"}


@pytest.mark.parametrize(
    ("gpus", "cuda", "slots", "level", "parts"),
    [
        (0, CPU, 2, "ok", ["node1 2 of 4 cores"]),
        (0, CPU, 5, "warning", ["node2 has 4 cores and slots=5", "node2 slots=4"]),
        (8, CUDA, 8, "ok", ["node1 8 of 8 GPUs"]),
        (8, CUDA, 9, "failure", ["node2 has 8 GPUs and slots=9", "node2 slots=8"]),
        (8, CUDA, 4, "warning", ["slots=4", "not used"]),
    ],
)
def test_slots_against_devices(gpus: int, cuda: dict, slots: int, level: str, parts: list[str]) -> None:
    """Oracle: by hand: 4 cores or 8 GPUs a host. Ranks can share cores, not GPUs; a GPU without a rank is idle."""
    answers = {host: {**answer, "gpus": gpus} for host, answer in described().items()}
    first = slots if level == "ok" else gpus or 4
    assert_only(findings.of_slots([Host("node1", first), Host("node2", slots)], answers, cuda), level, *parts)


def test_hosts_with_and_without_gpus() -> None:
    """Oracle: by hand: both have torch for CUDA, and node2 alone has GPUs."""
    assert_only(findings.of_slots(HOSTS, described(gpus=2), CUDA), "failure", "node1: cpu; node2: cuda")


def test_a_torch_without_cuda_where_there_are_gpus() -> None:
    """Oracle: by hand: node2 has two GPUs that its torch cannot use; both hosts train on CPUs."""
    assert_only(findings.of_slots(HOSTS, described(gpus=2), CPU), "warning", "node2 has 2 GPUs", "build of torch")


@pytest.mark.parametrize(
    ("change", "software", "part"),
    [
        ({"python_header": False}, {}, "apt-get install python3-dev"),
        ({}, {"compilers": {"cpu": None, "cuda": "/usr/bin/gcc"}}, "apt-get install g++"),
        ({"ninja": False}, {}, "ninja"),
    ],
)
def test_what_compiling_needs(change: dict, software: dict, part: str) -> None:
    """Oracle: engine/compile_probe.py: one host that cannot compile makes all of them eager."""
    assert_only(findings.of_compilers(described(**change), installed(**software), CPU), "warning", "node2", part)
    assert_only(findings.of_compilers(described(), installed(), CPU), "ok")


def test_an_error_of_a_host_is_told() -> None:
    """Oracle: Python's own messages: of a missing module, of an import that fails, and of neither."""
    missing = {"node2": {"error": "ModuleNotFoundError: No module named 'pydantic'"}}
    assert_only(findings.of_errors("versions", missing), "failure", "node2 lacks the package pydantic", "make setup")
    broken = {"node2": {"error": "ImportError: cannot import name 'x' from 'y'"}}
    assert_only(findings.of_errors("versions", broken), "failure", "make setup")
    assert_only(findings.of_errors("names", {"node2": {"error": "OSError: odd"}}), "failure", "node2", "odd")


NEEDS = Needs("slm-10m", checkpoint_bytes=GB, checkpoints=4, keepers=2, data_bytes=10 * GB, rank_bytes=3 * GB)


@pytest.mark.parametrize(
    ("name", "change", "level", "parts"),
    [
        ("run", {"problem": "Read-only file system"}, "failure", ["Read-only file system", "--run-dir"]),
        ("data", {"problem": "No space left on device"}, "failure", ["No space left", "--data-root"]),
        ("home", {"problem": "Permission denied"}, "failure", ["its home", "Permission denied"]),
        ("run", {"free_bytes": 10**7}, "failure", ["10 MB free: make space", "--run-dir"]),
        ("data", {"free_bytes": 10**7}, "failure", ["10 MB free: make space", "--data-root"]),
        ("run", {"free_bytes": GB // 2}, "failure", ["500 MB free", "takes 1.0 GB"]),
        ("run", {"free_bytes": 3 * GB}, "warning", ["up to 4", "run.keep_last"]),
        ("data", {"free_bytes": 5 * GB}, "warning", ["take up to 10.0 GB"]),
    ],
)
def test_folders_and_their_space(name: str, change: dict, level: str, parts: list[str]) -> None:
    """Oracle: the system's words, or by hand: 1 GB a checkpoint, four at a time, and 10 GB of data."""
    answers = described()
    folders = answers["node2"]["folders"]
    answers["node2"] = {**answers["node2"], "folders": {**folders, name: {**folders[name], **change}}}
    *found, memory = content_findings.of_folders(HOSTS, answers, NEEDS, ["node2"])
    assert memory.level == "ok"
    assert_only([one for one in found if level != "failure" or one.level == level][:1], level, "node2", *parts)


def test_only_hosts_that_keep_checkpoints_or_lack_data_need_their_space() -> None:
    """Oracle: by hand: half a GB is too little for either, but no host keeps checkpoints and none lacks data."""
    answers = described()
    for folder in answers["node2"]["folders"].values():
        folder["free_bytes"] = GB // 2
    needs = Needs("slm-10m", checkpoint_bytes=GB, keepers=0, data_bytes=10 * GB)
    disk, _ = content_findings.of_folders(HOSTS, answers, needs, [])
    assert disk.level == "ok"


def test_memory_for_the_ranks() -> None:
    """Oracle: two ranks of 1 GB for themselves and 3 GB for the model."""
    *_, memory = content_findings.of_folders(HOSTS, described(memory_bytes=7 * GB), NEEDS, [])
    assert_only([memory], "warning", "node2 has 7.0 GB", "about 8.0 GB")
    *_, memory = content_findings.of_folders(HOSTS, described(memory_bytes=9 * GB), NEEDS, [])
    assert_only([memory], "ok")


def test_a_live_launch_in_the_run_folder() -> None:
    """Oracle: by hand: one process writes on node2, and none on node1."""
    answers = {"node1": {"alive": []}, "node2": {"alive": ["node2, process 7, since today"]}}
    assert_only(content_findings.of_launches(answers, "runs/demo"), "failure", "node2", "process 7", "--run-dir")
    assert_only(content_findings.of_launches({"node1": {"alive": []}}, "runs/demo"), "ok")


def test_another_recipe_on_one_host() -> None:
    """Oracle: by hand: two hashes; a recipe that node2 cannot find; one hash."""
    answers = {"node1": {"sha256": "a" * 64}, "node2": {"sha256": "b" * 64}}
    assert_only(content_findings.of_recipes(answers, "demo"), "failure", "node1: aaaa", "node2: bbbb")
    answers["node2"] = {"problems": ["recipe 'mine.toml': no such recipe."]}
    assert_only(content_findings.of_recipes(answers, "mine.toml"), "failure", "node2", "no such recipe", "copy")
    assert_only(content_findings.of_recipes({"node1": {"sha256": "a" * 64}}, "demo"), "ok")


def read(sha256: str = "a", tokenizer: str = "t") -> dict[str, Any]:
    return {"absent": [], "is_read": True, "sha256": sha256 * 64, "tokenizer_sha256": tokenizer * 64}


@pytest.mark.parametrize(
    ("answer", "level", "parts"),
    [
        (read(), "ok", ["the same aaaa", "node1, node2"]),
        (read(sha256="b"), "failure", ["prepared data", "node2: bbbb", "copy"]),
        (read(sha256="b", tokenizer="u"), "failure", ["tokenizer", "node2: uuuu"]),
        (
            {"absent": ["tokenizer", "text"], "prepared": [], "is_read": True},
            "ok",
            ["not prepared on node2", "the launch sends it there"],
        ),
        ({"absent": ["text"], "prepared": ["tokenizer"], "is_read": True}, "ok", ["node2 lacks text"]),
        ({"absent": [], "is_read": False}, "warning", ["node2", "--verify"]),
    ],
)
def test_prepared_data(answer: dict, level: str, parts: list[str]) -> None:
    """Oracle: by hand: node2's data against node1's. Another tokenizer makes other shards, and is told alone."""
    assert_only(content_findings.of_data({"node1": read(), "node2": answer}, "demo"), level, *parts)


def test_data_that_no_host_has() -> None:
    """Oracle: a launch sends what a host has, and prepares what none has."""
    absent = {"absent": ["text"], "prepared": [], "is_read": True}
    assert_only(content_findings.of_data(dict.fromkeys(("node1", "node2"), absent), "demo"), "ok", "prepares it there")


def test_a_changed_shard() -> None:
    """Oracle: the problem is told in the words of data/shards/prepared.py, which say the way out."""
    answer = {"absent": [], "is_read": True, "problems": ["x.bin was changed: remove x and prepare again."]}
    (found,) = content_findings.of_data({"node1": read(), "node2": answer}, "demo")
    assert found.level == "failure" and "node2: x.bin was changed: remove x" in found.said


OWN = {"node1": ["127.0.1.1"], "node2": ["192.0.2.12"]}


@pytest.mark.parametrize(
    ("meant", "level", "parts"),
    [
        (["192.0.2.12"], "ok", ["node1, node2"]),
        (["192.0.2.99"], "failure", ["192.0.2.99", "`192.0.2.12 node2` in /etc/hosts of node1"]),
        (["127.0.1.1"], "failure", ["means node1 itself", "`192.0.2.12 node2`"]),
        ([], "failure", ["means nothing", "--restarts"]),
    ],
)
def test_what_the_others_names_mean(meant: list[str], level: str, parts: list[str]) -> None:
    """Oracle: by hand: on node1 the name node2 means its address, another one, node1 itself, or nothing."""
    answers = {
        "node1": {"node1": ["192.0.2.11"], "node2": meant},
        "node2": {"node1": ["192.0.2.11"], "node2": ["192.0.2.12"]},
    }
    assert_only(link_findings.of_names(answers, ADDRESSES), level, *parts)


def test_a_hosts_own_name_that_means_loopback_does_no_harm() -> None:
    """Oracle: Debian's /etc/hosts: a host's own name is 127.0.1.1 there, and right on the others."""
    answers = {"node1": {"node1": ["127.0.1.1"]}, "node2": {"node1": ["192.0.2.11"], "node2": ["192.0.2.12"]}}
    assert_only(link_findings.of_names(answers, ADDRESSES), "ok", "node1 (127.0.1.1)")


def test_the_port_where_ranks_meet_is_taken() -> None:
    """Oracle: by hand: node1 cannot listen at 29500, or can; any port would do for the 0."""
    assert_only(link_findings.of_ports("node1", [40000, None], [0, 29500]), "failure", "29500", "--master_port")
    assert not link_findings.of_ports("node1", [40000, 29500], [0, 29500])


def test_the_interface_of_each_host() -> None:
    """Oracle: by hand: node1's route leaves by eth0, and node2 has none; a first host may have no address at all."""
    answers = {"node1": {"address": "192.0.2.11", "interface": "eth0"}, "node2": {"address": None, "interface": None}}
    lost, taken = link_findings.of_routes(answers)
    assert_only([lost], "failure", "node2 has no route")
    assert_only([taken], "ok", "node1 eth0 (192.0.2.11)")
    assert_only([link_findings.without_address("node1")], "failure", "hostname -I")


def link(gbit_per_s: float = 8.0, closed: list | None = None) -> dict[str, Any]:
    return {"closed": closed or [], "latency_s": 0.0002, "bytes_per_s": gbit_per_s * 1e9 / 8}


def test_a_firewall() -> None:
    """Oracle: by hand: from node2 to node1 the way is closed; the other way takes 0.2 ms, at 8 Gbit/s."""
    closed = {"closed": [[40000, "it does not answer"]]}
    answers = {"node1": {"links": {"node2": link()}}, "node2": {"links": {"node1": closed}}}
    blocked, speed = link_findings.of_links(answers, "node1")
    assert_only([blocked], "failure", "node2 cannot connect to node1 (port 40000: it does not answer)", "--master_addr")
    assert_only([speed], "ok", "0.20 ms", "8.00 Gbit/s")


def test_a_slow_link() -> None:
    """Oracle: by hand: one link of 0.1 Gbit/s among six, the others of 8."""
    names = ("node1", "node2", "node3")
    answers = {host: {"links": {other: link() for other in names if other != host}} for host in names}
    answers["node3"]["links"]["node1"] = link(0.1)
    slow, _ = link_findings.of_links(answers, "node1")
    assert_only([slow], "warning", "node3 to node1: 0.10 Gbit/s", "8.00 Gbit/s")


@pytest.mark.parametrize(
    ("answer", "level", "parts"),
    [
        ({"sum": 3}, "ok", ["gloo adds up over node1, node2"]),
        ({"sum": 2}, "failure", ["node2 has 2, expected 3"]),
        ({"reason": "ImportError: libcudart.so.13"}, "failure", ["node2: ImportError", "GLOO_SOCKET_IFNAME"]),
        ({"waited_s": None}, "ok", ["longer than 12 s", "node2"]),
        ({"waited_s": 0.5}, "ok", ["longer than 12 s", "node2"]),
        ({"waited_s": 5.0}, "failure", ["does not connect node2 within 5 s", "GLOO_SOCKET_IFNAME"]),
    ],
)
def test_an_all_reduce(answer: dict, level: str, parts: list[str]) -> None:
    """Oracle: 1 + 2."""
    assert_only(link_findings.of_all_reduce({"node1": {"sum": 3}, "node2": answer}, 12.0), level, *parts)


@pytest.mark.parametrize(
    ("offsets", "level", "parts"),
    [
        ({"node1": (0.01, 0.001), "node2": (-0.01, 0.002)}, "ok", ["node1 is 0.020 s ahead of node2 (±0.003 s)"]),
        ({"node1": (-3.0, 0.01), "node2": (2.5, 0.01)}, "failure", ["node2 is 5.500 s ahead of node1", "set-ntp"]),
    ],
)
def test_clocks(offsets: dict, level: str, parts: list[str]) -> None:
    """Hosts are compared with each other, not with the machine where the command was typed."""
    assert_only(link_findings.of_clocks(offsets), level, *parts)


def test_forwarding_that_the_server_refuses() -> None:
    """Oracle: the option in sshd_config's manual; by hand: node2 refuses, and node1 does not."""
    answers = {"node1": {"works": True}, "node2": {"works": False, "reason": "the server refuses it"}}
    assert_only(link_findings.of_forwarding(answers), "failure", "node2", "AllowTcpForwarding yes")
    assert_only(link_findings.of_forwarding({"node1": {"works": True}}), "ok")


def test_a_host_alone_that_is_not_this_machine() -> None:
    """Oracle: DeepSpeed's launcher: without --force_multi it starts a single host's ranks where it is typed."""
    assert_only([findings.alone("node2")], "warning", "node2 alone is not this machine", "--force_multi")
