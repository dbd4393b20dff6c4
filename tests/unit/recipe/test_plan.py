"""The arithmetic of a plan: parameters, FLOPs, batch, memory, network, time."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.cli import planning
from ds_slm.errors import ConfigError
from ds_slm.recipe import counts, loading, plan, rates, times
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.times import Topology

ZERO = {stage: {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("slm-10m", 9_968_640),
        ("gpt-s-1.4m", 1_426_176),
        ("ant-10m", 9_902_336),
        ("slm-124m", 134_105_856),
        ("axiom-380m", 385_849_344),
    ],
)
def test_parameters_are_the_cards(name: str, params: int) -> None:
    """Oracle: the published counts; where a card rounds or miscounts, the shape's, within 9 % of what it prints."""
    recipe = loading.load(name)
    assert parameters(recipe.model) == params
    assert recipe.card.params == pytest.approx(params, rel=0.09)
    if name in ("slm-10m", "axiom-380m"):
        assert recipe.card.params == params


@pytest.mark.parametrize("name", loading.library_names())
def test_parameters_are_the_models(name: str) -> None:
    """Oracle: the decoder itself, built without memory."""
    import torch

    from ds_slm.model.decoder import Decoder

    shape = loading.load(name).model
    with torch.device("meta"):
        built = Decoder(shape)
    sizes = [parameter.numel() for parameter in built.parameters()]
    assert parameters(shape) == sum(sizes)
    assert sorted(size for size, count in counts.parameter_sizes(shape) for _ in range(count)) == sorted(sizes)


def test_demo_has_about_two_million_parameters() -> None:
    """Oracle: what the README promises."""
    assert 1.5e6 < parameters(loading.load("demo").model) < 2.5e6


def test_flops_per_token() -> None:
    """Oracle: 2.617 GFLOPs for axiom-380m, computed apart; an untied input embedding is looked up, not multiplied."""
    assert plan.flops_per_token(loading.load("axiom-380m").model, 1024) == 6 * 385_849_344 + 12 * 24 * 16 * 64 * 1024
    assert plan.flops_per_token(loading.load("axiom-380m").model, 1024) == pytest.approx(2.617e9, rel=1e-4)
    untied = plan.flops_per_token(loading.load("slm-124m").model, 1024)
    tied = plan.flops_per_token(loading.load("slm-124m", ["model.tie_word_embeddings=true"]).model, 1024)
    assert untied == tied


@pytest.mark.parametrize(("name", "loss"), [("slm-124m", 10.53), ("axiom-380m", 11.520), ("slm-10m", 9.062)])
def test_first_loss(name: str, loss: float) -> None:
    """Oracle: the published first losses, 10.508 and 11.514, lie within 0.05 of the formula; the third by hand."""
    recipe = loading.load(name)
    assert plan.first_loss(recipe.model) == pytest.approx(loss, abs=5e-3)
    published = [target.published for target in recipe.targets if target.metric == "train/loss" and target.step == 1]
    assert all(abs(plan.first_loss(recipe.model) - figure) < 0.05 for figure in published)
    assert plan.first_loss(recipe.model) > math.log(recipe.model.vocab_size)


@given(rows=st.integers(1, 600), world_size=st.integers(1, 40), micro_batch=st.integers(1, 64))
def test_batch_is_cut_without_loss(rows: int, world_size: int, micro_batch: int) -> None:
    """Oracle: what the contract asks; every row once, equal forwards, no rank a whole forward too many."""
    recipe = loading.load("slm-10m", [f"train.global_batch_tokens={rows * 1024}"])
    cut = counts.batch(recipe, world_size, micro_batch)
    assert cut.micro_batch * cut.accumulation_steps * world_size - cut.filler_rows == rows == cut.rows_per_step
    assert cut.micro_batch <= micro_batch
    assert cut.filler_rows >= 0
    assert (cut.accumulation_steps - 1) * cut.micro_batch < cut.rows_per_rank
    assert (cut.accumulation_steps - 1) * micro_batch < cut.rows_per_rank


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 16), (3, 5), (7, 16), (600, 2)])
def test_batch_agrees_with_the_trainer(world_size: int, micro_batch: int) -> None:
    """Oracle: ds_slm.recipe.ds_config, which gives DeepSpeed its batch."""
    from ds_slm.recipe import ds_config

    recipe = loading.load("slm-10m")
    engine_config = ds_config.join(recipe, ZERO[1], world_size, "cuda", micro_batch)
    cut = counts.batch(recipe, world_size, micro_batch)
    expected = (cut.micro_batch, cut.accumulation_steps, cut.filler_rows)
    assert (engine_config.micro_batch, engine_config.accumulation_steps, engine_config.filler_rows) == expected
    planned = plan.plan(recipe, "slm-10m", ZERO[1], Topology(world_size)).batch
    default = ds_config.join(recipe, ZERO[1], world_size, "cuda", None)
    assert (planned.micro_batch, planned.accumulation_steps) == (default.micro_batch, default.accumulation_steps)


