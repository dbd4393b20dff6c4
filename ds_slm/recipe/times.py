"""How long a step takes on each kind of device, and whether it fits: estimates, each with its assumption.

    Recipe, Batch, Memory, Topology --> load --> Load: what a rank computes, holds and sends, on a GPU and on a CPU
    Load of each kind --> times --> Time for each kind of device; `assumptions` says in words what they rest on

Sources: what DeepSpeed 0.19 sends is read from its code and was compared with the counters of two hosts' interfaces
(`benchmarks/plan_network.py`); rings send (n - 1) / n of what is gathered or scattered, and twice that of what is
reduced for all (Patarasuk and Yuan 2009).
Known gaps: communication within a host counts as free; messages are assumed never to travel while a rank computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_slm.recipe.budget import FP32, HALF, MAX_LIVE_ELEMENTS, Memory, memory, save_bytes, takes_bf16_optimizer
from ds_slm.recipe.counts import Batch, parameter_counts, parameter_sizes
from ds_slm.recipe.rates import AMX_MFU, AVX2_MFU, DEVICES, GPU_MFU, Device, OwnCpu
from ds_slm.recipe.schema import Recipe

RECOMPUTED = 4 / 3
"""FLOPs of a step with gradient checkpointing, divided by FLOPs without: a forward is a third of the latter."""
PAYLOAD_SHARE = 1448 / 1538
"""Payload as a share of what a cable carries: the rest is headers of TCP, IP and Ethernet and gaps between frames."""
GLOO_GATHER_SHARE = 2 / 3
"""Share of a link that gloo's all-gather between two hosts fills at least; its all-reduce fills 99 % (docs/log.md,
2026-11-30). Each host sends and receives at once, and acknowledgements wait behind the data."""
PERSISTENT_VALUES = 100_000
"""DeepSpeed's default of stage3_param_persistence_threshold: parameters up to this size stay whole on all ranks."""
MEASURED = "core of this machine, measured"


