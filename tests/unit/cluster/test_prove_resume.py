"""`ds-slm verify RUN --resume`: what it launches. What the launches show is in tests/faults/test_faults_proof.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_slm.cluster import prove_resume
from ds_slm.errors import CheckpointError
from tests.support import runs


@pytest.mark.parametrize(
    ("kernels", "wanted"),
    [
        ({"blocks": "compiled"}, {"compile_blocks": True}),
        ({"blocks": "eager"}, {"compile_blocks": False}),
        ({}, {}),
    ],
)
def test_it_computes_as_the_run_did_and_in_a_fixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: dict[str, str], wanted: dict[str, bool]
) -> None:
    """Oracle: by hand: the run's own stage, micro-batch, form of blocks and base; a GPU needs the fixed order."""
    zero: dict[str, Any] = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}
    run = tmp_path / "run"
    run.mkdir()
    runs.write_recipe(tmp_path).rename(run / "recipe.toml")
    facts = {"recipe_name": "tiny", "world_size": 2, "backend": "gloo", "kernels": kernels, "base_folder": "/base"}
    (run / "env.json").write_text(json.dumps(facts))
    (run / "ds_config.json").write_text(json.dumps(zero | {"gradient_clipping": 1.0}))

    launched: list[list[str]] = []
    monkeypatch.setattr(prove_resume.launch, "run", lambda command, *_, **__: launched.append(command) or 1)
    with pytest.raises(CheckpointError, match="the run without interruption failed"):
        prove_resume.prove(run, [], tmp_path / "scratch", lambda line: None)
    assert json.loads((tmp_path / "scratch" / "ds_config.json").read_text()) == zero | wanted | {"deterministic": True}
    assert launched[0][launched[0].index("--base") + 1] == "/base"


@pytest.fixture
def run_to_prove(tmp_path: Path) -> Path:
    """A run folder that says what was launched: one rank, 2 steps."""
    run = tmp_path / "run"
    run.mkdir()
    runs.write_recipe(tmp_path, text=runs.TINY.replace("steps = 20", "steps = 2")).rename(run / "recipe.toml")
    facts = {"recipe_name": "tiny", "world_size": 1, "backend": "gloo"}
    (run / "env.json").write_text(json.dumps(facts))
    zero = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2}
    (run / "ds_config.json").write_text(json.dumps(zero))
    return run


@pytest.mark.parametrize(
    ("code", "saved", "problem"),
    [(1, [2], None), (0, [2], "that was to be killed was not"), (1, [], "failed before step 2 was saved")],
)
def test_the_deliberate_kill_is_told_calmly(
    code: int, saved: list[int], problem: str | None, run_to_prove: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what the killed launch prints is shown only if it did not end as intended."""
    launched: list[list[str]] = []

    def launch(command: list[str], environ: Any, stdout: Any, stderr: Any) -> int:
        launched.append(command)
        if "DS_SLM_DIE_AT" not in environ:
            return 0
        print("Traceback: Connection closed by peer", file=stderr)
        return code

    monkeypatch.setattr(prove_resume.launch, "run", launch)
    monkeypatch.setattr(prove_resume.checkpoint_files, "steps", lambda folder: saved)
    monkeypatch.setattr(prove_resume, "differences", lambda whole, resumed: iter(()))
    told: list[str] = []
    if problem:
        with pytest.raises(CheckpointError, match=problem):
            prove_resume.prove(run_to_prove, [], run_to_prove / "scratch", told.append)
    else:
        assert prove_resume.prove(run_to_prove, [], run_to_prove / "scratch", told.append) == []
        assert told[2:] == ["killed as intended; resumed from step 2"]
    assert ("Traceback" in capfd.readouterr().err) == (problem is not None)
    assert all("train.steps=4" in command for command in launched)
