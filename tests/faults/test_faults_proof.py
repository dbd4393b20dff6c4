"""`ds-slm verify RUN --resume` and `--replay STEP`, as a user types them."""

import json
import shutil
from pathlib import Path

import pytest

from ds_slm.cluster import prove_resume
from tests.faults import matrix
from tests.support import runs
from tests.unit.cli.test_main import ds_slm

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof")
    matrix.begin(folder)
    return folder


@pytest.mark.slow
def test_killed_and_resumed_is_shown_to_be_the_same(folder: Path) -> None:
    """Oracle: exit code 0, and one object alone on stdout; the run itself is as it was, and nothing is left."""
    before = sorted(path.name for path in folder.rglob("*") if "data" not in path.parts)
    flags = ["--data-root", str(folder / "data"), "--micro-batch", "2"]
    command = [str(runs.BIN / "ds-slm"), "verify", str(folder / "whole"), "--resume", "--json", *flags]
    shown = runs.run(command, cwd=folder, timeout_s=300)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert json.loads(shown.stdout) == {"same": True, "differences": []}
    assert sorted(path.name for path in folder.rglob("*") if "data" not in path.parts) == before


@pytest.mark.slow
def test_every_difference_is_told(folder: Path) -> None:
    """Oracle: by hand: a loss, a step that is missing, and a tensor changed in a copy of the run."""
    copy = folder / "copy"
    shutil.copytree(folder / "whole", copy)
    assert list(prove_resume.differences(folder / "whole", copy)) == []
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if '"train"' in line)
    last = max(number for number, line in enumerate(lines) if '"train"' in line)
    lines[first] = json.dumps({**json.loads(lines[first]), "loss": 9.0})
    (copy / "metrics.jsonl").write_text("\n".join(line for number, line in enumerate(lines) if number != last) + "\n")
    shutil.rmtree(copy / "checkpoints" / f"step-{matrix.STEPS:08d}")
    told = "\n".join(prove_resume.differences(folder / "whole", copy))
    assert "step 1: loss 9.0 after resuming" in told and f"{matrix.STEPS - 1} steps after resuming" in told
    assert "model.safetensors of the last checkpoint differs." in told


@pytest.mark.slow
def test_a_bad_step_is_dumped_replayed_and_skipped(folder: Path) -> None:
    """A weight becomes NaN on one rank after step 4: step 5 is refused, its rows are innocent, and can be left out.

    Oracle: the dump's positions are those of step 5 (28 to 34); the run that skips them draws none of them.
    """
    arguments = ["--recipe", folder / "tiny.toml", "--out", folder, "poisoned:poison_at=4"]
    refused = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=folder, timeout_s=120)
    assert refused.returncode == 1 and "--replay 5" in refused.stderr and "--skip-rows 28:35" in refused.stderr
    what = json.loads((folder / "poisoned" / "bad-steps" / "step-00000005" / "what.json").read_text())
    assert [row["position"] for row in what["rows"]] == list(range(28, 35))
    replayed = ds_slm("verify", folder / "poisoned", "--replay", 5)
    assert replayed.returncode == 0 and replayed.stdout.count("all finite") == 7
    assert "not the rows, but a copy of the weights or a device was damaged" in replayed.stdout
    found = matrix.problems_by_step(folder / "poisoned")
    assert not any(found.values()) and {3} <= found.keys()
    done = matrix.launch(folder, "poisoned", "--skip-rows", "28:35", "--skip-rows", "35:36")
    assert done.returncode == 0, done.stdout + done.stderr
    changes = [json.loads(line) for line in (folder / "poisoned" / "changes.jsonl").read_text().splitlines()]
    assert changes[-1]["skipped_rows"] == [[28, 35], [35, 36]]
    state = json.loads((folder / "poisoned" / "checkpoints" / f"step-{matrix.STEPS:08d}" / "state.json").read_text())
    assert state["position"] == (matrix.STEPS + 1) * 7  # one step's rows were not drawn, the next step was shorter


@pytest.mark.slow
def test_an_older_launch_leaves_the_folder_alone(folder: Path) -> None:
    """A newer launch's number appears while step 4 is recorded: all ranks end within step 5, and write nothing more."""
    arguments = ["--recipe", folder / "tiny.toml", "--out", folder, "older:supersede_at=4"]
    ended = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=folder, timeout_s=120)
    assert ended.returncode == 1 and "a newer launch writes into this run folder" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [record["step"] for record in runs.records(folder / "older")] == [1, 2, 3, 4]
    assert not (folder / "older" / "stopped.json").exists() and not (folder / "older" / "done.json").exists()
    found = matrix.problems_by_step(folder / "older")
    assert not any(found.values()) and {3} <= found.keys()
    assert matrix.checkpoint_files.steps(folder / "older") == [3]
    assert matrix.resumed_end(folder, "older") == matrix.end_of(folder / "whole")