@dataclass(frozen=True)
class Topology:
    """The devices of a launch, and what is known of their hosts."""

    world_size: int = 1
    """Devices over all hosts."""
    nodes: int = 1
    """Number of hosts."""
    network_gbit_per_s: float | None = None
    """Speed of each host's link; None leaves the network out of the time."""
    host_memory_bytes: int | None = None
    """Memory of each host; None if it is not known."""
    own: OwnCpu | None = None
    """This machine's CPU; None if this machine takes no part."""
    most_ranks_per_host: int | None = None
    """Devices of the host that has the most; None if they are spread evenly."""

    @property
    def ranks_per_host(self) -> int:
        """Devices of the host that has the most."""
        return self.most_ranks_per_host or -(-self.world_size // self.nodes)

    def on(self, nodes: int) -> "Topology":
        """The same kind of hosts in another number."""
        return replace(self, world_size=nodes * self.ranks_per_host, nodes=nodes)

    def multiplies(self, precision: str) -> bool:
        """Whether CPUs like this machine's multiply in this half precision; False if this machine is not known."""
        return self.own is not None and precision in self.own.half_products


@dataclass(frozen=True)
class Traffic:
    """Bytes that a host sends in an optimiser step."""

    reduced_bytes: int
    """For sums of gradients."""
    gathered_bytes: int
    """For weights."""

    @property
    def all_bytes(self) -> int:
        """Both together."""
        return self.reduced_bytes + self.gathered_bytes

    def seconds(self, gbit_per_s: float, gather_share: float) -> float:
        """The time it takes a link, of which gathers use a share."""
        return (self.reduced_bytes + self.gathered_bytes / gather_share) * 8 / (gbit_per_s * 1e9 * PAYLOAD_SHARE)


@dataclass(frozen=True)
class Load:
    """What a step asks of one type of device."""

    cut: Batch
    memory: Memory
    """Memory of a rank."""
    host_bytes: int
    """Host memory while a checkpoint is written: what the host's ranks hold there, and the copies that are written."""
    flops: int
    """FLOPs of a rank, without recomputation."""
    sent: Traffic


@dataclass(frozen=True)
class Time:
    """How long the run takes on one kind of device."""

    device: str
    device_type: str
    """cpu or cuda."""
    fits: bool | None
    """Whether each rank fits its device's memory, and all ranks of a host the host's memory; None if not known."""
    step_s: float
    network_s: float
    """The part of step_s that the network between hosts takes."""
    run_s: float
    tokens_per_s: float


def load(
    recipe: Recipe,
    flops_per_token: int,
    zero: Mapping[str, Any],
    topology: Topology,
    cut: Batch,
    device_type: str,
) -> Load:
    """What a step asks of one type of device.

    Args:
        recipe: what is trained.
        flops_per_token: of forward and backward.
        zero: DeepSpeed's zero_optimization section.
        topology: the devices.
        cut: how a step is cut up on this type of device.
        device_type: 'cpu' or 'cuda'.
    """
    counts, world_size = parameter_counts(recipe.model), topology.world_size
    half_products = topology.multiplies(recipe.train.precision)
    needed = memory(recipe, zero, world_size, cut.micro_batch, device_type, half_products)
    on_host = needed.device_bytes if device_type == "cpu" else needed.host_bytes
    return Load(
        cut,
        needed,
        topology.ranks_per_host * (on_host + save_bytes(recipe, counts, world_size)),
        flops_per_token * cut.micro_batch * cut.accumulation_steps * recipe.data.seq_len,
        traffic(recipe, zero, topology, cut.accumulation_steps, device_type),
    )


def traffic(
    recipe: Recipe, zero: Mapping[str, Any], topology: Topology, accumulation_steps: int, device_type: str
) -> Traffic:
    """What one host sends in an optimiser step, by rings over all ranks that cross each host's link once.

    Gradients travel in fp32, weights in the precision they are computed with. Stages 1 and 2 reduce gradients for all
    ranks, once a step or after every micro-batch, and gather the new weights once. Stage 3 gathers the weights for
    every micro-batch, but the small ones, which all ranks keep, and scatters sums, for which gloo, a CPU's backend,
    reduces for all.
    """
    if topology.nodes == 1:
        return Traffic(0, 0)
    stage, half = zero["stage"], recipe.train.precision != "fp32"
    params, width = parameter_counts(recipe.model).total, HALF if half else FP32
    reduced, scattered = 2 * params * FP32, params * FP32

    if stage < 3:
        to_owners = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
        if takes_bf16_optimizer(zero, recipe.train.precision):  # it reduces for all, whatever is asked for
            to_owners = False
        gradients = scattered if to_owners else reduced
        gradients *= accumulation_steps if stage == 2 else 1
        weights = params * width
    else:
        gradients = accumulation_steps * (reduced if device_type == "cpu" else scattered)
        small = zero.get("stage3_param_persistence_threshold", PERSISTENT_VALUES)
        kept = sum(size * count for size, count in parameter_sizes(recipe.model) if size <= small)
        # What the forward has gathered stays for the backward, where both lie within the two limits.
        limits = (
            zero.get(name, MAX_LIVE_ELEMENTS) for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
        )
        gathered = (params - kept) * (1 if 2 * params <= min(limits) else 2)
        weights = (gathered * accumulation_steps + kept) * width

    ranks = topology.world_size
    return Traffic(gradients * (ranks - 1) // ranks, weights * (ranks - 1) // ranks)


def times(recipe: Recipe, loads: Mapping[str, Load], topology: Topology) -> list[Time]:
    """The run's time on each kind of device that has the recipe's precision, and on this machine where it was measured.

    Args:
        recipe: what is trained.
        loads: device type -> what a step asks of it.
        topology: the devices.
    """
    precision, own = recipe.train.precision, topology.own
    recomputed = RECOMPUTED if recipe.train.gradient_checkpointing else 1.0
    found = []
    for device in DEVICES:
        if precision not in device.precisions:
            continue
        asked = loads[device.device_type]
        peak = device.fp32_flops_per_s if precision == "fp32" else device.half_flops_per_s
        computing_s = asked.flops * recomputed / (peak * device.mfu)
        is_here = own is not None and device == own.device
        found.append(_time(recipe, topology, asked, computing_s, device, is_here))

    if own and own.speed:
        here = Device(MEASURED, 0.0, 0.0, None)
        asked = loads[here.device_type]
        share = -(-parameter_counts(recipe.model).total // topology.world_size)
        computing_s = asked.cut.accumulation_steps * own.speed.micro_batch_s + share * own.speed.update_s_per_value
        found.append(_time(recipe, topology, asked, computing_s, here, is_here=True))
    return found


def _time(recipe: Recipe, topology: Topology, asked: Load, computing_s: float, device: Device, is_here: bool) -> Time:
    """A row of the table; `is_here` for a device of this machine."""
    rate = topology.network_gbit_per_s
    gather_share = GLOO_GATHER_SHARE if device.device_type == "cpu" else 1.0
    network_s = asked.sent.seconds(rate, gather_share) if rate else 0.0
    step_s = computing_s + network_s

    # A host has the memory that was given. If none was given, only this machine's memory is known.
    host_bytes = topology.host_memory_bytes
    if host_bytes is None and is_here and topology.own:
        host_bytes = topology.own.memory_bytes
    fits = None if host_bytes is None else asked.host_bytes <= host_bytes
    if device.memory_bytes is not None:
        on_device = asked.memory.device_bytes <= device.memory_bytes
        fits = on_device and fits is not False

    run_s, tokens_per_s = step_s * recipe.train.steps, recipe.train.global_batch_tokens / step_s
    return Time(device.name, device.device_type, fits, step_s, network_s, run_s, tokens_per_s)


def assumptions(recipe: Recipe, loads: Mapping[str, Load], topology: Topology) -> list[str]:
    """What the estimates rest on, in words."""
    stated = [
        f"training reaches {AMX_MFU:.0%} of the peak FLOP/s of a CPU core with AMX (1M parameters less, 100M more), "
        f"{AVX2_MFU:.0%} with AVX2 (1M parameters three quarters of that) and {GPU_MFU:.0%} of a GPU's"
    ]

    if recipe.train.gradient_checkpointing:
        stated.append("gradient checkpointing adds a second forward: a third more time")
    if topology.nodes > 1:
        gpus, cpus = loads["cuda"].sent.all_bytes, loads["cpu"].sent.all_bytes
        sent = f"{gpus:,} bytes a step" if gpus == cpus else f"{gpus:,} bytes a step with GPUs, {cpus:,} with CPUs"
        rate = topology.network_gbit_per_s
        stated.append(
            f"each host sends {sent} at {rate:g} Gbit/s, {PAYLOAD_SHARE:.0%} of which are payload; CPUs' gathers "
            f"fill {GLOO_GATHER_SHARE:.0%} of that; nothing overlaps"
            if rate
            else f"the network is left out: each host sends {sent} (--network adds its time)"
        )

    if topology.own and (speed := topology.own.speed):
        stated.append(
            f"the measured core computed rows that are not packed, {'compiled' if speed.compiled else 'eager'} blocks, "
            "while the cores of the host's other ranks computed the same"
        )

    return [
        *stated,
        "a GPU's memory leaves out temporary tensors, fragmentation and the device's own context",
        "a CPU's counts eager blocks (benchmarks/plan_memory.py compares it with launches)",
        "a CPU fits where all ranks of a host do, and the copies that a save makes; `-` where no memory is known "
        "(--host-memory gives it)",
    ]
