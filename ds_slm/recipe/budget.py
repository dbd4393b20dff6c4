"""Memory, network and time of a recipe on devices: estimates, each with its assumption beside it.

    Recipe, ZeRO settings, world size, micro-batch --> memory --> Memory (bytes of one rank)
    FLOPs and bytes of one optimiser step --> times --> Time for each kind of device; assumptions puts both in words

Sources: what each ZeRO stage splits is arXiv 1910.02054; buffers follow DeepSpeed 0.19 as ds_slm sets it up (fp32
accumulation and reduction); saved activations are counted from ds_slm.model.decoder, the loss from ds_slm.model.loss.
Known gaps: temporary tensors of single operations, fragmentation and the device's own context (about 0.5 GiB of CUDA)
are left out; communication within a host counts as free; nothing overlaps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, assert_never

from ds_slm.recipe.schema import Model, Optimizer, Recipe

FP32, HALF = 4, 2
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size."""
LOSS_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}
"""Logits of one chunk of the loss, in fp32 and once more in the model's precision: on a CPU what its cache holds."""
MIN_LOSS_CHUNK_TOKENS, MAX_LOSS_CHUNK_TOKENS = 128, 2048
BLOCK_VALUES = 256
"""bitsandbytes: values of 8-bit state that share one fp32 scale."""
CPU_MFU, GPU_MFU = 0.3, 0.15
"""Share of the peak that training is assumed to reach: on a CPU as measured, on a GPU as the published runs did (12 %
on a T4 at 10M parameters). The smaller the model and the larger the GPU, the less."""


@dataclass(frozen=True)
class Device:
    """A kind of device. Peaks are the datasheets', dense; that of a CPU core is a measured product."""

    name: str
    half_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes: int | None
    """None stands for the memory of this machine."""
    has_bf16: bool = True
    mfu: float = GPU_MFU


