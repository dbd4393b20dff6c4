"""SIGKILL anywhere: at every write point of a save, at random instants, of one rank, of all, of the launcher.

After each the same command goes on, and ends with the tensors and the ledger of the run that nobody disturbed.
"""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from ds_slm.checkpoint.files import WRITE_POINTS
from tests.faults import matrix

SEED = 20_261_121
QUICK = ("manifest",)
POINTS = [
    pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in WRITE_POINTS if one != "old-moved"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    matrix.begin(folder)
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_write_point(folder: Path, point: str) -> None:
    """Step 6 is being saved; step 3 is whole, and step 6 is whole or not there."""
    name = f"point-{point}"
    died = matrix.launch(folder, name, DS_SLM_DIE_AT=f"{point}@6")
    assert died.returncode != 0
    found = matrix.problems_by_step(folder / name)
    expected = {3, 6} if point in ("latest", "best", "retained") else {3}
    assert not any(found.values()) and expected <= found.keys()
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")


@pytest.mark.slow
def test_killed_while_a_damaged_checkpoint_is_written_anew(folder: Path) -> None:
    """Step 6 is damaged, so the run goes on from 3 and writes 6 anew: killed before that has its name.

    A kill between the two renames of one step is shown in unit/checkpoint/test_files.py.
    """
    name = "written-anew"
    assert matrix.launch(folder, name, "--max-steps", 6).returncode == 0
    state = folder / name / "checkpoints" / "step-00000006" / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    assert matrix.launch(folder, name, DS_SLM_DIE_AT="manifest-synced@6").returncode != 0
    found = matrix.problems_by_step(folder / name)
    assert not any(found.values()) and {3} <= found.keys()
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "who", "after_s"), [(number, *one) for number, one in enumerate(matrix.instants(SEED, 10))]
)
def test_killed_at_a_random_instant(folder: Path, number: int, who: str, after_s: float) -> None:
    """Seed 20261121; the instant counts from the first record on."""
    name = f"instant-{number}"
    matrix.kill(folder, name, who, after_s)
    found = matrix.problems_by_step(folder / name)
    assert not any(found.values())
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "all", "launcher"])
def test_killed_after_the_first_save(folder: Path, who: str) -> None:
    """One rank, all processes, the launcher alone: the ranks it leaves behind stop as if they were told to."""
    name = f"kill-{who}"
    matrix.kill(folder, name, who, 0.1, begun="checkpoints/latest")
    found = matrix.problems_by_step(folder / name)
    assert not any(found.values()) and {3} <= found.keys()
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_not_the_run(folder: Path, tmp_path: Path) -> None:
    """A run folder on a small tmpfs with a large file in it: saving fails, is told, and training goes on to its end.

    With the room back, the same command goes on from the newest whole checkpoint.
    """
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        run = mount / "run"
        stop = ["--run-dir", str(run), "--max-steps"]
        assert matrix.launch(folder, "unused", *stop, "4").returncode == 0
        filler = mount / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        os.truncate(filler, filler.stat().st_size - 300_000)  # room for a launch and some records, not for a checkpoint
        full = matrix.launch(folder, "unused", *stop, "8")
        assert full.returncode == 1, full.stdout + full.stderr
        assert "COULD NOT BE SAVED" in full.stdout and "The next save tries again" in full.stdout
        assert "step 8/" in full.stdout
        assert "Traceback" not in full.stdout + full.stderr
        found = matrix.problems_by_step(run)
        assert not any(found.values()) and {4} <= found.keys()
        filler.unlink()
        done = matrix.launch(folder, "unused", *stop, str(matrix.STEPS))
        assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stdout + done.stderr
        assert matrix.tensors(run) == matrix.tensors(folder / "whole")
    finally:
        subprocess.run(["umount", str(mount)], check=False)
