"""Memory of a recipe on a device: an estimate.

    Recipe, ParameterCounts, ZeRO settings, world size, micro-batch --> memory --> Memory (bytes of one rank)

Sources: what each ZeRO stage splits is arXiv 1910.02054; buffers follow DeepSpeed 0.19 as ds_slm sets it up (fp32
accumulation and reduction); saved activations are counted from ds_slm.model.decoder, the loss from ds_slm.model.loss.
`benchmarks/plan_memory.py` compares the memory with what launches take on a CPU.
Known gaps: temporary tensors of single operations and, on a GPU, fragmentation and the device's own context (about 0.5
GiB of CUDA) are left out; compiled blocks count as eager ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, assert_never

from ds_slm.recipe.counts import ParameterCounts
from ds_slm.recipe.schema import Model, Optimizer, Recipe

FP32, HALF = 4, 2
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size, and the most gradients it flattens into one message."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance."""
LOSS_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}
"""Logits of one chunk of the loss, in fp32 and once more in the model's precision: on a CPU what its cache holds."""
MIN_LOSS_CHUNK_TOKENS, MAX_LOSS_CHUNK_TOKENS = 128, 2048
BLOCK_VALUES = 256
"""bitsandbytes: values of 8-bit state that share one fp32 scale."""
SAVE_WINDOW_VALUES = 8 * 2**20
"""Values that a save gathers at a time: 32 MiB."""
PROGRAM_BYTES = 385_000_000
"""What a rank's process holds on a CPU before its first tensor: Python, torch, DeepSpeed and what else it imports, and
the code that a first forward loads. Resident memory of gpt-s-1.4m on one rank (Linux x86-64, CPU build of torch), its
tensors taken off."""
BITSANDBYTES_BYTES = 48_000_000
"""By how much that grows with bitsandbytes' optimiser: the same of demo."""


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
    gathered_bytes: int = 0
    """Whole weights that ZeRO-3 has gathered for forward and backward."""
    program_bytes: int = 0
    """The process itself: on a CPU its libraries share the memory with the tensors."""
    allocator_bytes: int = 0
    """On a CPU: freed memory that malloc holds but cannot use again."""
    host_bytes: int = field(default=0)
    """Masters and moments offloaded to the host; not in device_bytes."""

    @property
    def parts(self) -> dict[str, int]:
        """Name -> bytes of each part that lies on the device, by the fields above."""
        sizes = {part.name.removesuffix("_bytes"): getattr(self, part.name) for part in fields(self)}
        del sizes["host"]
        return sizes

    @property
    def device_bytes(self) -> int:
        """All of it but what is offloaded."""
        return sum(self.parts.values())


