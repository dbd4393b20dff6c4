"""What a supervisor shows, sends to other hosts and refuses, without any agent."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_slm.cluster import runner_flags, supervise
from ds_slm.cluster.hostfile import Host
from ds_slm.cluster.limits import Limits
from ds_slm.errors import CheckpointError, ConfigError, HostfileError

LOG = """\
W1130 03:57:02.101000 109 torch/distributed/run.py:852] about threads
[W1130 03:57:02.101021306 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3
[rank1]:[W1130 04:06:34.143023681 TCPStore.cpp:125] [c10d] recvValue failed
E1130 09:00:30.678000 33 multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 0 (pid: 36) of binary: python
E1130 09:00:30.679000 33 multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1 (pid: 37) of binary: python
frame #7: c10d::PrefixStore::add(std::string const&, long)
step 1/40: loss 5.7890
Traceback (most recent call last):
  File "loop.py", line 121, in take_step
    sums = forward()
RuntimeError: Connection closed by peer
step 2/40: loss 5.7817
half a li"""


def test_a_terminal_shows_what_a_user_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a host's log: of torch's agent whom a signal ended, of a traceback its last line, whole lines, each once."""
    log = tmp_path / "node1.log"
    log.write_text("of an earlier launch\n")
    tail = supervise.Tail(log, "node1: ")
    with log.open("a") as file:
        file.write(LOG)
    tail.show()
    with log.open("a") as file:
        file.write("ne\n")
    tail.show()
    tail.show()
    assert capsys.readouterr().out.splitlines() == [
        "node1: rank 0 of this host (process 36) was ended by signal 9",
        "node1: step 1/40: loss 5.7890",
        f"node1: RuntimeError: Connection closed by peer (traceback: {log})",
        "node1: step 2/40: loss 5.7817",
        "node1: half a line",
    ]


def test_other_hosts_get_the_variables_that_deepspeed_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the prefixes of DeepSpeed's launcher, and its environment file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "variables").write_text("A=1 = 2\n# B=3\n")
    environ = {"NCCL_DEBUG": "INFO", "HOME": "/nowhere", "PYTHONHASHSEED": "0", "DS_ENV_FILE": "variables"}
    found = supervise.exported_to_hosts(environ)
    assert found == {"NCCL_DEBUG": "INFO", "PYTHONHASHSEED": "0", "A": "1 = 2"}


def test_one_supervisor_holds_a_run_folder(tmp_path: Path) -> None:
    """The second one is told who the first is. Oracle: this process's id."""
    with supervise._alone(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
        supervise._alone(tmp_path).__enter__()
    with supervise._alone(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Oracle: the system's own words for a folder below a file."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        supervise._alone(tmp_path / "file").__enter__()


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh, to be written."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "ssh"
    path.touch(0o755)
    return path


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("echo 'python3: No such file or directory' >&2; exit 127", "cannot start an agent: python3: No such file"),
        ("echo $(($(date +%s) + 60)) $(($(date +%s) + 60))", "clock is (59|60) s ahead"),
        ("echo $(($(date +%s) - 60)) $(($(date +%s) - 60))", "clock is (60|61) s behind"),
    ],
)
def test_a_host_that_could_not_take_part_is_named(ssh: Path, answer: str, told: str) -> None:
    """Oracle: the stand-in's answers: its shell's error, and a clock one minute ahead or behind."""
    ssh.write_text(f"#!/bin/sh\n{answer}\n")
    with pytest.raises(HostfileError, match=f"host node2.* {told}"):
        supervise.refuse_unfit([Host("node2", 1)], None)


def test_a_host_whose_clock_is_right_takes_part(ssh: Path) -> None:
    """Whatever its login says before."""
    answer = "echo Welcome to node2.\necho $(date +%s.%N) $(date +%s.%N)\n"
    ssh.write_text(f'#!/bin/sh\necho "$@" >>{ssh.parent}/calls\n{answer}')
    supervise.refuse_unfit([Host("node2", 1)], 2222)
    assert "-p 2222 node2" in (ssh.parent / "calls").read_text()


def test_a_host_that_takes_long_to_answer_is_not_late(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is right, and each import and goodbye takes longer than clocks may differ. Oracle: no error."""
    monkeypatch.setattr(supervise, "MOST_CLOCK_DIFFERENCE_S", 0.2)
    answer = "first=$(date +%s.%N)\nsleep 0.5\necho $first $(date +%s.%N)\nsleep 0.5\n"
    ssh.write_text(f"#!/bin/sh\n{answer}touch {ssh.parent}/answered\n")
    supervise.refuse_unfit([Host("node2", 1)], None)
    assert (ssh.parent / "answered").exists()


def test_every_host_is_asked_once_and_all_that_is_wrong_is_told(ssh: Path, tmp_path: Path) -> None:
    """One cannot be reached, of one the clock is off, one is well. Oracle: the calls that the stand-in notes."""
    ssh.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *far*) echo "far: no route" >&2; exit 255;; '
        "*late*) echo 60 60;; *) echo $(date +%s) $(date +%s);; esac\n"
    )
    with pytest.raises(HostfileError) as refused:
        supervise.refuse_unfit([Host("far", 1), Host("late", 1), Host("well", 1)], None)
    unreached, late, way_out = refused.value.problems
    assert unreached == "host far does not answer over ssh: far: no route."
    assert "host late's clock" in late and "--no_ssh_check" in way_out
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "said", ["Host key verification failed.", "root@node2: Permission denied (publickey,password)."]
)
def test_ssh_that_would_ask_a_question_is_refused_in_one_paragraph(ssh: Path, tmp_path: Path, said: str) -> None:
    """A changed host key, a password: through the command itself. Nothing is started, and no run folder made."""
    ssh.write_text(f'#!/bin/sh\ncase "$*" in *BatchMode=yes*) ;; *) exit 9;; esac\necho "{said}" >&2\nexit 255\n')
    (tmp_path / "hosts").write_text("node2.invalid slots=1\n")
    command = [str(Path(sys.executable).with_name("ds-slm")), "train", "demo", "--hostfile", "hosts", "--restarts", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and said.rstrip(".") in done.stderr and "without a password" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("runner", "told"),
    [
        (["--master_port", "29501"], "--master_port is for DeepSpeed's launcher"),
        (["--include", "node1:0,1"], "names whole hosts"),
        (["--force_multi"], "--force_multi is for"),
    ],
)
def test_flags_that_make_no_sense_are_refused(runner: list[str], told: str) -> None:
    """Oracle: by hand: two flags are for DeepSpeed's launcher, which does not run; the third names slots of a host."""
    parser = argparse.ArgumentParser()
    runner_flags.add_runner_flags(parser)
    with pytest.raises(ConfigError, match=told):
        runner_flags.refuse_where_supervised(runner, parser.parse_args(runner))


def test_an_agent_that_can_never_start_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Python that is not there stands for an installation without the rendezvous. Oracle: the documented code 1."""
    monkeypatch.setattr(supervise, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(supervise.sys, "executable", "/no/such/python")
    assert supervise.run(supervise.Launch([], tmp_path / "run", [], 1, Limits(restarts=1))) == 1
    said = capsys.readouterr().out
    assert said.count("/no/such/python") == supervise.GIVE_UP and "this host is left out" in said


@pytest.mark.parametrize("hosts", [[], [Host("node2.invalid", 1)]])
def test_nothing_is_left_of_an_agent_that_was_killed(
    hosts: list[Host], ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine and on another one, a stand-in of which runs here. Oracle: the empty folder for temporary files.

    The stand-in of the agent writes down that it came to its folder.
    """
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    temporary, agent = tmp_path / "temporary", tmp_path / "agent"
    temporary.mkdir()
    agent.write_text(f'#!/bin/sh\ntouch "$DS_SLM_PULSES/47.pulse" && echo came >>{tmp_path}/came\nkill -9 $$\n')
    agent.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(supervise, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(supervise.sys, "executable", str(agent))
    supervise.run(supervise.Launch([], tmp_path / "run", hosts, 1, Limits(restarts=1)))
    assert (tmp_path / "came").read_text().count("came") == supervise.GIVE_UP
    assert not [*temporary.iterdir()]
