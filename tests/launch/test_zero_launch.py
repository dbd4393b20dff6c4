"""Every allowed key of zero_optimization: trained, stopped, resumed and exported with; every other key: refused.

One launch on two ranks trains all cases, each without interruption and in two halves. Oracles: the uninterrupted run,
bit for bit; for a checkpoint, the run's own held-out loss, computed anew from its file alone.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards import prepared
from ds_slm.model import decoder
from ds_slm.model.kernels import DTYPES
from ds_slm.recipe import loading, zero_keys
from tests.support import runs

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"
STEPS, STOP_AT = 4, 2
BF16, FP16, EIGHT_BITS = "set=train.precision=bf16", "set=train.precision=fp16", "set=optimizer.name=adamw8bit"
OPTIMIZER_ON_CPU = {"offload_optimizer.device": "cpu"}
SMALL_BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
ALONE = {"use_multi_rank_bucket_allreduce": False}
CASES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "1-fp32": (1, {**SMALL_BUCKETS, **ALONE, "overlap_comm": True}, ()),
    "1-fp32-other": (1, {"contiguous_gradients": False, "reduce_scatter": False}, ()),
    "1-bf16": (1, {**SMALL_BUCKETS, "overlap_comm": True, "contiguous_gradients": False}, (BF16,)),
    "1-offload": (1, {**OPTIMIZER_ON_CPU, "offload_optimizer.pin_memory": False}, (BF16, EIGHT_BITS)),
    "2-bf16": (2, {**SMALL_BUCKETS, **ALONE, "overlap_comm": True}, (BF16, EIGHT_BITS)),
    "2-other": (2, {"contiguous_gradients": False, "reduce_scatter": False}, (BF16,)),
    "2-offload": (2, {**OPTIMIZER_ON_CPU, "offload_optimizer.pin_memory": True, "overlap_comm": True}, (BF16,)),
    "3-bf16": (
        3,
        {
            "sub_group_size": 3000, "reduce_bucket_size": 1000, "overlap_comm": True, "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 100, "stage3_model_persistence_threshold": 150,
            "stage3_max_live_parameters": 5000, "stage3_max_reuse_distance": 100,
        },
        (BF16, EIGHT_BITS),
    ),
    "3-fp32": (
        3,
        {
            "stage3_use_all_reduce_for_fetch_params": True, "contiguous_gradients": False, "reduce_scatter": False,
            "log_trace_cache_warnings": True, "enable_sanity_checks": True,
        },
        (),
    ),
    "3-sequential": (3, {"stage3_allgather_sequential": True, **OPTIMIZER_ON_CPU, "sub_group_size": 3000}, (BF16,)),
    "3-offload": (
        3,
        {"offload_param.device": "cpu", "offload_param.pin_memory": False, **OPTIMIZER_ON_CPU},
        (BF16, EIGHT_BITS),
    ),
    "3-offload-param": (3, {"offload_param.device": "cpu", "offload_param.pin_memory": True}, (BF16,)),
}  # fmt: skip
"""Name -> stage, keys of zero_optimization, other settings."""
BEGINNINGS = {
    "1-bf16": ("zero=1", BF16), "2-fp16": ("zero=2", FP16), "3-bf16": ("zero=3", BF16), "3-fp16": ("zero=3", FP16),
    "2-offload": ("zero=2_offload", BF16), "base": ("zero=3", BF16, "base=whole-1-fp32"),
}  # fmt: skip
"""Runs that save what they begin with."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds whole-CASE, halves-CASE, begins-BEGINNING, and what the launch said in `launch.log`.

    The last case has keys that are refused otherwise, and is expected to end the launch.
    """
    folder = tmp_path_factory.mktemp("zero")
    recipe, shared = runs.write_recipe(folder), f"set=train.steps={STEPS},set=run.eval_rows=2"
    cases = []
    for name, (stage, keys, settings) in CASES.items():
        described = ",".join([f"zero={stage}", *described_keys(keys), *settings, shared])
        cases += [
            f"whole-{name}:{described}",
            f"halves-{name}:{described},max_steps={STOP_AT}",
            f"halves-{name}:{described}",
        ]
    regrouped = f"zero=3,{BF16},{EIGHT_BITS},{shared}"
    for size, end in ((3000, f",max_steps={STOP_AT}"), (9000, "")):
        cases.append(f"regrouped:{regrouped},{','.join(described_keys({'sub_group_size': size}))}{end}")
    for name, settings in BEGINNINGS.items():
        cases.append(f"begins-{name}:{','.join(settings)},resave=begun-{name}")
    cases.append(f"scrambled:zero=2,{','.join(described_keys({'round_robin_gradients': True}))},unchecked=1")

    command = ["--recipe", recipe, "--out", folder, "--allow-fp16", *cases]
    done = runs.run(runs.deepspeed_command(2, *command, script=PROGRAM), cwd=folder, timeout_s=900)
    (folder / "launch.log").write_text(done.stdout + done.stderr)
    assert (folder / "scrambled").is_dir(), (done.stdout + done.stderr)[-3000:]
    return folder


def described_keys(keys: dict[str, Any]) -> list[str]:
    return [f"ds=zero_optimization.{key}:{json.dumps(value)}" for key, value in keys.items()]


@pytest.mark.parametrize("name", CASES)
def test_resumes_bit_exactly_with_every_allowed_key(folder: Path, name: str) -> None:
    """Oracle: the uninterrupted run: losses, gradient norms, and the last checkpoint's tensors by their hashes."""
    kept = ("step", "loss", "grad_norm", "ledger")
    whole, halves = (
        [[record[key] for key in kept] for record in runs.records(folder / f"{kind}-{name}")]
        for kind in ("whole", "halves")
    )
    assert whole == halves and len(whole) == STEPS
    files = [
        json.loads((checkpoint_of(folder / f"{kind}-{name}") / "manifest.json").read_text())["files"]
        for kind in ("whole", "halves")
    ]
    tensors = [{file: content for file, content in one.items() if file.endswith(".safetensors")} for one in files]
    assert tensors[0] == tensors[1] and len(tensors[0]) == (4 if EIGHT_BITS in CASES[name][2] else 3)