def memory(
    recipe: Recipe,
    counts: ParameterCounts,
    zero: Mapping[str, Any],
    world_size: int,
    micro_batch: int,
    device_type: str = "cuda",
) -> Memory:
    """Bytes of one rank.

    Args:
        recipe: what is trained.
        counts: its parameters.
        zero: DeepSpeed's zero_optimization section.
        world_size: devices over all hosts.
        micro_batch: rows of one forward.
        device_type: 'cpu' or 'cuda'.
    """
    stage, half, params = zero["stage"], recipe.train.precision != "fp32", counts.total
    width, on_cpu = HALF if half else FP32, device_type == "cpu"
    share = -(-params // world_size)
    weights = width * (share if stage == 3 else params)

    # Stage 1 accumulates whole gradients in fp32, 2 and 3 a rank's share; half-precision ones come and go beside it.
    gradients = FP32 * (params if stage == 1 else share) + (HALF * params if half else 0)

    masters = FP32 * share
    moments = -(-_moment_bytes(recipe.optimizer, counts) // world_size)

    # ZeRO-3 keeps a gathered weight for its next use if that is not far off: small models stay whole.
    limits = "stage3_max_live_parameters", "stage3_max_reuse_distance"
    live = min(int(zero.get(limit, MAX_LIVE_ELEMENTS)) for limit in limits)
    gathered = width * min(params, live) if stage == 3 else 0

    offloaded = zero.get("offload_optimizer") or {}
    offloads = isinstance(offloaded, Mapping) and offloaded.get("device", "none") != "none"
    on_host = offloads and not on_cpu  # a CPU is its own host

    activations = _activation_bytes(recipe, micro_batch, device_type)
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        buffers_bytes=_buffer_bytes(zero, recipe.train.precision, params, on_cpu, offloads),
        masters_bytes=0 if on_host else masters,
        moments_bytes=0 if on_host else moments,
        activations_bytes=activations,
        loss_bytes=_loss_bytes(recipe, micro_batch, device_type),
        gathered_bytes=gathered,
        program_bytes=_program_bytes(recipe.optimizer) if on_cpu else 0,
        allocator_bytes=_allocator_bytes(activations, counts, width) if on_cpu else 0,
        host_bytes=masters + moments if on_host else 0,
    )


def _program_bytes(optimizer: Optimizer) -> int:
    return PROGRAM_BYTES + (BITSANDBYTES_BYTES if optimizer.name == "adamw8bit" else 0)


def _allocator_bytes(activations: int, counts: ParameterCounts, width: int) -> int:
    """Freed memory that malloc holds on a CPU and cannot use again.

    glibc before 2.38 asks for a tensor's size and its alignment: the hole that a freed tensor leaves is too small for
    the next one of the same size. So a second forward lies beside the holes of the first, and from then on both places
    are used in turn. The gradients of the blocks, which are made while activations are freed, lie in such holes.

    Known gap: measured were 0.6 (ZeRO-2) to 1.3 (ZeRO-3) of the activations.
    """
    in_holes = width * (counts.attention + counts.mlp + counts.norms)
    return max(activations - in_holes, 0)


def save_bytes(recipe: Recipe, counts: ParameterCounts, world_size: int) -> int:
    """Host memory that a rank which writes checkpoints takes while a save is in flight, beside what training holds.

    It copies its share of fp32 weights and moments, packs, receives and puts in order a window of values at a time.
    """
    share = -(-counts.total // world_size)
    moments = -(-_moment_bytes(recipe.optimizer, counts) // world_size)
    windows = 3 * FP32 * min(SAVE_WINDOW_VALUES, counts.total)
    return FP32 * share + moments + windows


def _moment_bytes(optimizer: Optimizer, counts: ParameterCounts) -> int:
    """Both moments over all ranks: fp32, or 8 bits and their scales for matrices and, where asked for, embeddings."""
    params = counts.total
    if optimizer.name == "adamw":
        return 2 * FP32 * params
    if optimizer.name != "adamw8bit":
        assert_never(optimizer.name)

    in_8_bits = params - counts.norms - (counts.embedding + counts.head if optimizer.embedding_bits == 32 else 0)
    return 2 * (in_8_bits + FP32 * in_8_bits // BLOCK_VALUES + FP32 * (params - in_8_bits))


def _buffer_bytes(zero: Mapping[str, Any], precision: str, params: int, on_cpu: bool, offloads: bool) -> int:
    """The buffers DeepSpeed sets aside for reducing gradients, whatever the model's size; on a CPU what is touched.

    A CPU gives no memory to a buffer before something is written there: a small model fills a part of it. What it
    sends is flattened once more.
    """
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
    # BF16_Optimizer reduces the accumulated gradients themselves; it is not taken where the optimiser is offloaded.
    in_place = zero["stage"] == 1 and precision == "bf16" and not offloads
    contiguous = (zero.get("contiguous_gradients", True) or offloads) and not in_place
    width = HALF if zero["stage"] == 2 and precision != "fp32" else FP32
    copies = 2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1
    if not on_cpu:
        return bucket * width * copies if contiguous else 0
    flattened = FP32 * min(REDUCE_BUCKET_ELEMENTS if in_place else bucket, params)
    return flattened + (min(bucket, params) * width * copies if contiguous else 0)


def _activation_bytes(recipe: Recipe, micro_batch: int, device_type: str) -> int:
    """What the backward pass needs of the forward pass, with attention that never holds its T x T scores.

    With checkpointing each block keeps its input alone, and one block at a time the rest.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    half = recipe.train.precision != "fp32"
    width = HALF if half else FP32
    block = _cpu_block_bytes(shape, half) if device_type == "cpu" else _gpu_block_bytes(shape, width)
    ends = 2 * width * shape.hidden_size
    if recipe.train.gradient_checkpointing:
        return tokens * (width * shape.hidden_size * shape.num_hidden_layers + block + ends)
    return tokens * (block * shape.num_hidden_layers + ends)


def _gpu_block_bytes(shape: Model, width: int) -> int:
    """What a block keeps per token on a GPU.

    The inputs and outputs of its two norms; q, k, v, the attention's output and the input of o_proj; gate, silu(gate),
    up and their product.
    """
    queries, keys = _query_and_key_sizes(shape)
    block = width * (4 * shape.hidden_size + 3 * queries + 2 * keys + 4 * shape.intermediate_size)
    if shape.qk_norm:
        block += width * (queries + keys)
    if shape.exclusive_attention:
        block += FP32 * 4 * queries
    return block


def _cpu_block_bytes(shape: Model, half: bool) -> int:
    """What a block keeps per token on a CPU, whose norms are not fused, and which upcasts half-precision attention.

    A norm keeps its input and the normalised values in fp32, a reciprocal root and, for the products, its output.
    Attention keeps q, k, v and its output in fp32, a log-sum-exp a head, and the input of o_proj. The rest is gate,
    silu(gate), up and their product.
    """
    width = HALF if half else FP32
    queries, keys = _query_and_key_sizes(shape)
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads

    norms = 2 * ((2 * FP32 + width) * shape.hidden_size + FP32)
    attention = FP32 * (2 * queries + 2 * keys + heads) + width * queries
    if shape.qk_norm:
        attention += FP32 * (2 * queries + 2 * keys + heads + key_heads)
    if shape.exclusive_attention:  # four scalars a head, and output and value again where both come in half precision
        attention += FP32 * (4 * heads + (queries + keys if half else 0))
    return norms + attention + width * 4 * shape.intermediate_size


def _query_and_key_sizes(shape: Model) -> tuple[int, int]:
    return shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim


def loss_chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Tokens whose logits the loss holds at a time."""
    logits = LOSS_CHUNK_LOGITS["cpu" if device_type == "cpu" else "cuda"]
    return min(max(logits // vocab_size, MIN_LOSS_CHUNK_TOKENS), MAX_LOSS_CHUNK_TOKENS)


def _loss_bytes(recipe: Recipe, micro_batch: int, device_type: str) -> int:
    """A chunk of logits in fp32 and in the model's precision; gradients of hidden states and, in fp32, of the head.

    A CPU multiplies in fp32 here: one chunk, and a head and gradients of hidden states in fp32.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    half, on_cpu = recipe.train.precision != "fp32", device_type == "cpu"
    width = HALF if half else FP32
    chunk_logits = min(loss_chunk_tokens(device_type, shape.vocab_size), tokens) * shape.vocab_size
    head = shape.vocab_size * shape.hidden_size * FP32
    if on_cpu:
        return chunk_logits * FP32 + tokens * shape.hidden_size * FP32 + head * (2 if half else 1)
    return chunk_logits * (FP32 + width) + tokens * shape.hidden_size * width + head
