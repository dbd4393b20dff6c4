"""The doctor at work, with a stand-in for ssh that stays on this machine. Real hosts: tests/cluster/test_doctor.py."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_slm.cluster import doctor, link_findings, probe
from ds_slm.cluster.findings import Finding
from ds_slm.cluster.hostfile import Host
from ds_slm.cluster.probing import Session, close_all
from ds_slm.recipe import ds_config, loading, plan
from ds_slm.recipe.times import Topology
from tests.support import runs

ROOT = Path(__file__).resolve().parents[3]
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -T ] && shift || shift 2; done
host=$1; shift
[ "$host" = denied ] && { echo "root@denied: Permission denied (publickey)." >&2; exit 255; }
[ "$host" = gone ] && { echo '{"not": "an answer"'; exec sleep 60; }
echo "a banner of $host's shell"
exec sh -c "$*"
"""


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Examine hosts that are this machine under other names; `denied` is not let in, `gone` says nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "variables"))
    monkeypatch.setattr(doctor, "ALL_REDUCE_S", 0.1)  # see test_probes_add_up_with_gloo

    def examine(*names: str, recipe: str | None = None) -> list[Finding]:
        hosts = [Host(name, 1) for name in names]
        return list(doctor.examine(doctor.Plan(hosts, tmp_path / "run", tmp_path / "data", recipe)))

    return examine


def about(found: list[Finding], word: str) -> list[Finding]:
    return [finding for finding in found if finding.about == word]


def test_a_cpu_rank_needs_what_is_planned_of_a_cpu(tmp_path: Path) -> None:
    """Oracle: the plan of two CPU ranks at ZeRO-1, without the program, which every rank's own gigabyte stands for."""
    asked = doctor.Plan([Host("one", 1), Host("two", 1)], tmp_path / "run", tmp_path / "data", "slm-124m")
    zero1 = ds_config.read(ROOT / "ds_configs" / "zero1.json")
    planned = plan.plan(loading.load("slm-124m"), "slm-124m", zero1, Topology(2, 2))
    expected = planned.cpu_memory.device_bytes - planned.cpu_memory.program_bytes
    assert asked.needs().rank_bytes == expected < planned.memory.device_bytes


