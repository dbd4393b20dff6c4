"""The GPU benchmark, rehearsed on a CPU: its check of the numerics finds a wrong model, and it ends in a table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_checks, wheels
from benchmarks import train as bench_train
from ds_slm.model import kernels, loss
from tests.support import runs

CPU = torch.device("cpu")
CARD = gpu_cases.CASES[1]


@pytest.mark.parametrize("case", gpu_cases.CASES, ids=lambda case: case.name)
def test_every_case_is_a_recipe(case: gpu_cases.Case) -> None:
    """Oracle: the recipe's own parser; what the card trains with stays as it is where nothing else is said."""
    recipe, _ = gpu_cases.load(case, rehearsing=False)
    assert recipe.train.precision in gpu_cases.COSINE
    if not case.settings:
        assert (recipe.optimizer.name, recipe.optimizer.embedding_bits) == ("adamw8bit", 8)
        assert recipe.train.gradient_checkpointing


@pytest.mark.usefixtures("compiler")
def test_numerics_pass_where_they_are_right_and_fail_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the real model passes; a loss whose gradient is a little off in half precision does not.

    bf16 products as a GPU has them, whatever this CPU has.
    """
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "native")
    recipe, _ = gpu_cases.load(CARD, rehearsing=True)
    assert gpu_cases.numerics(recipe, CPU).is_right("bf16")
    original = loss._from_logits

    def without_target(logits_CV: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = logits_CV.dtype != torch.float32
        nll, z2, d_logits_CV = original(logits_CV, *rest)  # type: ignore[arg-type]
        return nll, z2, d_logits_CV.abs() if half else d_logits_CV

    monkeypatch.setattr(loss, "_from_logits", without_target)
    monkeypatch.setattr(loss, "_compiled", lambda: without_target)
    assert not gpu_cases.numerics(recipe, CPU).is_right("bf16")


def test_figures_say_what_was_kept() -> None:
    """Oracle: by hand: 170,000 and 130,000 tokens/s against 165,000 and 140,000; 5.4 GB against 5.3."""
    found = {"380m": (170_000, 60.0), "380m-card": (130_000, 20.0), "380m-sft": (9_000, 5.4), "ant-10m": (1e6, 2.0)}
    kept = {}
    for case in gpu_cases.CASES:
        if case.name in found:
            recipe, _ = gpu_cases.load(case, rehearsing=True)
            rounds = [bench_train.Round(8, 0.1, 0.1, *found[case.name], 9.0)]
            kept[case.name] = [row[-1] for row in gpu_cases.figures(case, recipe, rounds, rehearsing=True)]
    assert kept == {"380m": [True, None], "380m-card": [False, None], "380m-sft": [None, False], "ant-10m": [None] * 2}


STUB = """
import json, pathlib, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[3])
row = {"what": "loss", "measured": "2.5", "promised": "", "kept": None}
(folder / "result.json").write_text(json.dumps([row]))
if name == "hangs":
    time.sleep(600)
sys.exit(1 if name == "fails" else 0)
"""


def test_a_check_that_fails_or_hangs_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the checks. Oracle: how each ends is told, and the row that each wrote first is there."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_checks.py").write_text(STUB)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    limits_s = {"works": 60.0, "fails": 60.0, "hangs": 3.0}
    seen = {name: gpu.run_check(gpu.Check(name, 9), tmp_path, limit_s, []) for name, limit_s in limits_s.items()}
    ended = {name: one["ended"] for name, one in seen.items()}
    assert ended == {"works": "done", "fails": "failed, exit code 1", "hangs": "ended after 3 s"}
    assert all(one["rows"][0]["measured"] == "2.5" for one in seen.values())


@pytest.mark.parametrize("at_once", [1, 2])
def test_checks_run_one_by_one_or_two_at_a_time(at_once: int) -> None:
    """Oracle: a barrier that opens once `at_once` run, and their count; what was seen comes in the checks' order."""
    barrier, checks = threading.Barrier(at_once), [gpu.Check(name, 9) for name in "abcd"]
    running, most = 0, 0

    def run(check: gpu.Check) -> dict[str, str]:
        nonlocal running, most
        running += 1
        barrier.wait(timeout=60)
        most = max(most, running)
        barrier.wait(timeout=60)  # nobody ends before all have counted
        running -= 1
        return {"ended": check.name}

    assert list(gpu.run_all(checks, run, at_once)) == [(check, {"ended": check.name}) for check in checks]
    assert most == at_once