def test_memory_by_stage() -> None:
    """Oracle: the ZeRO paper's table; 2 + 4 + 4 + 8 bytes per parameter, split by the stage over 8 ranks."""
    recipe = loading.load("slm-124m")
    params, ranks = 134_105_856, 8
    by_stage = {stage: plan.plan(recipe, "slm-124m", ZERO[stage], Topology(ranks)).memory for stage in ZERO}
    for stage, memory in by_stage.items():
        assert memory.weights_bytes == 2 * params // (ranks if stage == 3 else 1)
        assert memory.gradients_bytes == 4 * params // (1 if stage == 1 else ranks) + 2 * params
        assert memory.masters_bytes == 4 * params // ranks
        assert memory.moments_bytes == 8 * params // ranks
        assert memory.gathered_bytes == (2 * params if stage == 3 else 0)  # DeepSpeed keeps up to 1e9 weights for reuse
    totals = [one.device_bytes - one.buffers_bytes - one.gathered_bytes for one in by_stage.values()]
    assert totals == sorted(totals, reverse=True)
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    memory = plan.plan(recipe, "slm-124m", offloaded, Topology(ranks)).memory
    assert memory.masters_bytes == memory.moments_bytes == 0
    assert memory.host_bytes == 12 * params // ranks


def test_memory_of_8_bit_moments() -> None:
    """Oracle: bitsandbytes' layout, a byte a value and an fp32 scale per 256; norms in fp32, embeddings on request."""
    params, embedding, norms = 385_849_344, 100_277 * 1024, 24 * 2 * 1024 + 1024
    for bits, in_8_bits in ((8, params - norms), (32, params - norms - embedding)):
        recipe = loading.load("axiom-380m", [f"optimizer.embedding_bits={bits}"])
        moments = plan.plan(recipe, "axiom-380m", ZERO[1]).memory.moments_bytes
        assert moments == pytest.approx(2 * (in_8_bits * (1 + 4 / 256) + 4 * (params - in_8_bits)), abs=4)


def test_checkpointing_trades_memory_for_time() -> None:
    """Oracle: each block keeps its input instead of everything, for a third more FLOPs."""
    with_it, without = (
        plan.plan(loading.load("axiom-380m", [f"train.gradient_checkpointing={on}"]), "axiom-380m", ZERO[1])
        for on in ("true", "false")
    )
    assert with_it.memory.activations_bytes < without.memory.activations_bytes / 5
    assert with_it.times[-1].step_s == pytest.approx(without.times[-1].step_s * 4 / 3)
    assert with_it.flops == without.flops


def test_network_time() -> None:
    """Oracle: rings by hand; two hosts at 10 Gbit/s, bf16 ZeRO-1: half of 2 x 4 + 2 bytes a parameter, once a step.

    A CPU's gloo gathers at two thirds of the link.
    """
    recipe, params = loading.load("slm-10m"), 9_968_640

    def planned(nodes: int, network: float | None) -> plan.Plan:
        return plan.plan(recipe, "slm-10m", ZERO[1], Topology(2, nodes, network))

    alone, found, unknown = planned(1, 10.0), planned(2, 10.0), planned(2, None)
    assert all(time.network_s == 0.0 for time in alone.times)
    assert found.times[0].device == rates.AMX_CORE.name
    assert found.times[0].network_s == pytest.approx(params * (8 + 2 * 3 / 2) / 2 * 8 / 10e9 * 1538 / 1448)
    assert found.times[-1].network_s == pytest.approx(params * (8 + 2) / 2 * 8 / 10e9 * 1538 / 1448)
    assert found.times[0].step_s == pytest.approx(alone.times[0].step_s + found.times[0].network_s)
    assert unknown.times[0].network_s == 0.0
    assert any("network is left out" in assumption for assumption in unknown.assumptions)


