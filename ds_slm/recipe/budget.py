"""Memory of a recipe on a device: an estimate.

    Recipe, ParameterCounts, ZeRO settings, world size, micro-batch --> memory --> Memory (bytes of one rank)

Sources: what each ZeRO stage splits is arXiv 1910.02054; buffers follow DeepSpeed 0.19 as ds_slm sets it up (fp32
accumulation and reduction); saved activations are counted from ds_slm.model.decoder, the loss from ds_slm.model.loss.
`benchmarks/plan_memory.py` compares the memory with what launches take on a CPU.
Known gaps: a GPU's temporary tensors of single operations, its fragmentation and its own context (about 0.5 GiB of
CUDA) are left out; compiled blocks count as eager ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, assert_never

from ds_slm.recipe.counts import ParameterCounts, parameter_counts
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model, Optimizer
from ds_slm.recipe.sizes import BLOCK_VALUES, SAVE_WINDOW_VALUES, loss_chunk_tokens

FP32, HALF = 4, 2
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size, and the most gradients it flattens into one message."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance."""
PROGRAM_BYTES = 385_000_000
"""Memory of a rank's process on a CPU before its first tensor: Python, torch, DeepSpeed, other imports, and the code
that a first forward loads. Resident memory of gpt-s-1.4m on one rank (Linux x86-64, CPU build of torch) without its
tensors."""
KEPT_APART = {(1, False): 0.88, (1, True): 0.88, (2, False): 0.56, (2, True): 0.85, (3, False): 1.2, (3, True): 1.2}
"""ZeRO stage, whether in half precision -> freed memory that stays unusable on a CPU, as a share of the activations.
Measured with benchmarks/plan_memory.py (gpt-s-1.4m, slm-10m and ant-10m, 4,096 tokens a forward)."""
BITSANDBYTES_BYTES = 48_000_000
"""How much that grows with bitsandbytes' optimiser, measured in the same way with demo."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak."""

    weights_bytes: int
    gradients_bytes: int
    buffers_bytes: int
    """Communication buffers."""
    masters_bytes: int
    """fp32 weights the optimiser updates."""
    moments_bytes: int
    activations_bytes: int
    """Saved activations of one micro-batch."""
    loss_bytes: int
    """One chunk of logits, and the gradients the loss keeps until its backward."""
    gathered_bytes: int = 0
    """Whole weights that ZeRO-3 has gathered for forward and backward."""
    program_bytes: int = 0
    """The process itself: on a CPU, libraries and tensors share the memory."""
    temporary_bytes: int = 0
    """On a CPU: what the backward pass of a feed-forward layer needs in addition to all activations."""
    allocator_bytes: int = 0
    """On a CPU: freed memory that malloc holds but cannot use again."""
    host_bytes: int = field(default=0)
    """Masters and moments offloaded to the host; not in device_bytes."""

    @property
    def parts(self) -> dict[str, int]:
        """Name -> bytes of each part on the device, from the fields above."""
        sizes = {part.name.removesuffix("_bytes"): getattr(self, part.name) for part in fields(self)}
        del sizes["host"]
        return sizes

    @property
    def device_bytes(self) -> int:
        """All bytes except what is offloaded."""
        return sum(self.parts.values())


