"""What of training needs no process group."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from ds_slm import files
from ds_slm.checkpoint import resume
from ds_slm.checkpoint.best import Best
from ds_slm.checkpoint.manager import Checkpoints
from ds_slm.checkpoint.saving import Saved
from ds_slm.data.rows import Rows
from ds_slm.engine import optim, partitions
from ds_slm.errors import CheckpointError, ConfigError, ReplacedByNewerLaunch, run_program
from ds_slm.model import decoder, kernels
from ds_slm.recipe import ds_config, loading
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Optimizer
from ds_slm.run import folder
from ds_slm.run.launches import Launch
from ds_slm.run.records import Records
from ds_slm.run.report import Report
from ds_slm.train import agreement
from tests.support import runs
from tests.support.faults import fail_at


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loading.load(str(runs.write_recipe(tmp_path)))


def test_parameter_groups_cover_everything_once(recipe: Recipe) -> None:
    """Oracle: the model's own list of parameters. Norms have no decay and 32 bits."""
    model = decoder.build(recipe.model, 0)
    groups = {group["name"]: group for group in optim.parameter_groups(model, recipe.optimizer)}
    assert sorted(map(id, model.parameters())) == sorted(id(p) for group in groups.values() for p in group["params"])
    assert [p.ndim for p in groups["rest"]["params"]] == [1] * len(groups["rest"]["params"])
    assert (groups["rest"]["weight_decay"], groups["rest"]["optim_bits"]) == (0.0, 32)
    assert (groups["embeddings"]["weight_decay"], groups["embeddings"]["optim_bits"]) == (0.1, 32)
    assert (groups["matrices"]["weight_decay"], groups["matrices"]["optim_bits"]) == (0.1, 8)