@pytest.mark.parametrize(
    ("device_type", "precision", "stage", "reduced", "gathered"),
    [
        ("cpu", "fp32", 1, 8, 4),
        ("cpu", "bf16", 1, 8, 2),
        ("cpu", "bf16", 2, 8 * 5, 2),
        ("cpu", "bf16", 3, 8 * 5, 2 * 5),
        ("cuda", "bf16", 3, 4 * 5, 2 * 5),
    ],
)
def test_what_a_host_sends(device_type: str, precision: str, stage: int, reduced: int, gathered: int) -> None:
    """Oracle: by hand, five forwards a step; a ring over 16 ranks lets 15 / 16 of it cross each host's link."""
    recipe = loading.load("slm-10m", [f"train.precision={precision}"])
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    sent = times.traffic(recipe, zero, Topology(16, 2), 5, device_type)
    assert sent == times.Traffic(9_968_640 * reduced * 15 // 16, 9_968_640 * gathered * 15 // 16)
    assert times.traffic(recipe, zero, Topology(16, 1), 5, device_type) == times.Traffic(0, 0)


def test_gradients_of_an_offloaded_optimizer_go_to_their_owners() -> None:
    """Oracle: DeepSpeed's code: it takes BF16_Optimizer, which reduces for all, unless the optimiser is offloaded."""
    recipe = loading.load("slm-10m", ["train.precision=bf16"])
    zero, offload = {"stage": 1, "use_multi_rank_bucket_allreduce": False}, {"offload_optimizer": {"device": "cpu"}}
    on_device, offloaded = (
        times.traffic(recipe, one, Topology(2, 2), 5, "cuda").all_bytes for one in (zero, {**zero, **offload})
    )
    assert (on_device, offloaded) == (9_968_640 * (8 + 2) // 2, 9_968_640 * (4 + 2) // 2)


@pytest.mark.parametrize("stage", ZERO)
def test_a_cpu_is_planned_by_its_own_cut(stage: int) -> None:
    """Oracle: the same step as ds_slm.recipe.ds_config cuts it on a CPU, and what that computes, holds and sends."""
    from ds_slm.recipe import ds_config

    recipe = loading.load("slm-10m", ["train.global_batch_tokens=35840"])
    topology = Topology(2, 2, 1.0)
    found = plan.plan(recipe, "slm-10m", ZERO[stage], topology)
    by_device = {time.device: time for time in found.times}
    for device, cut in ((rates.AMX_CORE, found.cpu_batch), (rates.DEVICES[-1], found.batch)):
        joined = ds_config.join(recipe, ZERO[stage], 2, device.device_type, None)
        assert (cut.micro_batch, cut.accumulation_steps) == (joined.micro_batch, joined.accumulation_steps)
        time = by_device[device.name]
        sent = times.traffic(
            recipe, ZERO[stage]["zero_optimization"], topology, cut.accumulation_steps, device.device_type
        )
        gathering = sent.gathered_bytes * (3 / 2 if device == rates.AMX_CORE else 1)
        assert time.network_s == pytest.approx((sent.reduced_bytes + gathering) * 8 / 1e9 * 1538 / 1448)
        flops = plan.flops_per_token(recipe.model, 1024) * 1024 * cut.micro_batch * cut.accumulation_steps
        assert time.step_s - time.network_s == pytest.approx(flops / (device.half_flops_per_s * device.mfu))
    assert found.cpu_batch.accumulation_steps > found.batch.accumulation_steps


def test_a_cpu_fits_where_its_host_holds_all_ranks() -> None:
    """Oracle: by hand; four ranks a host and the copies of a save, a byte less, this machine's memory, none known."""
    recipe, core = loading.load("slm-124m"), rates.AMX_CORE
    known = plan.plan(recipe, "slm-124m", ZERO[1], Topology(8, 2))
    needed = 4 * (known.cpu_memory.device_bytes + known.save_bytes)

    def fits(host_bytes: int | None, own: rates.OwnCpu | None = None) -> dict[str, bool | None]:
        found = plan.plan(recipe, "slm-124m", ZERO[1], Topology(8, 2, None, host_bytes, own))
        return {time.device: time.fits for time in found.times}

    assert fits(needed)[core.name] is True and fits(needed - 1)[core.name] is False
    unknown = fits(None)
    assert unknown[core.name] is None and unknown["NVIDIA H200"] is True
    here = fits(None, rates.OwnCpu(core, "", needed - 1))
    assert here[core.name] is False and here[rates.AVX2_CORE.name] is None


def test_a_host_with_more_devices_than_others_must_hold_them(tmp_path: Path) -> None:
    """Oracle: by hand; eight ranks on one host of two, where even shares would be five."""
    (tmp_path / "hosts").write_text("big slots=8\nsmall slots=1\n")
    topology = planning.topology(tmp_path / "hosts", None, None, 10.0, 64.0)
    assert (topology.world_size, topology.nodes, topology.ranks_per_host) == (9, 2, 8)
    recipe = loading.load("slm-124m")
    rank_bytes = plan.plan(recipe, "slm-124m", ZERO[1], topology)
    needed = 8 * (rank_bytes.cpu_memory.device_bytes + rank_bytes.save_bytes)
    for host_bytes, expected in ((needed, True), (needed - 1, False)):
        found = plan.plan(recipe, "slm-124m", ZERO[1], replace(topology, host_memory_bytes=host_bytes))
        assert next(time.fits for time in found.times if time.device == rates.AMX_CORE.name) is expected


def test_a_gpu_needs_its_hosts_memory_for_what_is_offloaded() -> None:
    """Oracle: by hand; masters, moments and the copies of a save of one rank, and a byte less."""
    recipe = loading.load("slm-124m")
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    known = plan.plan(recipe, "slm-124m", offloaded)
    needed = known.memory.host_bytes + known.save_bytes
    for host_bytes, expected in ((needed, True), (needed - 1, False), (None, True)):
        found = plan.plan(recipe, "slm-124m", offloaded, Topology(host_memory_bytes=host_bytes))
        assert found.times[-1].fits is expected


def test_this_machine_as_measured() -> None:
    """Oracle: by hand; four forwards of 3 s, half the parameters at 1 microsecond, and the link of the other rows."""
    recipe = loading.load("slm-10m", ["train.global_batch_tokens=16384"])
    own = rates.OwnCpu(None, "", 64 * 10**9, speed=rates.CoreSpeed(3.0, 1e-6))
    found = plan.plan(recipe, "slm-10m", ZERO[1], Topology(2, 2, 1.0, None, own))
    assert found.cpu_batch.accumulation_steps == 4
    assert found.times[-1].device == times.MEASURED and found.times[-1].fits is True
    assert found.times[-1].step_s == pytest.approx(12 + 9_968_640 / 2 * 1e-6 + found.times[0].network_s)


def test_devices_without_the_precision_are_left_out() -> None:
    """Oracle: the T4's datasheet has fp16 and no bf16; training refuses fp16 on a CPU."""
    devices = {
        precision: {
            time.device
            for time in plan.plan(loading.load("ant-10m", [f"train.precision={precision}"]), "ant-10m", ZERO[1]).times
        }
        for precision in ("bf16", "fp16", "fp32")
    }
    assert "NVIDIA T4" not in devices["bf16"]
    assert "NVIDIA T4" in devices["fp16"] & devices["fp32"]
    assert rates.AMX_CORE.name in (devices["bf16"] & devices["fp32"]) - devices["fp16"]


@pytest.mark.parametrize("name", loading.library_names())
@pytest.mark.parametrize("stage", ZERO)
def test_every_recipe_has_a_plan(name: str, stage: int) -> None:
    """Oracle: plain data with positive figures, for any recipe, stage and a world size that divides nothing."""
    found = plan.plan(loading.load(name), name, ZERO[stage], Topology(7, 7, 1.0))
    assert found.params == sum(asdict(found.parameters).values())
    assert found.tokens == found.steps * loading.load(name).train.global_batch_tokens
    assert all(time.step_s > time.network_s > 0 for time in found.times)
    assert found.memory.device_bytes > found.memory.weights_bytes > 0


@pytest.mark.parametrize(
    ("ds_config", "expected"),
    [
        ({}, "stage = None"),
        ({"zero_optimization": {"stage": 0}}, "stage = 0: expected 1, 2 or 3"),
        ({**ZERO[1], "train_micro_batch_size_per_gpu": 0}, "expected a positive integer"),
    ],
)
def test_bad_ds_configs(ds_config: dict, expected: str) -> None:
    """Oracle: the message says what was expected."""
    with pytest.raises(ConfigError, match=expected):
        plan.plan(loading.load("demo"), "demo", ds_config)