def offloads_optimizer(zero: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's zero_optimization section puts masters and moments into the host's memory."""
    section = zero.get("offload_optimizer") or {}
    return isinstance(section, Mapping) and section.get("device", "none") != "none"


def takes_bf16_optimizer(zero: Mapping[str, Any], precision: str) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which reduces in its own way, instead of the one of stage 1."""
    return zero["stage"] == 1 and precision == "bf16" and not offloads_optimizer(zero)


def memory(
    recipe: Recipe,
    zero: Mapping[str, Any],
    world_size: int,
    micro_batch: int,
    device_type: str = "cuda",
    half_products: bool = False,
) -> Memory:
    """Bytes of one rank.

    Args:
        recipe: what is trained.
        zero: DeepSpeed's zero_optimization section.
        world_size: devices over all hosts.
        micro_batch: rows of one forward.
        device_type: 'cpu' or 'cuda'.
        half_products: whether a CPU multiplies in the recipe's half precision; otherwise it upcasts.
    """
    counts = parameter_counts(recipe.model)
    stage, half, params = zero["stage"], recipe.train.precision != "fp32", counts.total
    width, on_cpu = HALF if half else FP32, device_type == "cpu"
    share = -(-params // world_size)
    weights = width * (share if stage == 3 else params)

    # Stage 1 accumulates whole gradients in fp32, stages 2 and 3 a rank's share; half-precision ones are temporary.
    gradients = FP32 * (params if stage == 1 else share) + (HALF * params if half else 0)

    masters = FP32 * share
    moments = -(-_moment_bytes(recipe.optimizer, counts) // world_size)

    # ZeRO-3 keeps a gathered weight if its next use is near: small models stay whole.
    limits = "stage3_max_live_parameters", "stage3_max_reuse_distance"
    live = min(int(zero.get(limit, MAX_LIVE_ELEMENTS)) for limit in limits)
    gathered = width * min(params, live) if stage == 3 else 0

    on_host = offloads_optimizer(zero) and not on_cpu  # a CPU is its own host

    upcasts = on_cpu and half and not half_products
    block_gradients = width * (counts.attention + counts.mlp + counts.norms)
    activations = _activation_bytes(recipe, micro_batch, on_cpu, upcasts)
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        buffers_bytes=_buffer_bytes(zero, recipe.train.precision, params, on_cpu),
        masters_bytes=0 if on_host else masters,
        moments_bytes=0 if on_host else moments,
        activations_bytes=activations,
        loss_bytes=_loss_bytes(recipe, micro_batch, device_type, upcasts),
        gathered_bytes=gathered,
        program_bytes=_program_bytes(recipe.optimizer) if on_cpu else 0,
        temporary_bytes=_temporary_bytes(recipe, micro_batch, width) if on_cpu else 0,
        allocator_bytes=_allocator_bytes(stage, half, activations, block_gradients) if on_cpu else 0,
        host_bytes=masters + moments if on_host else 0,
    )


def _program_bytes(optimizer: Optimizer) -> int:
    return PROGRAM_BYTES + (BITSANDBYTES_BYTES if optimizer.name == "adamw8bit" else 0)


def _allocator_bytes(stage: int, half: bool, activations: int, block_gradients: int) -> int:
    """Freed memory that malloc holds on a CPU and cannot use again.

    glibc before 2.38 asks for a tensor's size plus its alignment. The hole that a freed tensor leaves is therefore too
    small for the next tensor of the same size, unless its neighbours are free as well. So part of a second forward lies
    beside the holes of the first. How large a part depends on what stays between the holes: only temporary tensors if
    stage 2 reduces an fp32 gradient at once; stage 1's gradients, which fill holes until the step; stage 3's gathered
    weights.

    Known gap: the shares are measured, not derived, and are valid for glibc 2.36.
    """
    kept_apart = KEPT_APART[stage, half] * activations
    return max(round(kept_apart) - (block_gradients if stage == 1 else 0), 0)


def save_bytes(recipe: Recipe, counts: ParameterCounts, world_size: int) -> int:
    """Host memory, in addition to training's, of a rank that writes checkpoints while a save is in flight.

    It copies its share of fp32 weights and moments, then packs, receives and orders one window of values at a time.
    """
    share = -(-counts.total // world_size)
    moments = -(-_moment_bytes(recipe.optimizer, counts) // world_size)
    windows = 3 * FP32 * min(SAVE_WINDOW_VALUES, counts.total)
    return FP32 * share + moments + windows


def _moment_bytes(optimizer: Optimizer, counts: ParameterCounts) -> int:
    """Both moments over all ranks: fp32, or 8 bits and their scales for matrices and, if asked for, embeddings."""
    params = counts.total
    if optimizer.name == "adamw":
        return 2 * FP32 * params
    if optimizer.name != "adamw8bit":
        assert_never(optimizer.name)

    in_8_bits = params - counts.norms - (counts.embedding + counts.head if optimizer.embedding_bits == 32 else 0)
    return 2 * (in_8_bits + FP32 * in_8_bits // BLOCK_VALUES + FP32 * (params - in_8_bits))


def _buffer_bytes(zero: Mapping[str, Any], precision: str, params: int, on_cpu: bool) -> int:
    """The buffers that DeepSpeed allocates for reducing gradients, whatever the model's size; on a CPU the used part.

    On a CPU a buffer takes memory only where something is written: a small model fills a part of it. What it sends is
    flattened once more.
    """
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
    in_place = takes_bf16_optimizer(zero, precision)  # it reduces the accumulated gradients themselves
    contiguous = (zero.get("contiguous_gradients", True) or offloads_optimizer(zero)) and not in_place
    width = HALF if zero["stage"] == 2 and precision != "fp32" else FP32
    copies = 2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1
    if not on_cpu:
        return bucket * width * copies if contiguous else 0
    flattened = FP32 * min(REDUCE_BUCKET_ELEMENTS if in_place else bucket, params)
    return flattened + (min(bucket, params) * width * copies if contiguous else 0)


def _activation_bytes(recipe: Recipe, micro_batch: int, on_cpu: bool, upcasts: bool) -> int:
    """What the backward pass needs from the forward pass, with attention that never holds its T x T scores.

    With checkpointing each block keeps only its input, and one block at a time keeps the rest.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    width = HALF if recipe.train.precision != "fp32" else FP32
    block = _cpu_block_bytes(shape, width, upcasts) if on_cpu else _gpu_block_bytes(shape, width)
    ends = 2 * width * shape.hidden_size
    if recipe.train.gradient_checkpointing:
        return tokens * (width * shape.hidden_size * shape.num_hidden_layers + block + ends)
    return tokens * (block * shape.num_hidden_layers + ends)


def _temporary_bytes(recipe: Recipe, micro_batch: int, width: int) -> int:
    """At the peak, as the backward pass begins: gradients that the last block's feed-forward layer holds.

    The gradients of product, silu(gate) and up at a time, and two of the residual stream: received and passed on.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    return tokens * width * (3 * shape.intermediate_size + 2 * shape.hidden_size)


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


def _cpu_block_bytes(shape: Model, width: int, upcasts: bool) -> int:
    """What a block keeps per token on a CPU, whose norms are not fused.

    A norm keeps its input and the normalised values in fp32, a reciprocal root and, for the products, its output.
    Attention keeps q, k, v and its output, in fp32 where a CPU upcasts half precision, a log-sum-exp a head, and the
    input of o_proj. The rest is gate, silu(gate), up and their product.
    """
    queries, keys = _query_and_key_sizes(shape)
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    half, attended = width == HALF, FP32 if upcasts else width

    norms = 2 * ((2 * FP32 + width) * shape.hidden_size + FP32)
    attention = attended * (2 * queries + 2 * keys) + FP32 * heads + width * queries
    if shape.qk_norm:
        attention += FP32 * (2 * queries + 2 * keys + heads + key_heads)
    if shape.exclusive_attention:  # four scalars a head, and output and value again where both come in half precision
        attention += FP32 * (4 * heads + (queries + keys if half else 0))
    return norms + attention + width * 4 * shape.intermediate_size


def _query_and_key_sizes(shape: Model) -> tuple[int, int]:
    return shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim


def _loss_bytes(recipe: Recipe, micro_batch: int, device_type: str, upcasts: bool) -> int:
    """A chunk of logits in fp32, and in the model's precision twice; gradients of hidden states and, in fp32, the head.

    With an fp32 model, or if half precision is upcast, the chunk is held once and the hidden states' gradients are
    fp32; an upcast head lies beside its gradient.
    """
    shape, tokens = recipe.model, micro_batch * recipe.data.seq_len
    half, on_cpu = recipe.train.precision != "fp32", device_type == "cpu"
    width = HALF if half else FP32
    chunk_logits = min(loss_chunk_tokens(device_type, shape.vocab_size), tokens) * shape.vocab_size
    head = shape.vocab_size * shape.hidden_size * FP32
    if on_cpu and (upcasts or not half):
        return chunk_logits * FP32 + tokens * shape.hidden_size * FP32 + head * (2 if upcasts else 1)
    return chunk_logits * (FP32 + width) + tokens * shape.hidden_size * width + head