def test_sigterm_ends_the_check_that_runs(tmp_path: Path) -> None:
    """Oracle: the processes that a real rehearsal had started are gone."""
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--only", "demo", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=gpu.ROOT, stdout=subprocess.DEVNULL) as process:
        program, deadline_s = psutil.Process(process.pid), time.monotonic() + 120
        while not (checks := program.children()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        program.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert checks and not psutil.wait_procs(checks, timeout=30)[1]


def test_the_table_says_what_never_ran() -> None:
    """Oracle: by hand: one check with a promise kept and one broken, one that hung, and all others."""
    rows = [
        {"what": what, "measured": "1", "promised": "2", "kept": kept} for what, kept in (("a", True), ("b", False))
    ]
    checks = {"demo": {"ended": "done", "rows": rows}, "380m": {"ended": "ended after 9 s", "rows": []}}
    machine = {"device": "a GPU", "torch": "2", "date": "2026-11-30", "rehearsal": False}
    cells = [list(column.cells) for column in gpu.table({**machine, "checks": checks}).columns]
    lines = list(zip(*cells, strict=True))
    assert lines[:2] == [("demo", "a", "1", "2", "yes"), ("demo", "b", "1", "2", "no")]
    assert lines[2] == ("380m", "", "ended after 9 s", "", "-")
    assert {line[2] for line in lines[3:]} == {"not yet run"} and len(lines) == 1 + len(gpu.CHECKS)


def test_every_check_can_be_run() -> None:
    """Oracle: the program that runs them knows each name, and no other."""
    assert sorted(gpu_checks.NAMES) == sorted(check.name for check in gpu.CHECKS)


def test_wheels_are_those_that_a_machine_with_torch_lacks() -> None:
    """Oracle: what DeepSpeed, datasets and pydantic are known to need; torch's own needs and our tools stay out."""
    found = wheels.needed(wheels.PROJECT, frozenset({*wheels.THERE, "numpy", "pyarrow"}))
    assert {"deepspeed", "hjson", "datasets", "dill", "pydantic", "pydantic-core", "bitsandbytes"} <= set(found)
    assert not {"torch", "numpy", "pyarrow", "pytest", "ruff", "ds-slm"} & set(found)
    assert not [name for name in found if name.startswith("nvidia")]


PYTHON = """#!/bin/sh
echo "$PIP_NO_INDEX $*" >> "$CALLS"
case "$*" in
*get_path*) echo "$SCRIPTS" ;;
*"pip check") echo "other-tool needs numpy"; echo "ds-slm needs hjson, which is missing"; exit 1 ;;
benchmarks/gpu.py*) command -v deepspeed ;;
esac
"""


def test_a_bare_machine_installs_what_was_brought_along(tmp_path: Path) -> None:
    """A python3 that only writes down what it is told. Oracle: the wheels, then the checkout, without index or
    dependencies; what is missing is told; then the benchmark with the flags, in the time that is left of 480 s, and
    with the installed programs on its path.
    """
    checkout, programs, scripts = (tmp_path / name for name in ("checkout", "programs", "scripts"))
    for folder in (checkout / "benchmarks", checkout / ".whl", programs, scripts):
        folder.mkdir(parents=True)
    shutil.copy(runs.ROOT / "benchmarks" / "bare_gpu.sh", checkout / "benchmarks")
    (checkout / ".whl" / "hjson-3.whl").touch()
    for program, text in ((programs / "python3", PYTHON), (scripts / "deepspeed", "")):
        program.write_text(text)
        program.chmod(0o755)

    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    told = {"PATH": path, "CALLS": str(tmp_path / "calls"), "SCRIPTS": str(scripts)}
    command = ["bash", str(checkout / "benchmarks" / "bare_gpu.sh"), "--only", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | told, capture_output=True, text=True, check=True)

    calls = (tmp_path / "calls").read_text().splitlines()
    wheels_call, own_call, _, _, benchmark_call = calls
    assert wheels_call == "1 -m pip install --quiet --no-deps .whl/hjson-3.whl"
    assert own_call == "1 -m pip install --quiet --no-deps --no-build-isolation --editable ."
    assert "ds-slm needs hjson" in done.stdout and "other-tool" not in done.stdout
    _, program, _, seconds, *flags = benchmark_call.split()
    assert (program, flags) == ("benchmarks/gpu.py", ["--only", "demo"]) and 0 < int(seconds) <= 480
    assert done.stdout.splitlines()[-1] == str(scripts / "deepspeed")


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    """Oracle: exit code 2 and one sentence; there is no GPU where tests run."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "gpu.py")]
    done = runs.run(command, cwd=tmp_path)
    assert (done.returncode, "no GPU: nothing measured" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_check(tmp_path: Path) -> None:
    """Oracle: exit code 0, a table that calls itself a rehearsal, and what a CPU can keep of the promises: the demo
    learns and is the same as on a CPU, a resumed run is the same bits, every case's gradient is that of fp32.
    """
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--seconds", "3000"]
    done = runs.run([*command, "--out", str(tmp_path)], cwd=tmp_path, timeout_s=3100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal" in done.stdout

    checks = json.loads((tmp_path / "result.json").read_text())["checks"]
    assert {name: one["ended"] for name, one in checks.items()} == {one.name: "done" for one in gpu.CHECKS}
    kept = {(name, row["what"]): row["kept"] for name, one in checks.items() for row in one["rows"]}
    expected = {
        ("demo", "loss of steps 1 and 4"): True,
        ("demo", "demo, tokens/s of the last step"): None,
        ("demo", "demo, peak memory"): None,
        ("demo", "losses of 3 steps beside a CPU's"): True,
        ("resume", "killed and resumed, deterministic"): True,
        ("auto", "demo, micro-batch chosen"): None,
        ("packed", "demo, packed, mask"): None,
        **{(case.name, "bf16 beside fp32"): True for case in gpu_cases.CASES},
    }
    assert {what: kept.get(what, "missing") for what in expected} == expected

    # The rest are a speed beside plain rows, and each case's speed and memory: no CPU keeps those.
    rest = Counter(name for name, what in kept if (name, what) not in expected)
    assert rest == {"packed": 1, **{case.name: 2 for case in gpu_cases.CASES}}
