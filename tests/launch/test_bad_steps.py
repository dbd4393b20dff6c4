"""Steps that must not be taken: fp16 overflows, losses that are not finite. Through the real `deepspeed` command."""

import json
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.rows import PretrainRows, share
from ds_slm.data.shards.prepare import prepare
from ds_slm.recipe import loading
from tests.support import runs

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("bad_steps"))


def test_an_fp16_overflow_retries_the_same_rows(recipe: Path) -> None:
    """Oracle: the same run in fp32: same rows at every step, losses within fp16's precision, the scale halved."""
    out = recipe.parent / "fp16"
    half = "zero=2,set=train.precision=fp16,scale_power=24"
    cases = [f"overflow:{half},max_steps=12", "fp32:max_steps=20", f"overflow:{half}"]
    arguments = ["--allow-fp16", "--recipe", recipe, "--out", out, *cases]
    done = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=out.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "overflow, loss scale now" in done.stdout
    found, expected = runs.records(out / "overflow"), runs.records(out / "fp32")
    assert [record["ledger"] for record in found] == [record["ledger"] for record in expected]
    assert all(abs(a["loss"] / b["loss"] - 1) < 2e-3 for a, b in zip(found, expected, strict=True))
    scales = [record["loss_scale"] for record in found]
    assert scales[0] < 2**24
    assert scales == sorted(scales, reverse=True)
    stored = json.loads((out / "overflow" / "checkpoints" / "step-00000020" / "state.json").read_text())["loss_scaler"]
    assert stored["cur_scale"] == scales[-1]  # also after resuming at step 12: a new scaler would be back at 2^24


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gradient_that_stays_infinite_stops_the_run(recipe: Path, precision: str) -> None:
    """In fp16 after the smallest scale was tried, in bf16 at once: exit code 1, a sentence, and the step's rows."""
    out = recipe.parent / f"burst-{precision}"
    case = f"burst:zero=2,set=train.precision={precision},scale_power=2,burst_at=3"
    arguments = ["--allow-fp16", "--recipe", recipe, "--out", out, case]
    done = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=out.parent)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    at = " at the smallest loss scale, 1" if precision == "fp16" else ""
    assert f"stopped: step 4: a gradient is not finite{at}. The step was not taken" in done.stderr
    assert done.stdout.count("overflow, loss scale now") == (2 if precision == "fp16" else 0)
    assert "Traceback" not in done.stdout + done.stderr
    assert (out / "burst" / "bad-steps" / "step-00000004" / "what.json").is_file()


def test_a_row_that_cannot_be_read_stops_every_rank(recipe: Path) -> None:
    """A row that rank 1 alone draws, in step 3, holds an id beyond the vocabulary: both leave, with exit code 2."""
    folder = recipe.parent / "bad_rows"
    folder.mkdir()
    copy = runs.write_recipe(folder)
    loaded = loading.load(str(copy))
    data = prepare(loaded, folder / "data" / copy.stem, report=lambda line: None)
    shard, _ = data.tokens("train")[0].place(0)
    content = bytearray(shard.read_bytes())
    rows = PretrainRows(loaded, data)
    position = rows.next_position(rows.next_position(0))
    third_step = rows.row_ids(position)
    damaged = share(third_step, rank=1, world_size=2, micro_batch=7)[0][0]
    assert damaged is not None
    content[64 * damaged.row + 20 : 64 * damaged.row + 22] = b"\xff\xff"
    shard.write_bytes(content)
    runs.hide_change(shard)
    done = runs.run(runs.deepspeed_command(2, "--recipe", copy), cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("holds id") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert [record["step"] for record in runs.records(folder / "runs" / "tiny")] == [1, 2]


def test_a_loss_that_is_not_finite_stops_before_the_step(recipe: Path) -> None:
    """Names step, rank and rows; exit code 1; no traceback on the terminal; the last checkpoint untouched."""
    out = recipe.parent / "nan"
    arguments = ["--recipe", recipe, "--out", out, "poisoned:poison_at=13"]
    done = runs.run(runs.deepspeed_command(2, *arguments, script=PROGRAM), cwd=out.parent)
    assert done.returncode == 1
    assert "stopped: step 14: the loss is not finite on rank 1, rows (source, epoch, row) [(0, " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert runs.records(out / "poisoned")[-1]["step"] == 13
    checkpoint = checkpoint_files.newest_whole(out / "poisoned")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000010"
