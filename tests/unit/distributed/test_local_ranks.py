"""Ranks on this machine's CPU, started without DeepSpeed's launcher: environment, exit codes, signals."""

import base64
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from deepspeed.launcher import launch as deepspeeds

from ds_slm.distributed import local_ranks
from ds_slm.distributed.world import LAUNCHER_MODULES
from tests.support.runs import ROOT, environment

pytestmark = pytest.mark.timeout(120)

SHOWS = """
import json, os, sys
with open(f"{os.environ['RANK']}.json", "w") as file:
    json.dump([dict(os.environ), sys.argv[1:]], file)
"""
RANK = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
def say(what):
    os.write(1, f"rank {rank} {what}\\n".encode())
def await_file(name):
    while not os.path.exists(name):
        time.sleep(0.01)
"""
WAITS = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(f"waiting-{rank}", "w").close()
signal.sigwait([signal.SIGTERM])
say("got SIGTERM")
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a launch of a script, in the test's folder; the script begins with RANK."""

    def launch(script: str, ranks: int = 2) -> subprocess.Popen[str]:
        (tmp_path / "script.py").write_text(RANK + script)
        command = local_ranks.command(tmp_path / "script.py", [], ranks, port=4711)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), text=True, **pipes)

    return launch


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit code, and the lines that were printed, sorted."""
    printed, _ = process.communicate(timeout=60)
    return process.returncode, sorted(printed.splitlines())


def test_ranks_get_what_deepspeed_gives_them(tmp_path: Path) -> None:
    """Oracle: DeepSpeed's own launcher: the same environment and flags on each rank, but its `--local_rank`."""
    (tmp_path / "script.py").write_text(SHOWS)
    slots = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    where = [f"--world_info={slots}", "--master_addr=127.0.0.1", "--master_port=4711", "--quiet", "--log_level=error"]
    flags = ["--recipe", "demo", "--set", "train.steps=3"]
    theirs = [sys.executable, "-m", deepspeeds.__name__, *where, str(tmp_path / "script.py"), *flags]
    found = []
    for command in (local_ranks.command(tmp_path / "script.py", flags, 2, 4711), theirs):
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True)
        found.append([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)])

    for rank, ((ours, arguments), (expected, (local_rank, *others))) in enumerate(zip(*found, strict=True)):
        for variables in (ours, expected):
            variables.pop("CUDA_VISIBLE_DEVICES", None)  # there is no such device
        assert ours == expected
        assert arguments == others == flags and local_rank == f"--local_rank={rank}"


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit(3)", 3, []),
        ("os.kill(os.getpid(), signal.SIGABRT)", 1, ["error: rank 1 was ended by signal 6."]),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            1,
            ["error: rank 1 was ended by signal 9, most often because no memory was left: `dmesg` says so."],
        ),
    ],
)
def test_a_rank_that_fails_ends_the_others(start: Start, ending: str, code: int, said: list[str]) -> None:
    """Oracle: its exit code, 1 and a sentence if a signal ended it; ranks that would wait for ever get SIGTERM."""
    fails = f"if rank == '1':\n    await_file('waiting-0')\n    await_file('waiting-2')\n    {ending}\n"
    assert end(start(fails + WAITS, ranks=3)) == (code, [*said, "rank 0 got SIGTERM", "rank 2 got SIGTERM"])


def test_a_rank_that_fails_lets_the_others_say_why(start: Start) -> None:
    """Oracle: the last words of a rank that ends by itself once the first one is gone, and ignores no SIGTERM."""
    script = (
        "import psutil\n"
        "if rank == '1':\n    await_file('ready')\n    sys.exit(2)\n"
        "open('ready', 'w').close()\n"
        "while len([one for one in psutil.Process().parent().children() if one.status() != 'zombie']) > 1:\n"
        "    time.sleep(0.001)\n"
        "say('ends, too')"
    )
    assert end(start(script)) == (2, ["rank 0 ends, too"])