def test_a_host_that_does_not_answer_is_named_and_the_rest_is_examined(
    hosts: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: two names that lead here, and a third whose ssh says no."""
    monkeypatch.setattr(link_findings, "SLOW_SHARE", 0.0)  # links of a busy machine differ
    monkeypatch.setattr(doctor, "MASTER_PORT", runs.free_port())
    found = hosts("one", "denied", "two")
    refused, connected = about(found, "ssh")
    assert refused.level == "failure" and "ssh-copy-id denied" in refused.mend
    assert connected.said.startswith("one, two ")

    # All that one machine can show of two hosts.
    (python,), (clocks,) = about(found, "python"), about(found, "clocks")
    assert python.said.endswith("on one, two")
    assert clocks.level == "ok"
    assert [one.said for one in about(found, "hosts")] == ["one, two are one machine"]
    assert {one.level for one in about(found, "network")} == {"ok"}
    assert {one.level for one in about(found, "all-reduce")} == {"ok"}
    assert "on one the name two means nothing" in about(found, "names")[0].said


def test_probes_add_up_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 1 + 2, by two real processes of torch. The doctor itself does not wait for a loaded machine."""
    monkeypatch.setattr("ds_slm.cluster.probing.ANSWER_S", 110.0)
    sessions = [Session(None, ROOT), Session(None, ROOT)]
    assert [session.connect() for session in sessions] == [None, None]
    meeting = {"world": 2, "address": "127.0.0.1", "port": sessions[0].ask("free_port")["port"], "interface": "lo"}
    for rank, session in enumerate(sessions):
        assert session.ask("begin_all_reduce", rank=rank, **meeting) == {}
    assert [session.ask("end_all_reduce", within_s=100) for session in sessions] == [{"sum": 3}, {"sum": 3}]
    close_all(sessions)


def test_torch_that_starts_too_late_is_not_a_fault() -> None:
    """Oracle: two processes are expected, and torch has not even started."""
    session = Session(None, ROOT)
    assert session.connect() is None
    port = session.ask("free_port")["port"]
    session.ask("begin_all_reduce", rank=0, world=2, address="127.0.0.1", port=port, interface="lo")
    assert session.ask("end_all_reduce", within_s=0.01) == {"waited_s": None}
    session.close()


def test_a_recipe_is_looked_at_on_every_host(hosts: Callable[..., list[Finding]]) -> None:
    """Oracle: both names lead to this checkout, which has one `demo`, and to a data folder that is not there."""
    found = hosts("one", "two", recipe="demo")
    (recipe,), (data,) = about(found, "recipe"), about(found, "data")
    assert recipe.said == "demo is the same on one, two"
    assert data.said.startswith("demo: not prepared on one, two")


def test_a_file_of_variables_is_read_before_any_host(hosts: Callable[..., list[Finding]], tmp_path: Path) -> None:
    """Oracle: by hand: line 2 is a comment with `=`. It is told before the host that lets nobody in."""
    (tmp_path / "variables").write_text("A=1\n# B=2\n")
    found = hosts("denied", "two")
    (trap,) = about(found, "variables")
    assert trap.level == "failure" and "variables, line 2" in trap.said
    assert found.index(trap) < found.index(about(found, "ssh")[0])


def test_a_host_without_packages_can_say_so() -> None:
    """Oracle: a Python that sees the standard library alone describes its host, and names what is missing."""
    source = inspect.getsource(probe)
    questions = [
        {"ask": "describe", "checkout": "/nowhere", "folder": "/", "folders": {"home": "~"}},
        {"ask": "clock"},
        {"ask": "software"},
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd="/",
    )
    described, clock, software = map(json.loads, done.stdout.splitlines())
    assert described["checkout"] is False and described["cores"] >= 1
    assert clock["time"] > 0
    assert "No module named 'ds_slm'" in software["error"] and software["package"] == "ds_slm"


def test_the_probe_reads_as_python_3_8() -> None:
    """Oracle: the parser for the oldest Python that a host may have beside the project's."""
    import ast

    assert ast.parse(inspect.getsource(probe), feature_version=(3, 8)).body


def test_nothing_imports_torch() -> None:
    """Oracle: sys.modules after every answer that this machine can give; torch takes seconds."""
    script = (
        "import json, sys\n"
        "from ds_slm.cluster import doctor, probe\n"
        "probe.software(); probe.recipe('demo', 'runs/demo'); probe.launches('runs/demo')\n"
        "probe.data('demo', 'data', 60); probe.route('192.0.2.1', 1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, check=True)


def test_this_machine_alone(ds_slm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Without a hostfile there is no ssh. Oracle: exit code, verdict and findings agree, in both forms."""
    flags = ["--run-dir", tmp_path / "run", "--data-root", tmp_path / "data"]
    told = ds_slm("doctor", *flags)
    found = json.loads(ds_slm("doctor", *flags, "--json").stdout)
    failures = [one for one in found["findings"] if one["level"] == "failure"]
    assert told.returncode == (2 if failures else 0)
    assert found["fit"] is (not failures)
    assert {one["about"] for one in found["findings"]} >= {"python", "versions", "disk", "memory", "launches"}
    assert not {one["about"] for one in found["findings"]} & {"ssh", "names", "clocks", "network", "forwarding"}
    assert told.stdout.splitlines()[-1].startswith("1 host in ")


def test_a_folder_that_cannot_be_written_ends_in_exit_code_2(
    ds_slm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Oracle: a file stands where the run folder should be."""
    (tmp_path / "file").write_text("")
    told = ds_slm("doctor", "--run-dir", tmp_path / "file" / "run", "--data-root", tmp_path)
    assert told.returncode == 2
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("FAILURE")]
    assert "disk" in line and "--run-dir" in line


def test_a_bad_hostfile_is_refused(ds_slm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Oracle: the parser's own words for a host that stands there twice."""
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode1 slots=1\n")
    told = ds_slm("doctor", "--hostfile", tmp_path / "hostfile")
    assert told.returncode == 2
    assert "expected each host once" in told.stderr
