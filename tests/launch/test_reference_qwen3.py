"""Against transformers' Qwen3 in a plain PyTorch loop: benchmarks/slm_10m_qwen3.py, small in fp32 and as it is."""

import csv
import gzip
from pathlib import Path

import pytest

from benchmarks import slm_10m_qwen3
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.schedule import learning_rate
from tests.support import runs

PROGRAM = runs.ROOT / "benchmarks" / "slm_10m_qwen3.py"
SMALL = [
    "model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=96", "model.num_attention_heads=4",
    "model.head_dim=16", "model.vocab_size=320", "tokenizer.vocab_size=320", "data.seq_len=64", "data.val_fraction=0.1",
    "train.global_batch_tokens=256", "train.precision=fp32", "optimizer.lr=1e-3",
]  # fmt: skip
"""slm-10m's recipe with another size: QK-norm, grouped queries, tied head, z-loss, decay groups and clipping stay."""


def command(prose: Path, out: Path, *flags: str) -> list[str]:
    return [str(runs.BIN / "python"), str(PROGRAM), str(prose), "--out", str(out), *flags]


def curves(out: Path) -> list[dict[str, float]]:
    """The lines of the CSV; an empty cell is left out."""
    with (out / "slm_10m_qwen3.csv").open() as file:
        return [{name: float(cell) for name, cell in line.items() if cell} for line in csv.DictReader(file)]


def records(losses: list[float], held_out: float) -> list[slm_10m_qwen3.Record]:
    """A run that has these losses and this one on all held-out rows."""
    steps = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    end = {"step": len(losses), "loss": held_out}
    return [*steps, {"kind": "val", **end}, {"kind": "eval", **end}]


@pytest.mark.parametrize("steps", [3, 300])
def test_what_is_changed_in_the_recipe(steps: int) -> None:
    """Oracle: the recipe of the library; what the README says of the batch and the schedule."""
    published, changed = loading.load("slm-10m"), loading.load("slm-10m", slm_10m_qwen3.overrides(steps))
    places = {place for place in resume_rules.changes(published, changed) if not place.startswith("run.")}
    assert places == {
        "train.steps", "train.global_batch_tokens", "schedule.warmup_steps", "schedule.decay_start_step",
        "schedule.decay_steps", "optimizer.lr", "optimizer.min_lr", "data.val_fraction",
    }  # fmt: skip
    assert changed.rows_per_step == 4
    assert learning_rate(changed, changed.schedule.warmup_steps) == 3e-4
    assert learning_rate(changed, steps) == pytest.approx(3e-5)


def test_curves_that_part_are_found() -> None:
    """Oracle: curves made up to be 0.03 apart in one place each; not-a-number is no agreement."""
    same = records([3.0] * 40, 3.0)
    assert slm_10m_qwen3.misses(slm_10m_qwen3.compare(same, records([3.019] * 40, 3.019))) == []
    for other in (records([3.0] * 20 + [3.03] * 20, 3.0), records([3.0] * 40, 3.03), records([3.0] * 40, float("nan"))):
        assert len(slm_10m_qwen3.misses(slm_10m_qwen3.compare(same, other))) == 1


def test_another_folder_is_refused(tmp_path: Path) -> None:
    """Nothing is written where a file is missing."""
    done = runs.run(command(tmp_path, tmp_path / "out"), cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "openstax_val.jsonl" in done.stderr
    assert not list(tmp_path.iterdir())


def test_three_steps_are_qwen3s(tmp_path: Path) -> None:
    """Oracle: transformers' Qwen3 with torch's loss, clipping and AdamW, fp32, from the same weights on the same rows.

    The whole program runs: prepare, two ranks under DeepSpeed, the loop, the comparison.
    """
    for seed, file in enumerate(slm_10m_qwen3.SOURCES.values()):
        text = runs.write_corpus(tmp_path / "corpus.jsonl", seed=seed).read_bytes()
        (tmp_path / file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)
    settings = [word for pair in SMALL for word in ("--set", pair)]
    done = runs.run(command(tmp_path, tmp_path / "out", "--steps", "3", *settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = curves(tmp_path / "out")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        for name in ("loss", "val", "grad_norm"):
            assert line[f"ours_{name}"] == pytest.approx(line[f"qwen3_{name}"], abs=1e-4)
    assert steps[2]["qwen3_val"] < steps[0]["qwen3_val"] - 0.1  # the steps were taken
    assert (tmp_path / "out" / "slm_10m_qwen3.png").stat().st_size > 10_000
