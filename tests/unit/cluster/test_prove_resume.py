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