def test_requantising_finds_the_same_codes() -> None:
    """Oracle: bitsandbytes' own state after steps; value / absmax must lead back to every code, in both maps."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5000))
    settings = Optimizer(name="adamw8bit", lr=1e-2)
    optimizer = optim._adamw8bit()([{"params": [parameter], "optim_bits": 8, "name": "x"}], lr=settings.lr)
    for scale in (1.0, 1e-3, 30.0):
        parameter.grad = torch.randn(5000) * scale * (torch.arange(5000) % 3 > 0)
        optimizer.step()
    state = optimizer.state[parameter]
    for codes, code_map, absmax in (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2")):
        scales = state[absmax].repeat_interleave(partitions.BLOCK)[:5000]
        values = state[code_map][state[codes].long()] * scales
        assert torch.equal(partitions.quantise(values, state[absmax], state[code_map]), state[codes])
        again = partitions.block_absmax(values)
        restored = state[code_map][partitions.quantise(values, again, state[code_map]).long()]
        error = (restored * again.repeat_interleave(partitions.BLOCK)[:5000] - values).abs()
        assert (error <= 0.02 * scales).all()  # the quantiser's own step near 1 is 1/64 of a block's largest


def test_a_block_of_zeros_stays_zero() -> None:
    """absmax 0 divides nothing."""
    from bitsandbytes.functional import create_dynamic_map

    code_map = create_dynamic_map(signed=True)
    codes = partitions.quantise(torch.zeros(300), torch.zeros(2), code_map)
    assert code_map[codes.long()].eq(0).all()


def test_ds_config_writes_out_what_deepspeed_would_guess(recipe: Recipe) -> None:
    """Clipping, accumulation in fp32, and the batch, whatever the file says of memory and speed."""
    engine_config = ds_config.join(recipe, {"zero_optimization": {"stage": 2}}, 3, "cpu", 1)
    assert (engine_config.micro_batch, engine_config.accumulation_steps, engine_config.filler_rows) == (1, 3, 2)
    assert engine_config.deepspeed["gradient_clipping"] == 1.0
    assert engine_config.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}
    assert engine_config.deepspeed["train_batch_size"] == 9
    assert engine_config.deepspeed["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("path", sorted((runs.ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_are_accepted(recipe: Recipe, path: Path) -> None:
    """Every file of the checkout joins with a recipe."""
    assert ds_config.join(recipe, ds_config.read(path), 2, "cpu", None).accumulation_steps >= 1


@pytest.mark.parametrize(
    ("name", "zero", "device", "world_size", "compiled"),
    [
        ("demo", {}, "cpu", 2, False),
        ("slm-10m", {}, "cpu", 2, True),
        ("gpt-s-1.4m", {}, "cuda", 1, True),
        ("gpt-s-1.4m", {}, "cuda", 16, False),
        ("demo", {"compile_blocks": True}, "cpu", 2, True),
        ("slm-10m", {"compile_blocks": False}, "cpu", 2, False),
        ("slm-10m", {"zero_optimization": {"stage": 3}}, "cpu", 2, False),
    ],
)
def test_long_runs_compile_their_blocks(
    name: str, zero: dict[str, Any], device: str, world_size: int, compiled: bool
) -> None:
    """Oracle: FLOPs of a run and device by hand: demo 1e13; slm-10m 1e18; gpt-s-1.4m 6e16, a sixteenth of it 4e15."""
    ds_file = {"zero_optimization": {"stage": 1}, **zero}
    engine_config = ds_config.join(loading.load(name), ds_file, world_size, device, None)
    assert engine_config.compiled is compiled
    assert "compile_blocks" not in engine_config.deepspeed


@pytest.mark.parametrize("deterministic", [True, False])
def test_sums_are_fp32_and_in_a_fixed_order_where_asked(recipe: Recipe, deterministic: bool) -> None:
    """Oracle: torch's own switches, all of which a GPU's products or attention read; and what a run says of itself."""
    ds_file = {"zero_optimization": {"stage": 1}, "deterministic": deterministic}
    engine_config = ds_config.join(recipe, ds_file, 1, "cuda", None)
    assert engine_config.deterministic is deterministic and "deterministic" not in engine_config.deepspeed
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    try:
        kernels.fix_sums(engine_config.deterministic)
        assert not products.allow_bf16_reduced_precision_reduction and not products.allow_fp16_accumulation
        assert not products.allow_fp16_reduced_precision_reduction and not products.allow_tf32
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        said = kernels.effective_kernels("cuda", torch.bfloat16)["sums"]
        assert said == ("fp32, in a fixed order (deterministic)" if deterministic else "fp32, in any order")
    finally:
        kernels.fix_sums(deterministic=False)


def test_hosts_that_multiply_in_different_ways_are_told() -> None:
    """Oracle: by hand: a host with bf16 instructions beside one without; and two of one kind."""
    [told] = agreement.mixed_products(["new", "new", "old"], ["cpu bfloat16", "cpu bfloat16", "cpu fp32, upcast"])
    assert "(new: cpu bfloat16; old: cpu fp32, upcast)" in told
    assert agreement.mixed_products(["one", "two"], ["cpu bfloat16", "cpu bfloat16"]) == []


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_deterministic_is_yes_or_no(recipe: Recipe, value: object) -> None:
    """Oracle: the refusal, by name."""
    with pytest.raises(ConfigError, match=f"deterministic = {value!r}: expected true or false"):
        ds_config.join(recipe, {"zero_optimization": {"stage": 1}, "deterministic": value}, 1, "cpu", None)


@pytest.mark.parametrize(("value", "stage"), [("yes", 1), (1, 1), (True, 3)])
def test_compiling_what_cannot_be_is_refused(recipe: Recipe, value: object, stage: int) -> None:
    """A word that means nothing, and compiled blocks where ZeRO-3 fetches their weights."""
    with pytest.raises(ConfigError, match="compile_blocks"):
        ds_config.join(recipe, {"zero_optimization": {"stage": stage}, "compile_blocks": value}, 1, "cpu", None)


def test_every_conflict_is_told_at_once(recipe: Recipe) -> None:
    """Owner, nearest key and stage, in one error."""
    bad = {"scheduler": {}, "wall_clock_breakdwn": True, "zero_optimization": {"stage": 1, "reduce_buket_size": 1}}
    with pytest.raises(ConfigError) as caught:
        ds_config.join(recipe, {**bad, "train_micro_batch_size_per_gpu": 0}, 1, "cpu", None)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(part in told for part in ("[schedule]", "wall_clock_breakdown", "reduce_bucket_size", "= 0"))


def test_records_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    """A run killed after step 3 and resumed at step 2 holds step 3 once, and a half-written line is no obstacle."""
    with (tmp_path / "terminal.txt").open("w") as terminal:
        lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2, 3)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
        report = Report(terminal, Records(tmp_path, print, 2), total_steps=3, first_step=2)
        report.record("train", 3, {"loss": 2.0, "tokens_per_s": 1.0, "step_s": 1.0})
        report.close()
    assert [(record["step"], record["loss"]) for record in runs.records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_an_older_launch_records_nothing(tmp_path: Path) -> None:
    """Another launch is in env.json, with the same number: the older one's records stay out, the newer one's go in.

    One that finds a newer launch there when it begins drops none of that one's records.
    """
    with (tmp_path / "terminal.txt").open("w") as terminal:
        reports = []
        for launch in (Launch(1, "b"), Launch(1, "c")):
            (tmp_path / "env.json").write_text(json.dumps(launch.facts()))
            reports.append(Report(terminal, Records(tmp_path, print, launch=launch), total_steps=3))
        for number, report in enumerate(reports, start=1):
            report.record("train", number, {"loss": float(number), "tokens_per_s": 1.0, "step_s": 1.0})
            report.close()
        with pytest.raises(ReplacedByNewerLaunch):
            Records(tmp_path, print, launch=Launch(1, "b"))
    assert [record["loss"] for record in runs.records(tmp_path)] == [2.0]


def test_a_full_disk_leaves_no_rest_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk without room fails while a small file is replaced, and does not say which file it was.

    Oracle: the old file as it was, nothing beside it; exit code 2 and a sentence.
    """
    (tmp_path / "env.json").write_text("old")
    with fail_at("syncing"):
        assert run_program(lambda: files.replace_text(tmp_path / "env.json", "new")) == 2
    assert capsys.readouterr().err == "error: a disk: No space left on device.\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    """Oracle: refused with the steps there are; where there are none at all, the run is simply new."""
    alone: Any = SimpleNamespace(leads_host=True, rank=0, gather=lambda value: [value])
    assert resume.find(alone, tmp_path, {}) is None
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="steps 10, 20, none of them whole"):
        resume.find(alone, tmp_path, {})


def test_changes_of_a_resumed_recipe_are_recorded(tmp_path: Path, recipe: Recipe) -> None:
    """What may change does, and is written down with the launch's number."""
    (tmp_path / "tokenizer").mkdir()
    folder.describe(tmp_path / "run", recipe, {}, {"generation": 1}, tmp_path / "tokenizer")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 30})})
    folder.refuse_foreign(tmp_path / "run", longer, "auto", allow_change=False)
    folder.describe(tmp_path / "run", longer, {}, {"generation": 2}, tmp_path / "tokenizer")
    recorded = json.loads((tmp_path / "run" / "changes.jsonl").read_text())
    assert recorded == {"generation": 2, "step": 0, "changes": {"train.steps": [20, 30]}}