def test_ranks_may_end_at_different_times(start: Start) -> None:
    """Oracle: no rank is ended: the second one waits until the first is gone."""
    script = "say('ends')\nif rank == '1':\n    await_file('done')\nelse:\n    open('done', 'w').close()"
    assert end(start(script)) == (0, ["rank 0 ends", "rank 1 ends"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_once_they_have_saved(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """Oracle: each prints what it does after SIGTERM, though the launch gets the signal twice; exit code 1."""
    saves = "await_file('second signal')\nsay('saves')"
    process = start(f"say('runs')\n{WAITS}\n{saves}")
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["rank 0 runs\n", "rank 1 runs\n"]
    process.send_signal(number)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["rank 0 got SIGTERM\n", "rank 1 got SIGTERM\n"]
    process.send_signal(number)
    (tmp_path / "second signal").touch()
    assert end(process) == (1, ["rank 0 saves", "rank 1 saves"])


def test_a_compiler_ends_with_its_rank(start: Start) -> None:
    """Oracle: the kernel: what the remaining rank has started, and does not wait for, is gone."""
    script = (
        "if rank == '0':\n"
        "    compiler = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    os.write(1, str(compiler.pid).encode())\n"
        f"    {WAITS.strip().replace(chr(10), chr(10) + '    ')}\n"
        "else:\n    await_file('waiting-0')\n    sys.exit(2)"
    )
    code, (line,) = end(start(script))
    assert code == 2 and not is_running(int(line.removesuffix("rank 0 got SIGTERM")))


def test_ranks_end_with_their_launcher(start: Start, tmp_path: Path) -> None:
    """Oracle: each gets SIGTERM when the launcher is killed."""
    process = start(WAITS)
    await_ranks(tmp_path)
    process.kill()
    assert end(process) == (-signal.SIGKILL, ["rank 0 got SIGTERM", "rank 1 got SIGTERM"])


def test_ranks_end_with_the_program_above_their_launcher(tmp_path: Path) -> None:
    """Oracle: each gets SIGTERM when `ds-slm`, here another program, is killed."""
    (tmp_path / "script.py").write_text(RANK + WAITS)
    launch = local_ranks.command(tmp_path / "script.py", [], 2, 4711)
    above = [sys.executable, "-c", f"import subprocess; subprocess.run({launch})"]
    process = subprocess.Popen(above, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE)
    await_ranks(tmp_path)
    process.kill()
    assert end(process) == (-signal.SIGKILL, ["rank 0 got SIGTERM", "rank 1 got SIGTERM"])


def test_a_rank_that_cannot_be_started_ends_the_others(tmp_path: Path) -> None:
    """Oracle: the error's sentence and exit code, where a third process is one too many; the first two get SIGTERM."""
    (tmp_path / "script.py").write_text(RANK + WAITS)
    program = f"""
import sys, time
from pathlib import Path
from ds_slm.distributed import local_ranks
from ds_slm.errors import run_program
start = local_ranks._start
def two_at_most(script, variables):
    if variables["RANK"] == "2":
        while not all(Path(f"waiting-{{rank}}").exists() for rank in range(2)):
            time.sleep(0.01)
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return start(script, variables)
local_ranks._start = two_at_most
sys.exit(run_program(lambda: local_ranks.run(3, 4711, [{str(tmp_path / "script.py")!r}])))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment(), text=True, **pipes)
    said = "error: rank 2 of 3 cannot be started: [Errno 11] Resource temporarily unavailable."
    assert end(process) == (2, [said, "rank 0 got SIGTERM", "rank 1 got SIGTERM"])


def test_ranks_know_their_launcher() -> None:
    """Oracle: Python's own list of imported modules, in a process that is asked by the name that ranks look for."""
    assert local_ranks.__name__ in LAUNCHER_MODULES
    program = f"import sys, {local_ranks.__name__}; print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"


def await_ranks(folder: Path) -> None:
    """Until both ranks wait for SIGTERM."""
    while not all((folder / f"waiting-{rank}").exists() for rank in range(2)):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which its new parent has not yet asked about
    except psutil.NoSuchProcess:
        return False