DEVICES = (
    Device("CPU core (AMX)", 0.6e12, 0.065e12, None, mfu=CPU_MFU),
    Device("NVIDIA T4", 65e12, 8.1e12, 16 * 10**9, has_bf16=False),
    Device("NVIDIA RTX 4090", 165.2e12, 82.6e12, 24 * 10**9),
    Device("NVIDIA A100", 312e12, 19.5e12, 80 * 10**9),
    Device("NVIDIA H100", 989.5e12, 67e12, 80 * 10**9),
    Device("NVIDIA H200", 989.5e12, 67e12, 141 * 10**9),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at their peak."""

    weights_bytes: int
    gradients_bytes: int
    buffers_bytes: int
    """Communication buffers."""
    masters_bytes: int
    """fp32 weights the optimiser updates."""
    moments_bytes: int
    activations_bytes: int
    """Of one micro-batch."""
    loss_bytes: int
    """One chunk of logits, and the gradients the loss keeps until its backward."""
    host_bytes: int = field(default=0)
    """Masters and moments offloaded to the host; not in device_bytes."""

    @property
    def device_bytes(self) -> int:
        """All of it but what is offloaded."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "host_bytes")


@dataclass(frozen=True)
class Time:
    """How long the run takes on one kind of device."""

    device: str
    fits: bool
    """Whether a rank's memory fits the device's."""
    step_s: float
    network_s: float
    """Of step_s, what the network between hosts takes."""
    run_s: float
    tokens_per_s: float


def memory(
    recipe: Recipe, params: int, embedding_params: int, zero: Mapping[str, Any], world_size: int, micro_batch: int
) -> Memory:
    """Bytes of one rank.

    Args:
        recipe: what is trained.
        params: all parameters.
        embedding_params: parameters of the embedding and an untied head.
        zero: DeepSpeed's zero_optimization section.
        world_size: devices over all hosts.
        micro_batch: rows of one forward.
    """
    stage, half = zero["stage"], recipe.train.precision != "fp32"
    width = HALF if half else FP32
    share = -(-params // world_size)
    weights = width * (share if stage == 3 else params)

    # Stage 1 accumulates whole gradients in fp32, 2 and 3 a rank's share; half-precision ones come and go beside it.
    gradients = FP32 * (params if stage == 1 else share) + (HALF * params if half else 0)

    masters = FP32 * share
    moments = -(-_moment_bytes(recipe.optimizer, params, embedding_params, recipe.model) // world_size)

    offloaded = zero.get("offload_optimizer") or {}
    on_host = isinstance(offloaded, Mapping) and offloaded.get("device", "none") != "none"

    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        buffers_bytes=_buffer_bytes(zero, recipe.train.precision),
        masters_bytes=0 if on_host else masters,
        moments_bytes=0 if on_host else moments,
        activations_bytes=_activation_bytes(recipe, micro_batch, width),
        loss_bytes=_loss_bytes(recipe, micro_batch, width),
        host_bytes=masters + moments if on_host else 0,
    )


def _moment_bytes(optimizer: Optimizer, params: int, embedding_params: int, shape: Model) -> int:
    """Both moments over all ranks: fp32, or 8 bits and their scales for matrices and, where asked for, embeddings."""
    if optimizer.name == "adamw":
        return 2 * FP32 * params
    if optimizer.name != "adamw8bit":
        assert_never(optimizer.name)

    norms = shape.num_hidden_layers * (2 * shape.hidden_size + 2 * shape.head_dim * shape.qk_norm) + shape.hidden_size
    in_8_bits = params - norms - (embedding_params if optimizer.embedding_bits == 32 else 0)
    return 2 * (in_8_bits + FP32 * in_8_bits // BLOCK_VALUES + FP32 * (params - in_8_bits))


def _buffer_bytes(zero: Mapping[str, Any], precision: str) -> int:
    """The buffers DeepSpeed sets aside for reducing gradients, whatever the model's size."""
    if (zero["stage"] == 1 and precision == "bf16") or not zero.get("contiguous_gradients", True):
        return 0  # BF16_Optimizer reduces the accumulated gradients where they are
    width = HALF if zero["stage"] == 2 and precision != "fp32" else FP32
    copies = 2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1
    return int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)) * width * copies


def _activation_bytes(recipe: Recipe, micro_batch: int, width: int) -> int:
    """What the backward pass needs of the forward pass, with attention that never holds its T x T scores.

    A block keeps, per token: the inputs and outputs of its two norms; q, k, v, the attention's output and the input of
    o_proj; gate, silu(gate), up and their product. With checkpointing each block keeps its input alone, and one block
    at a time the rest.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    block = width * (4 * shape.hidden_size + 3 * queries + 2 * keys + 4 * shape.intermediate_size)
    if shape.qk_norm:
        block += width * (queries + keys)
    if shape.exclusive_attention:
        block += FP32 * 4 * queries
    ends = width * 2 * shape.hidden_size
    if recipe.train.gradient_checkpointing:
        return tokens * (width * shape.hidden_size * shape.num_hidden_layers + block + ends)
    return tokens * (block * shape.num_hidden_layers + ends)


def loss_chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Tokens whose logits the loss holds at a time."""
    logits = LOSS_CHUNK_LOGITS["cpu" if device_type == "cpu" else "cuda"]
    return min(max(logits // vocab_size, MIN_LOSS_CHUNK_TOKENS), MAX_LOSS_CHUNK_TOKENS)


def _loss_bytes(recipe: Recipe, micro_batch: int, width: int) -> int:
    """A chunk of logits in fp32 and in the model's precision; gradients of hidden states and, in fp32, of the head."""
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    chunk_logits = min(loss_chunk_tokens("cuda", shape.vocab_size), tokens) * shape.vocab_size
    kept = tokens * shape.hidden_size * width + shape.vocab_size * shape.hidden_size * FP32
    return chunk_logits * (FP32 + width) + kept


def network_bytes(params: int, stage: int, precision: str, accumulation_steps: int, nodes: int) -> int:
    """Bytes one host sends in an optimiser step, by rings that cross each link once; gradients travel in fp32.

    Stage 1 reduces once a step, whole in bf16 (an all-reduce) and scattered otherwise; stage 2 scatters after every
    micro-batch; both then gather the new weights. Stage 3 gathers the weights for every forward and every backward.
    """
    weights = params * (FP32 if precision == "fp32" else HALF)
    gradients = params * FP32
    sent = {
        1: gradients * (2 if precision == "bf16" else 1) + weights,
        2: gradients * accumulation_steps + weights,
        3: (gradients + 2 * weights) * accumulation_steps,
    }[stage]
    return sent * (nodes - 1) // nodes


def times(
    recipe: Recipe,
    flops_per_step: int,
    device_bytes: int,
    sent_bytes: int,
    world_size: int,
    network_gbit_per_s: float | None,
) -> list[Time]:
    """The run's time on each kind of device that has the recipe's precision.

    Args:
        recipe: what is trained.
        flops_per_step: over all devices, filler rows included.
        device_bytes: memory of one rank.
        sent_bytes: what each host sends in a step.
        world_size: devices over all hosts.
        network_gbit_per_s: speed of each host's link; None leaves the network out.
    """
    precision = recipe.train.precision
    network_s = sent_bytes * 8 / (network_gbit_per_s * 1e9) if network_gbit_per_s else 0.0
    recomputed = 4 / 3 if recipe.train.gradient_checkpointing else 1.0
    found = []
    for device in DEVICES:
        if precision == "bf16" and not device.has_bf16:
            continue
        peak = device.fp32_flops_per_s if precision == "fp32" else device.half_flops_per_s
        step_s = flops_per_step * recomputed / (world_size * peak * device.mfu) + network_s
        fits = device.memory_bytes is None or device_bytes <= device.memory_bytes
        tokens_per_s = recipe.train.global_batch_tokens / step_s
        found.append(Time(device.name, fits, step_s, network_s, step_s * recipe.train.steps, tokens_per_s))
    return found


def assumptions(recipe: Recipe, nodes: int, sent_bytes: int, network_gbit_per_s: float | None) -> list[str]:
    """What the estimates rest on, in words."""
    stated = [f"training reaches {CPU_MFU:.0%} of a CPU's peak FLOP/s and {GPU_MFU:.0%} of a GPU's"]
    if recipe.train.gradient_checkpointing:
        stated.append("gradient checkpointing adds a second forward: a third more time")
    if nodes > 1 and network_gbit_per_s:
        stated.append(f"each host sends {sent_bytes:,} bytes a step at {network_gbit_per_s:g} Gbit/s; nothing overlaps")
    elif nodes > 1:
        stated.append(f"the network is left out: each host sends {sent_bytes:,} bytes a step (--network adds its time)")
    return [*stated, "memory leaves out temporary tensors, fragmentation and the device's own context"]
