"""Programs forked from a warm process behave as those that are started: what they print, how they end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import runs, warm

SCRIPT = """
import atexit, os, sys
atexit.register(lambda: print("the interpreter ended", flush=True))
print(os.environ["COLOUR"], sys.argv[1:], os.getcwd(), __name__)
print("also this", file=sys.stderr)
{end}
"""
ENDS = {
    "returns": "",
    "exits": "sys.exit(3)",
    "says why": "sys.exit('because')",
    "raises": "raise ValueError('no')",
    "is killed": "sys.stdout.flush(); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_script_ends_as_a_started_one(tmp_path: Path, end: str) -> None:
    """Oracle: subprocess.run, up to the frames of a traceback."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=ENDS[end]))
    command, environment = [sys.executable, str(script), "a", "b c"], runs.environment(COLOUR="blue")
    assert warm.can_run(command, environment)
    forked = warm.run(command, tmp_path, environment, timeout_s=60)
    started = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[:1] == started.stderr.splitlines()[:1]
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_a_command_of_ours_tells_mistakes_alike(tmp_path: Path) -> None:
    """Oracle: subprocess.run."""
    command, environment = [str(runs.BIN / "ds-slm"), "plan", "nothing"], runs.environment()
    forked = warm.run(command, tmp_path, environment, timeout_s=60)
    started = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_what_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    """Oracle: no process of it is left."""
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        warm.run([sys.executable, str(script)], tmp_path, runs.environment(), timeout_s=10)
    pid = int(raised.value.stdout)
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1]


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONPATH"])
def test_what_is_read_on_import_needs_a_start(variable: str) -> None:
    """Oracle: variables that torch, a library or Python reads once."""
    command = runs.deepspeed_command(2)
    assert warm.can_run(command, runs.environment())
    assert not warm.can_run(command, runs.environment(**{variable: "7"}))
    assert not warm.can_run(["bash", "-c", "true"], runs.environment())
