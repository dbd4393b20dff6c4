"""The GPU benchmark, rehearsed on a CPU: its check of the numerics finds a wrong model, and it ends in a table."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks import train as bench_train
from ds_slm.model import kernels, loss
from tests.support import runs

CPU = torch.device("cpu")
CARD = gpu.CASES[1]


@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: case.name)
def test_every_case_is_a_recipe(case: gpu.Case) -> None:
    """Oracle: the recipe's own parser; what the card trains with stays as it is where nothing else is said."""
    recipe, _ = gpu.load(case, rehearsing=False)
    assert recipe.train.precision in gpu.COSINE
    if not case.settings:
        assert (recipe.optimizer.name, recipe.optimizer.embedding_bits) == ("adamw8bit", 8)
        assert recipe.train.gradient_checkpointing


@pytest.mark.usefixtures("compiler")
def test_numerics_pass_where_they_are_right_and_fail_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the real model passes; a loss whose gradient is a little off in half precision does not.

    bf16 products as a GPU has them, whatever this CPU has.
    """
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "native")
    recipe, _ = gpu.load(CARD, rehearsing=True)
    assert gpu.numerics(recipe, CPU).is_right("bf16")
    original = loss._from_logits

    def without_target(logits_CV: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = logits_CV.dtype != torch.float32
        nll, z2, d_logits_CV = original(logits_CV, *rest)  # type: ignore[arg-type]
        return nll, z2, d_logits_CV.abs() if half else d_logits_CV

    monkeypatch.setattr(loss, "_from_logits", without_target)
    monkeypatch.setattr(loss, "_compiled", lambda: without_target)
    assert not gpu.numerics(recipe, CPU).is_right("bf16")


def test_the_table_says_what_was_kept_and_what_never_ran() -> None:
    """Oracle: by hand: 170,000 and 130,000 tokens/s against 165,000 and 140,000; 5.1 GB against 5.0."""
    rounds = {"380m": (170_000, 60.0), "380m-card": (130_000, 20.0), "380m-sft": (9_000, 5.1), "slm-10m": (1e6, 2.0)}
    found = {name: [bench_train.Round(8, 0.1, 0.1, *figures, 9.0)] for name, figures in rounds.items()}
    cells = [list(column.cells) for column in gpu.table(found, "a GPU", 1e15, rehearsing=False).columns]
    rows = {row[0]: row for row in zip(*cells, strict=True)}
    assert [rows[name][-1] for name in rounds] == ["yes", "no", "no", "-"]
    assert rows["ant-10m"][3] == "not yet run" and rows["ant-10m"][-1] == "-"


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    """Oracle: exit code 2 and one sentence; there is no GPU where tests run."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "gpu.py")]
    done = runs.run(command, cwd=tmp_path)
    assert (done.returncode, "no GPU: nothing measured" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_case(tmp_path: Path) -> None:
    """Oracle: exit code 0, figures for all, and a table that calls itself a rehearsal."""
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--rounds", "1"]
    done = runs.run([*command, "--out", str(tmp_path)], cwd=tmp_path, timeout_s=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(len(result["cases"][case.name]["rounds"]) == 1 for case in gpu.CASES)
    assert done.stdout.count("rehearsal") == len(gpu.CASES)
