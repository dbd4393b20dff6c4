"""Signals in every phase, through the real launcher: all ranks stop after the same micro-batch, and nothing is lost.

The last rank gets the signal; the oracle is the run nobody disturbed.
"""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from tests.faults import matrix
from tests.support import runs

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"
PHASES = {
    "start": ("0.start.SIGTERM", (0,)),
    "accumulation": ("4.forward.SIGTERM", (4,)),
    "data": ("4.data.SIGTERM", (4, 5)),
    "optimiser": ("4.optimiser.SIGINT", (5,)),
    "evaluation": ("6.evaluation.SIGTERM", (6,)),
    "saving": ("3.saving.SIGTERM", (3, 4, 5)),
}
"""Phase -> when and where the signal arrives, and the steps of which one is the last that is applied.

Rows are read and checkpoints written beside training: the signal comes before, within or behind a step's last message.
"""
QUICK = ("accumulation",)
CASES = [pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in PHASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    matrix.begin(folder)
    return folder


def case(folder: Path, name: str, settings: str):
    """One launch of the test program."""
    arguments = ["--recipe", folder / "tiny.toml", "--out", folder, f"{name}:{settings}"]
    return runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=folder, timeout_s=120)


@pytest.mark.parametrize("phase", CASES)
def test_stopped_in_a_phase(folder: Path, phase: str) -> None:
    """The step that had begun is discarded, the last applied one saved, the sign left, and the end is the same."""
    when, last_steps = PHASES[phase]
    name = f"stopped-{phase}"
    stopped = case(folder, name, f"signal_at={when}")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    sign = json.loads((folder / name / "stopped.json").read_text())
    assert sign["step"] in last_steps and sign["generation"] == 1
    assert [one["step"] for one in runs.records(folder / name)] == [*range(1, sign["step"] + 1)]
    assert f"stopped by a signal: step {sign['step']} is saved" in stopped.stderr
    assert "Traceback" not in stopped.stdout + stopped.stderr
    found = matrix.problems_by_step(folder / name)
    assert not any(found.values()) and {sign["step"]} <= found.keys()
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")
    assert not (folder / name / "stopped.json").exists()


def test_sigusr1_saves_and_goes_on(folder: Path) -> None:
    """Step 4 is no multiple of 3: it is saved because a rank was asked to, and the run ends as if nothing were."""
    done = case(folder, "usr1", "signal_at=4.forward.SIGUSR1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5: saved step-00000005" in done.stdout
    assert matrix.tensors(folder / "usr1") == matrix.tensors(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "number", "code"),
    [("ds-slm", signal.SIGTERM, 75), ("ds-slm", signal.SIGINT, 75), ("deepspeed", signal.SIGTERM, -signal.SIGTERM)],
)
def test_stopped_through_the_command(folder: Path, program: str, number: signal.Signals, code: int) -> None:
    """A signal to that one process reaches the ranks: `ds-slm` waits for them; `deepspeed` dies, and they notice."""
    name = f"{program}-{number.name}"
    flags = ["--run-dir", folder / name, "--data-root", folder / "data", "--micro-batch", "2"]
    flags += ["--set", "train.steps=100000"]
    command = [runs.BIN / "ds-slm", "train", folder / "tiny.toml", *flags, "--devices", 2]
    if program == "deepspeed":
        command = runs.deepspeed_command(2, "--recipe", folder / "tiny.toml", *flags)
    with subprocess.Popen(list(map(str, command)), cwd=folder, env=runs.environment()) as process:
        records = folder / name / "metrics.jsonl"
        matrix.wait_for(lambda: records.is_file() and records.stat().st_size)
        ranks = matrix.below(process.pid, "pretrain.py")
        process.send_signal(number)
        assert process.wait(timeout=90) == code
        matrix.wait_for(lambda: not any(one.is_running() for one in ranks))
    sign = json.loads((folder / name / "stopped.json").read_text())
    assert checkpoint_files.verify(checkpoint_files.folder_of_step(folder / name, sign["step"])) == []


@pytest.mark.slow
def test_stopped_while_compiling(folder: Path, tmp_path: Path) -> None:
    """SIGTERM to DeepSpeed's launcher, which ends all below it, the C++ compiler of a rank too, with nothing trained.

    Oracle: step 0 is saved all the same, the sign left, and the run that goes on from it is the one nobody disturbed.
    """
    name = "stopped-compiling"
    config = tmp_path / "compiled.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "compile_blocks": True}))
    environment = runs.environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cold"))
    with subprocess.Popen(
        matrix.command(folder, name, "--ds-config", config),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as runner:
        # The log exists once signals are handled: after the probe, which compiles too.
        log = folder / name / "logs" / "rank-00000.log"
        matrix.wait_for(lambda: log.is_file() and matrix.below(runner.pid, "cc1plus"), 240)
        matrix.below(runner.pid, "deepspeed.launcher.launch")[0].send_signal(signal.SIGTERM)
        told, _ = runner.communicate(timeout=90)
    sign = folder / name / "stopped.json"
    assert sign.is_file() and json.loads(sign.read_text())["step"] == 0, told
    found = matrix.problems_by_step(folder / name)
    assert not any(found.values()) and {0} <= found.keys()
    assert matrix.resumed_end(folder, name) == matrix.end_of(folder / "whole")
