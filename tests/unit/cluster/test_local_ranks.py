"""Ranks on this machine's CPU, started without DeepSpeed's launcher: environment, exit codes, signals."""

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from deepspeed.launcher import launch as theirs

from ds_slm.cluster import launch
from tests.support.runs import ROOT, environment

SHOWS = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")
others = {name for name in os.environ if name not in names}
with open(f"{os.environ['RANK']}.json", "w") as file:
    json.dump([{name: os.environ.get(name) for name in names}, sorted(others), sys.argv[1:]], file)
"""
WAITS = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
rank = os.environ["RANK"]
def say(what):
    os.write(1, f"rank {rank} {what}\\n".encode())
"""


def start(folder: Path, script: str, *flags: str, ranks: int = 2) -> subprocess.Popen[str]:
    """A launch of a script."""
    (folder / "script.py").write_text(script)
    command = launch.local_command(folder / "script.py", flags, ranks, port=4711)
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit code, and the lines that ranks printed, in no order."""
    printed, _ = process.communicate(timeout=60)
    return process.returncode, sorted(printed.splitlines())


def test_ranks_are_told_what_deepspeed_tells_them(tmp_path: Path) -> None:
    """Oracle: DeepSpeed's own launcher: the same variables and flags on each rank, but its `--local_rank`."""
    flags = ["--recipe", "demo", "--set", "train.steps=3"]
    ours, reference = tmp_path / "ours", tmp_path / "reference"
    for folder in (ours, reference):
        folder.mkdir()
    assert end(start(ours, SHOWS, *flags)) == (0, [])

    (reference / "script.py").write_text(SHOWS)
    slots = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    where = [f"--world_info={slots}", "--master_addr=127.0.0.1", "--master_port=4711", "--quiet", "--log_level=error"]
    command = [sys.executable, "-m", theirs.__name__, *where, str(reference / "script.py"), *flags]
    subprocess.run(command, cwd=reference, env=environment(), check=True)

    for rank in range(2):
        found, others, arguments = json.loads((ours / f"{rank}.json").read_text())
        expected, other_others, (local_rank, *other_arguments) = json.loads((reference / f"{rank}.json").read_text())
        assert (found, arguments) == (expected, other_arguments) and local_rank == f"--local_rank={rank}"
        assert set(others) <= set(other_others)


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 1)])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, ending: str, code: int) -> None:
    """Oracle: its exit code, 1 where a signal killed it; a rank that would wait without end is told by SIGTERM."""
    script = f"{WAITS}\nif rank == '1':\n    {ending}\nsignal.sigwait([signal.SIGTERM])\nsay('was told')"
    assert end(start(tmp_path, script, ranks=3)) == (code, ["rank 0 was told", "rank 2 was told"])


def test_ranks_may_end_by_themselves_at_different_times(tmp_path: Path) -> None:
    """Oracle: no rank is told to end: the second one waits until the first is gone, as the kernel says."""
    waits = "import psutil\nwhile psutil.Process().parent().children()[0].pid != os.getpid():\n    time.sleep(0.01)"
    script = f"import os, time\nif os.environ['RANK'] == '1':\n{indented(waits)}\nprint(os.environ['RANK'])"
    assert end(start(tmp_path, script)) == (0, ["0", "1"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_once_they_have_saved(tmp_path: Path, number: signal.Signals) -> None:
    """Oracle: both print what they do after SIGTERM, though the launch is told twice; exit code 1."""
    script = f"{WAITS}\nsay('runs')\nsignal.sigwait([signal.SIGTERM])\nsay('was told')"
    process = start(tmp_path, script)
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["rank 0 runs\n", "rank 1 runs\n"]
    for _ in range(2):
        process.send_signal(number)
    assert end(process) == (1, ["rank 0 was told", "rank 1 was told"])


def test_what_a_rank_started_is_ended_with_it(tmp_path: Path) -> None:
    """Oracle: the kernel: a compiler that the remaining rank runs, and does not wait for, is gone."""
    compiler = "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    script = (
        f"{WAITS}\nimport subprocess, time\nif rank == '0':\n    {compiler}\n    print(process.pid, flush=True)\n"
        "    open('started', 'w').close()\n    signal.sigwait([signal.SIGTERM])\nelse:\n"
        "    while not os.path.exists('started'):\n        time.sleep(0.01)\n    sys.exit(2)"
    )
    code, (pid,) = end(start(tmp_path, script))
    assert code == 2 and not is_running(int(pid))


def test_it_starts_without_torch() -> None:
    """Oracle: Python's own list of imported modules."""
    program = (
        "import sys; import ds_slm.cluster.local_ranks; print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which its new parent has not yet asked about
    except psutil.NoSuchProcess:
        return False


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
