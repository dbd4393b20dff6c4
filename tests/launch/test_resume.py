"""A run that was killed and resumed is the run that was not: through the real `deepspeed` command, on two ranks.

Three launches train all cases: without interruption; stopped, and the last case killed with SIGKILL; resumed. The
oracle is the uninterrupted run, bit for bit. An epoch ends within the step at which they stop, and later ones follow.
"""

import json
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards import prepared
from ds_slm.recipe import loading
from tests.support import runs

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"
STEPS, STOP_AT, SAVE_EVERY = 27, 7, 5
CASES = {
    "zero1-adamw": ("zero=1", "set=optimizer.name=adamw"),
    "zero1-fp32-adamw": ("zero=1", "set=optimizer.name=adamw", "set=train.precision=fp32"),
    "zero2-adamw": ("zero=2", "set=optimizer.name=adamw"),
    "zero2-adamw8bit": ("zero=2", "set=optimizer.name=adamw8bit"),
    "zero3-adamw8bit": ("zero=3", "set=optimizer.name=adamw8bit", "set=optimizer.embedding_bits=8"),
    "zero1-adamw8bit": ("zero=1", "set=optimizer.name=adamw8bit"),
}
KILLED = "zero1-adamw8bit"
"""The last case: a process that is killed runs no other after it."""
SHARED = (f"set=train.steps={STEPS}", f"set=run.save_every_steps={SAVE_EVERY}", "set=train.precision=bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `whole`, the uninterrupted runs, and `resumed`."""
    folder = tmp_path_factory.mktemp("resume")
    runs.write_corpus(folder / "corpus.jsonl", documents=runs.SHORT_EPOCH)
    recipe = runs.write_recipe(folder)

    def launch(out: str, **extra: str) -> int:
        cases = [f"{name}:{','.join((*SHARED, *settings, extra.get(name, '')))}" for name, settings in CASES.items()]
        arguments = ["--recipe", recipe, "--out", folder / out, *cases]
        done = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=folder, timeout_s=600)
        (folder / f"{out}.log").open("a").write(done.stdout + done.stderr)
        return done.returncode

    assert launch("whole") == 0, (folder / "whole.log").read_text()[-3000:]
    stops = {name: f"kill_at={STOP_AT}" if name == KILLED else f"max_steps={STOP_AT}" for name in CASES}
    assert launch("resumed", **stops) != 0, "the killed case was not killed"
    expected = {name: SAVE_EVERY if name == KILLED else STOP_AT for name in CASES}
    assert {name: checkpoint_files.steps(folder / "resumed" / name)[-1] for name in CASES} == expected
    assert not any((folder / "resumed" / name / "done.json").exists() for name in CASES)
    assert launch("resumed") == 0, (folder / "resumed.log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_resuming_is_bit_exact(folder: Path, name: str) -> None:
    """Oracle: the uninterrupted run. Every step's loss, gradient norm and ledger, and the last weights and moments."""
    whole, resumed = (runs.records(folder / kind / name) for kind in ("whole", "resumed"))
    kept = ("step", "tokens", "loss", "z_loss", "lr", "grad_norm", "ledger")
    assert [[record[key] for key in kept] for record in resumed] == [[record[key] for key in kept] for record in whole]
    files = [
        json.loads((folder / kind / name / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())["files"]
        for kind in ("whole", "resumed")
    ]
    assert {file: content for file, content in files[0].items() if file.endswith(".safetensors")} == {
        file: content for file, content in files[1].items() if file.endswith(".safetensors")
    }
    assert ("optimizer-absmax.safetensors" in files[0]) == name.endswith("8bit")


def test_an_epoch_ends_where_they_stop(folder: Path) -> None:
    """Oracle: the order of rows itself; the killed case takes this step twice, the others go on right behind it."""
    recipe = loading.load(str(folder / "tiny.toml"))
    rows = PretrainRows(recipe, prepared.open_prepared(recipe, folder / "data" / "tiny"))
    epochs = [{row.epoch for row in rows.row_ids(step * recipe.rows_per_step)} for step in range(STEPS)]
    assert epochs[STOP_AT - 2 : STOP_AT + 1] == [{0}, {0, 1}, {1}]
    assert max(epochs[-1]) > 2


@pytest.mark.parametrize("name", CASES)
def test_moments_are_there(folder: Path, name: str) -> None:
    """A checkpoint without moments would also be the same twice."""
    checkpoint = folder / "whole" / name / "checkpoints" / f"step-{STEPS:08d}"
    with checkpoint_files.open_tensors(checkpoint / "optimizer-exp_avg_sq.safetensors") as moments:
        model = checkpoint_files.read_model(checkpoint)
        assert sorted(moments.keys()) == sorted(model)
        assert all(moments.get_tensor(key).shape == model[key].shape for key in model)
        assert all(moments.get_tensor(key).max() > 0 for key in model)
    state = checkpoint_files.read_state(checkpoint)
    assert state["optimizer_steps"] == {"embeddings": STEPS, "matrices": STEPS, "rest": STEPS}


def test_rotation_keeps_the_newest_and_the_best(folder: Path) -> None:
    """Oracle: keep_last = 2, and the best of the evaluations at 10, 20 and 27."""
    run = folder / "whole" / "zero1-adamw"
    best = (run / "checkpoints" / "best").read_text().strip()
    losses = {record["step"]: record["loss"] for record in runs.records(run, "val")}
    assert best == f"step-{min(losses, key=lambda step: losses[step]):08d}"
    assert set(checkpoint_files.steps(run)) == {25, 27} | {int(best[5:])}
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000027"
    assert not list((run / "checkpoints").glob(".*.tmp-*"))


def test_generation_counts_launches(folder: Path) -> None:
    """Each launch writes its own number."""
    numbers = [
        json.loads((folder / kind / KILLED / "env.json").read_text())["generation"] for kind in ("whole", "resumed")
    ]
    assert numbers == [1, 2]