def test_rows_of_weight_zero_change_nothing(recipe: Recipe) -> None:
    """Filler rows: the sums of a batch and of the same batch with fillers are equal to the bit."""
    model = decoder.build(recipe.model, 0)
    ids = np.random.default_rng(0).integers(0, 320, (3, 33))
    rows = Rows(ids, np.ones((3, 32), np.float32))
    padded = Rows(np.concatenate([ids, ids[:1] * 0]), np.concatenate([rows.weights, np.zeros((1, 32), np.float32)]))
    sums = [
        model(
            torch.from_numpy(one.input_ids), torch.from_numpy(one.target_ids), torch.from_numpy(one.weights), None, 1e-4
        )
        for one in (rows, padded)
    ]
    assert float(sums[0].weight) == float(sums[1].weight) == 96
    torch.testing.assert_close(sums[0].objective, sums[1].objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 32])
def test_pieces_take_the_same_step_as_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bitsandbytes' own step of the whole tensor, bit by bit: weights, moments and scales after three steps."""
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(optim, "CPU_PIECE", 1_024)
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(5_003, generator=generator)
    gradients = torch.randn(3, 5_003, generator=generator)
    ours, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    group = {"params": [ours], "optim_bits": bits, "name": "x"}
    whole = AdamW8bit([theirs], **options, min_8bit_size=0 if bits == 8 else 10_000)
    pieces = optim._adamw8bit()([group], **options)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        pieces.step()
        whole.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, begin)
    states = [
        {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        for optimizer, parameter in ((pieces, ours), (whole, theirs))
    ]
    assert states[0].keys() == states[1].keys() and (("absmax1" in states[0]) == (bits == 8))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_failed_save_leaves_the_best_what_it_was() -> None:
    """Oracle: by hand: 2.0 at step 10 is durable, 1.5 at step 20 was not saved: 1.8 at step 30 is the best."""
    outcomes = [Saved(("host",)), Saved(failed=("host: the disk is full",)), Saved(("other",), ("host: full",))]
    begun: list[tuple[int, int]] = []
    background: Any = SimpleNamespace(
        finish=lambda: outcomes.pop(0) if begun else None,
        begin=lambda content: begun.append((content["step"], content["best_step"])),
        engine=SimpleNamespace(loss_scaler=None, recipe=SimpleNamespace(run=SimpleNamespace(eval_rows=8))),
        run=None, control=None, say=None,
    )  # fmt: skip
    checkpoints = Checkpoints(background, {})
    for step, loss in ((10, 2.0), (20, 1.5), (30, 1.8)):
        checkpoints.save(resume.State(step=step, evaluated_step=step), loss)
    checkpoints.wait()
    assert begun == [(10, 10), (20, 20), (30, 30)]
    assert checkpoints.best == checkpoints._durable_best == Best(1.8, 30, eval_rows=8)


@pytest.mark.parametrize("which", ["metrics.jsonl", "events"])
def test_a_full_disk_costs_records_not_the_run(tmp_path: Path, which: str) -> None:
    """Oracle: /dev/full refuses every write: told once, no error."""
    with (tmp_path / "terminal.txt").open("w+") as terminal:
        records = Records(tmp_path, lambda line: print(line, file=terminal))
        if which == "metrics.jsonl":
            records._metrics.close()
            records._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closed by the records
        else:
            events = records._board._file
            events.close()
            events._records = RecordWriter(open("/dev/full", "wb"))  # noqa: SIM115 - closed by the records
        report = Report(terminal, records, total_steps=3)
        for step in (1, 2, 3):
            report.record("train", step, {"loss": 1.0, "tokens_per_s": 1.0, "step_s": 1.0})
        report.close()
        terminal.seek(0)
        said = terminal.read()
    assert said.count("RECORDS ARE LOST") == 1 and "step 3/3" in said
