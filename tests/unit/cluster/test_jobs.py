"""How a job ends: hostfiles/slurm.sh and the pods' command, with a launch that only leaves signs and a code.

The real thing is in tests/cluster/test_slurm.py and test_kubernetes.py. Here: what the signs of an earlier launch do.
"""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = """#!/bin/bash
[ -z "$MAKES" ] || echo '{}' > "$RUN/$MAKES"
exit "$CODE"
"""
CASES = [
    # signs of an earlier launch, of this one, its exit code -> how the job ends
    ([], "done.json", 0, "done"),
    ([], "stopped.json", 75, "again"),
    (["stopped.json"], "stopped.json", 1, "again"),
    ([], None, 2, 2),
    (["stopped.json"], None, 2, 2),
    (["done.json"], None, 2, 2),
    (["done.json"], None, 0, "done"),
    (["stopped.json"], None, 1, 1),
    ([], None, 0, 1),
]


def end(tmp_path: Path, command: list[str], earlier: list[str], makes: str | None, code: int, **environ: str) -> int:
    """Run a job's script in a folder with an earlier launch's signs; its exit code."""
    run, programs = tmp_path / "runs" / "tiny", tmp_path / "bin"
    for folder in (run, programs):
        folder.mkdir(parents=True)
    for name in earlier:
        (run / name).write_text("{}")
        os.utime(run / name, (1, 1))
    for name in ("srun", "deepspeed"):
        (programs / name).write_text(LAUNCH)
    (programs / "scontrol").write_text(f'#!/bin/bash\n[ "$1" != requeue ] || touch {tmp_path}/requeued\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environ |= {"PATH": path, "RUN": str(run), "MAKES": makes or "", "CODE": str(code)}
    return subprocess.run(command, cwd=tmp_path, env={**os.environ, **environ}, timeout=60, check=False).returncode


@pytest.mark.parametrize(("earlier", "makes", "code", "expected"), CASES)
def test_a_slurm_job(tmp_path: Path, earlier: list[str], makes: str | None, code: int, expected: str | int) -> None:
    """Oracle: the job is queued again for a sign of this launch alone, and a mistake keeps its code."""
    command = ["bash", str(ROOT / "hostfiles" / "slurm.sh"), "tiny"]
    found = end(tmp_path, command, earlier, makes, code, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    assert (tmp_path / "requeued").exists() == (expected == "again")
    assert found == (expected if isinstance(expected, int) else 0)


@pytest.mark.parametrize(("earlier", "makes", "code", "expected"), CASES)
def test_a_pod(tmp_path: Path, earlier: list[str], makes: str | None, code: int, expected: str | int) -> None:
    """Oracle: 75 for a sign of this launch alone, which the Job ignores, and a mistake keeps its code."""
    job = list(yaml.safe_load_all((ROOT / "hostfiles" / "kubernetes.yaml").read_text()))[1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environ = {"RECIPE": "tiny", "NODES": "2", "GPUS": "1", "POD": "ds-slm", "JOB_COMPLETION_INDEX": "0"}
    found = end(tmp_path, container["command"], earlier, makes, code, **environ)
    assert found == (expected if isinstance(expected, int) else {"done": 0, "again": 75}[expected])