@pytest.mark.parametrize("name", CASES)
def test_the_saved_weights_have_the_loss_of_the_run(folder: Path, name: str) -> None:
    """Oracle: the run's own loss on all held-out rows. The file's weights alone, in one process, must give it."""
    run = folder / f"whole-{name}"
    recipe = loading.load(str(run / "recipe.toml"))
    rows = PretrainRows(recipe, prepared.open_prepared(recipe, folder / "data" / "tiny"))
    batch = rows.read(rows.val_row_ids(None), "val")
    model = decoder.build(recipe.model, seed=99)
    model.load_state_dict(checkpoint_files.read_model(checkpoint_of(run)), strict=False)
    model.to(DTYPES[recipe.train.precision])
    with torch.no_grad():
        sums = model(
            *(torch.from_numpy(part) for part in (batch.input_ids, batch.target_ids, batch.weights)), None, 0.0
        )
    own = json.loads((run / "done.json").read_text())["val_loss"]
    assert float(sums.nll / sums.weight) == pytest.approx(own, rel=1e-5 if recipe.train.precision == "fp32" else 1e-4)
    assert own < runs.records(run)[0]["loss"] - 0.1  # the steps were taken


def checkpoint_of(run: Path) -> Path:
    return checkpoint_files.folder_of_step(run, STEPS)


def test_other_sub_groups_are_another_topology(folder: Path) -> None:
    """8-bit states of small sub-groups go on in large ones. Oracle: the uninterrupted run, but for roundings."""
    found, whole = runs.records(folder / "regrouped"), runs.records(folder / "whole-3-bf16")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in whole], rel=1e-4)
    layouts = [
        checkpoint_files.read_state(checkpoint_files.folder_of_step(folder / "regrouped", step))["topology"][
            "partitions"
        ]
        for step in (STOP_AT, STEPS)
    ]
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_run_begins_with_the_fp32_weights(folder: Path, name: str) -> None:
    """Oracle: the recipe's initialisation, or the base's weights, bit for bit, in what is saved at step 0."""
    recipe = loading.load(str(folder / "tiny.toml"))
    expected = {key: value.detach() for key, value in decoder.build(recipe.model, recipe.train.seed).named_parameters()}
    if name == "base":
        expected = checkpoint_files.read_model(checkpoint_of(folder / "whole-1-fp32"))
    found = checkpoint_files.read_model(checkpoint_files.folder_of_step(folder / f"begun-{name}", 0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())


def test_scrambled_partitions_are_found_before_anything_is_written(folder: Path) -> None:
    """round_robin_gradients past the allow-list. Oracle: the program's message, and no checkpoint."""
    assert "are not the weights the model computes with" in (folder / "launch.log").read_text()
    assert not (folder / "scrambled" / "checkpoints").exists()


def test_every_allowed_key_is_trained_with() -> None:
    """Oracle: the lists themselves."""
    tried = {key for _, keys, _ in CASES.values() for key in keys}
    offloads = {f"{section}.{key}" for section in zero_keys.OFFLOAD for key in zero_keys.OFFLOAD_ALLOWED}
    assert tried == zero_keys.ALLOWED.keys() | offloads
