"""The parts of a rank's memory on a CPU: activations, a save, what one setting would change, where devices stop."""

import pytest
import torch

from ds_slm.model import decoder, kernels
from ds_slm.recipe import alternatives, budget, loading, plan
from ds_slm.recipe.counts import parameter_counts
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ZERO1 = {"stage": 1}
TOKENS = 64


def saved_bytes(recipe: Recipe) -> int:
    """Bytes that autograd keeps of a forward over one row, each storage once, the parameters' own left out."""
    model = decoder.build(recipe.model, 0).to(DTYPES[recipe.train.precision]).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(TOKENS + 1).unsqueeze(0) * 7 % recipe.model.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids[:, :-1], ids[:, 1:])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("products", ["upcast", "native"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["demo", "gpt-s-1.4m", "slm-10m", "ant-10m"])
def test_a_block_keeps_on_a_cpu_what_torch_saves(
    name: str, precision: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: autograd's own saved tensors; two models that differ by two blocks, so that all else cancels."""
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, products)
    saved, planned = [], []
    for layers in (1, 3):
        flags = [f"model.num_hidden_layers={layers}", f"train.precision={precision}", f"data.seq_len={TOKENS}"]
        recipe = loading.load(
            name, [*flags, "train.gradient_checkpointing=false", f"train.global_batch_tokens={TOKENS}"]
        )
        saved.append(saved_bytes(recipe))
        planned.append(budget.memory(recipe, ZERO1, 1, 1, "cpu", products == "native").activations_bytes)
    assert saved[1] - saved[0] == planned[1] - planned[0]


def test_a_cpu_counts_what_its_process_holds() -> None:
    """Oracle: by hand, slm-10m in fp32 on two ranks; a GPU sets a buffer aside, a CPU gives what is written."""
    recipe = loading.load("slm-10m", ["train.precision=fp32"])
    counts, params = parameter_counts(recipe.model), 9_968_640
    zero = {"stage": 1, "reduce_bucket_size": 25_000_000}
    on_gpu, on_cpu = (budget.memory(recipe, zero, 2, 1, kind) for kind in ("cuda", "cpu"))
    assert on_gpu.buffers_bytes == 4 * 25_000_000
    assert on_cpu.buffers_bytes == 2 * 4 * params  # the bucket, and the copy of it that is sent
    assert (on_gpu.program_bytes, on_gpu.temporary_bytes, on_gpu.allocator_bytes) == (0, 0, 0)
    assert on_cpu.program_bytes == budget.PROGRAM_BYTES
    assert on_cpu.temporary_bytes == 4 * 1024 * (3 * recipe.model.intermediate_size + 2 * recipe.model.hidden_size)
    apart = budget.KEPT_APART[1, False] * on_cpu.activations_bytes
    assert on_cpu.allocator_bytes == round(apart) - 4 * (params - counts.embedding)
    assert on_cpu.weights_bytes == on_gpu.weights_bytes == 4 * params


def test_zero_3_gathers_what_its_limits_let_it_keep() -> None:
    """Oracle: DeepSpeed's limits, in elements: the whole model below them, what they say above."""
    recipe = loading.load("slm-10m", ["train.precision=fp32"])
    counts = parameter_counts(recipe.model)
    assert budget.memory(recipe, {"stage": 3}, 2, 1).gathered_bytes == 4 * counts.total
    limited = {"stage": 3, "stage3_max_live_parameters": 1000}
    assert budget.memory(recipe, limited, 2, 1).gathered_bytes == 4000


def test_a_save_copies_weights_and_moments() -> None:
    """Oracle: by hand; 12 bytes a parameter of the rank's half, 6 with 8-bit moments, and three windows of 32 MiB."""
    counts = parameter_counts(loading.load("slm-124m").model)
    windows = 3 * 32 * 2**20
    by_bits = [
        budget.save_bytes(loading.load("slm-124m", [f"optimizer.name={name}", "optimizer.embedding_bits=8"]), counts, 2)
        - windows
        for name in ("adamw", "adamw8bit")
    ]
    assert by_bits[0] == 12 * counts.total // 2
    assert by_bits[1] == pytest.approx(6 * counts.total // 2, rel=0.02)


def test_one_setting_turned_over() -> None:
    """Oracle: the plan of the recipe that has that setting; offloading in bf16 brings a bucket of 2,000 fp32 values."""
    recipe = loading.load("slm-124m")
    zero = ZERO1 | {"reduce_bucket_size": 2_000}
    found = {one.name: one for one in alternatives.alternatives(recipe, zero, 8, 2, "cuda")}
    counts = parameter_counts(recipe.model)

    def planned(*settings: str) -> int:
        return budget.memory(loading.load("slm-124m", list(settings)), zero, 8, 2).device_bytes

    assert found["as asked"].device_bytes == planned()
    checkpointed = found["with gradient checkpointing"]
    assert checkpointed.device_bytes == planned("train.gradient_checkpointing=true")
    assert checkpointed.step_ratio == pytest.approx(4 / 3)
    assert found["AdamW with 8-bit moments"].device_bytes == planned("optimizer.name=adamw8bit")
    offloaded = found["optimiser offloaded to the host"]
    assert offloaded.host_bytes == 12 * counts.total // 8
    assert planned() - offloaded.device_bytes == offloaded.host_bytes - 4 * 2_000


def test_a_cpu_is_its_own_host() -> None:
    """Oracle: the plan without offloading, but for a buffer."""
    recipe = loading.load("slm-124m")
    zero2 = {"stage": 2, "reduce_bucket_size": 2_000}
    offloaded = budget.memory(recipe, zero2 | {"offload_optimizer": {"device": "cpu"}}, 2, 2, "cpu")
    assert offloaded == budget.memory(recipe, zero2, 2, 2, "cpu")


def test_scaling_stops_at_a_row_a_device_and_at_the_network() -> None:
    """Oracle: by hand; 512 rows on 1,024 devices, and the network's share of the planned step."""
    recipe = loading.load("slm-10m")
    found = plan.plan(recipe, "slm-10m", {"zero_optimization": ZERO1}, Topology(1024, 128, 10.0))
    assert found.scaling.most_devices == 512 and found.scaling.busy_share == 0.5
    name = "NVIDIA H100"
    time = next(one for one in found.times if one.device == name)
    assert found.scaling.network_shares[name] == time.network_s / time.step_s

    alone = plan.plan(recipe, "slm-10m", {"zero_optimization": ZERO1}, Topology(8, 1, 10.0))
    assert alone.scaling.network_shares == alone.scaling.balanced_hosts == {}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("network_gbit_per_s", [1.0, 100.0, 3_000.0])
def test_half_a_step_is_the_networks_on_the_hosts_that_are_named(stage: int, network_gbit_per_s: float) -> None:
    """Oracle: the plans of that many hosts, and of one host less; None where no number up to the batch's rows does."""
    recipe, ds_config = loading.load("slm-10m"), {"zero_optimization": {**ZERO1, "stage": stage}}

    def share(device: str, nodes: int) -> float:
        there = plan.plan(recipe, "slm-10m", ds_config, Topology(8 * nodes, nodes, network_gbit_per_s))
        return next(time.network_s / time.step_s for time in there.times if time.device == device)

    found = plan.plan(recipe, "slm-10m", ds_config, Topology(16, 2, network_gbit_per_s)).scaling
    for device, nodes in found.balanced_hosts.items():
        if nodes is None:
            assert share(device, 512 // 8) < 0.5
        else:
            assert share(device, nodes) >= 0.5 and (nodes == 2 or share(device, nodes - 1) < 0.5)


@pytest.mark.parametrize(
    ("name", "rows", "stage", "measured_gb"),
    [
        ("gpt-s-1.4m", 2, 1, 0.50),
        ("gpt-s-1.4m", 10, 2, 0.74),
        ("gpt-s-1.4m", 10, 3, 0.91),
        ("demo", 8, 1, 0.53),
        ("demo", 32, 2, 0.65),
        ("slm-10m", 1, 3, 1.23),
        ("slm-10m", 4, 2, 2.44),
        ("slm-10m", 4, 3, 3.08),
        ("slm-124m", 1, 1, 3.76),
        ("slm-124m", 1, 2, 3.52),
        ("slm-124m", 1, 3, 4.32),
    ],
)
def test_a_cpus_memory_is_what_launches_took(name: str, rows: int, stage: int, measured_gb: float) -> None:
    """Oracle: peaks of real launches in fp32 on two cores of a Zen 3 (docs/benchmarks.md), within 10 %."""
    zero = {"stage": stage, "reduce_bucket_size": 25_000_000}
    planned = budget.memory(loading.load(name, ["train.precision=fp32"]), zero, 2, rows, "cpu")
    assert planned.device_bytes / 1e9 == pytest.approx(measured_gb, rel=0.1)
