"""The operations whose fastest correct form depends on the device: products, attention, embedding.

    half-precision tensors --> does this device multiply them? --> yes: torch's own call
                                                               --> no:  upcast to fp32, multiply, round the result

A CPU without bf16 instructions gets torch's reference loops, ten times slower than its fp32 ones. Upcasting both
operands, multiplying in fp32 and rounding once is what bf16 hardware does: exact products, fp32 sums. Values kept for
the backward pass stay in half precision.

Known gaps: torch's CPU attention keeps its upcast operands until the backward pass.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_slm.model import cpu_attention
from ds_slm.model.documents import attend_each, attend_varlen, varlen_parameters, varlen_takes_groups, whole_rows
from ds_slm.recipe.rates import PRODUCTS_VARIABLE, chosen_products

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A recipe's precision -> what the model computes in."""
HALF = (torch.bfloat16, torch.float16)
CALL_SCORES = 25_000
"""On a CPU, a call for each document is faster than a mask if a call saves more than this many scores of queries and
keys on average: at 8 heads and 256 tokens a row, documents of 13 tokens; at 4 heads and 128 tokens, nearly none.
Measured, not derived."""


def multiplies(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device has fast products in this dtype; a CPU needs AVX-512 or AMX for the half-precision ones."""
    if device_type != "cpu" or dtype not in HALF:
        return True
    chosen = chosen_products()
    return chosen == "native" if chosen else _cpu_multiplies(dtype)


@lru_cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    check = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, check)())


def wants_blocked_backward(device_type: str, dtype: torch.dtype) -> bool:
    """Whether attention's backward pass should come from cpu_attention.cpp, if blocks are compiled."""
    return device_type == "cpu" and dtype == torch.bfloat16 and multiplies(device_type, dtype)


def _uses_blocked_backward(device_type: str, dtype: torch.dtype) -> bool:
    return wants_blocked_backward(device_type, dtype) and cpu_attention.is_built(dtype)


def make_device_checks_constant() -> None:
    """Let torch.compile ask once what a device can do and keep the answer, instead of tracing the question."""
    for check in (multiplies, _uses_blocked_backward, _is_ampere_or_newer, varlen_takes_groups):
        torch.compiler.assume_constant_result(check)  # a decorator would import the compiler in every process


def fix_sums(deterministic: bool) -> None:
    """Make a GPU sum products in fp32 and, if `deterministic`, in the same order every time.

    By default cuBLAS may add the parts of a half-precision product in half precision, and the backward passes of
    torch's attention kernels (flash, cuDNN, memory-efficient) add with atomics, in the order in which blocks finish.
    Call it before the first product. An eager CPU always sums in one order.
    """
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_fp16_accumulation = False
    products.allow_tf32 = False
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)

    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # imports torch's compiler, which takes seconds
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; torch insists on it
        # helps to find mistakes, takes time, and determinism does not need it
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


class PackedForm(NamedTuple):
    """How the documents of packed rows are separated."""

    name: Literal["varlen", "each", "mask"]
    """`varlen`: all at once, by a GPU's variable-length kernel. `each`: one by one. `mask`: a mask over T x T."""
    why: str = ""
    """Why it must be a mask."""


def packed_form(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> PackedForm:
    """The fastest form that the device, this PyTorch and the model allow; on a CPU it also depends on `calls_pay`."""
    device_type = torch.device(device).type
    if device_type == "cpu":
        return PackedForm("each")
    if device_type != "cuda" or dtype not in HALF or not _is_ampere_or_newer():
        return PackedForm("mask", "the flash kernel needs bf16 or fp16 and a GPU from Ampere on")
    if head_dim % 8 or head_dim > 256:
        return PackedForm("mask", f"the flash kernel takes no head_dim of {head_dim}: a multiple of 8, at most 256")
    if "window_size" not in varlen_parameters():
        return PackedForm("mask", f"torch {torch.__version__} has no causal varlen_attn")
    return PackedForm("varlen")


def calls_pay(heads: int, tokens: int, mean_length: float) -> bool:
    """Whether a CPU should take documents of this mean length one by one, in rows of `tokens`, instead of a mask."""
    return heads * mean_length * (tokens - mean_length / 2) > CALL_SCORES


def effective_kernels(
    device: torch.device | str, dtype: torch.dtype, packed_head_dim: int | None = None
) -> dict[str, str]:
    """How the model computes on this device in this dtype, for the report at the start of a run.

    Args:
        device: where it computes.
        dtype: the dtype of its weights and activations.
        packed_head_dim: the head dimension if rows are packed; None if they are not.
    """
    device_type, name = torch.device(device).type, str(dtype).removeprefix("torch.")
    native = multiplies(device_type, dtype)
    how = f"{device_type} {name}" if native else f"{device_type} fp32, {name} operands upcast and results rounded"
    if device_type == "cpu" and dtype in HALF and chosen_products():
        how += f" ({PRODUCTS_VARIABLE}={chosen_products()})"
    fp32_sums = device_type == "cpu" and dtype in HALF
    fixed = torch.are_deterministic_algorithms_enabled()
    return {
        "products": how,
        "attention": f"{_attention_name(device, dtype, packed_head_dim)}, {how}",
        "embedding_gradient": "fp32 sums per token id" if fp32_sums else f"torch, {name}",
        "norm": "F.rms_norm, fp32 inside",
        "sums": "fp32, in a fixed order (deterministic)" if fixed or device_type == "cpu" else "fp32, in any order",
    }


def _attention_name(device: torch.device | str, dtype: torch.dtype, packed_head_dim: int | None) -> str:
    backward = ""
    if wants_blocked_backward(torch.device(device).type, dtype):
        built, failure = cpu_attention.is_built(dtype), cpu_attention.failure()
        backward = ", backward pass in blocks" if built else f" ({failure})" if failure else ""

    if packed_head_dim is None:
        return f"scaled_dot_product_attention{backward}"
    form = packed_form(device, dtype, packed_head_dim)
    return {
        "varlen": "varlen_attn of all documents in packed rows",
        "each": "scaled_dot_product_attention of each document in packed rows, or a mask where they are short"
        + backward,
        "mask": f"scaled_dot_product_attention, dense mask of packed rows ({form.why})",
    }[form.name]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Rows x [..., in] times weight [out, in] transposed, in their common dtype with fp32 sums."""
    if multiplies(x.device.type, x.dtype):
        return F.linear(x, weight)
    return _UpcastProduct.apply(x, weight)


class _UpcastProduct(torch.autograd.Function):
    """F.linear through fp32. Saves its half-precision operands and upcasts them again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_fp32 = grad.float()
        d_x = (grad_fp32 @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None
        d_weight = grad_fp32.flatten(0, -2).T @ x.flatten(0, -2).float()
        return d_x, d_weight.to(weight.dtype)


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask_BTS: Tensor | None,
    causal: bool,
    offsets_C: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped keys and values.

    Args:
        q_BHTE: queries.
        k_BKSE: keys.
        v_BKSE: values.
        mask_BTS: True where a query may look; None: everywhere.
        causal: whether a query sees only keys up to its own.
        offsets_C: a query sees only keys up to its own in its document; `documents.offsets_of` makes them.

    Returns:
        y_BHTE in the dtype of q_BHTE.
    """
    if offsets_C is not None and q_BHTE.device.type == "cuda":
        return attend_varlen(q_BHTE, k_BKSE, v_BKSE, offsets_C)

    if causal and q_BHTE.shape[2] == k_BKSE.shape[2] and _uses_blocked_backward(q_BHTE.device.type, q_BHTE.dtype):
        offsets_C = whole_rows(q_BHTE.shape[0], q_BHTE.shape[2])

    mask = None if mask_BTS is None else mask_BTS.unsqueeze(-3)
    queries_per_key = q_BHTE.shape[1] // k_BKSE.shape[1]
    if queries_per_key > 1 and q_BHTE.device.type == "cuda" and not _flash_attends(q_BHTE, mask):
        # torch's memory-efficient kernel does not take grouped queries; the fallback would hold all T x S scores
        k_BKSE, v_BKSE = (x.repeat_interleave(queries_per_key, dim=1) for x in (k_BKSE, v_BKSE))
        queries_per_key = 1

    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "enable_gqa": queries_per_key > 1}
    if offsets_C is not None:
        attend, options = attend_each, {"offsets_C": offsets_C}
    if multiplies(q_BHTE.device.type, q_BHTE.dtype):
        return attend(q_BHTE, k_BKSE, v_BKSE, **options)
    return attend(q_BHTE.float(), k_BKSE.float(), v_BKSE.float(), **options).to(q_BHTE.dtype)


def _flash_attends(q_BHTE: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's flash kernel will take these: half precision, no mask, Ampere or newer."""
    return q_BHTE.dtype in HALF and mask is None and _is_ampere_or_newer()


def _is_ampere_or_newer() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D] for each id.

    torch's CPU backward adds the gradients of a repeated id one by one in the weight's dtype: in bf16, 2,000 ones sum
    to 256. So on a CPU the sums are formed in fp32 and rounded once.
    """
    if weight.device.type == "cpu" and weight.dtype in HALF:
        return _Fp32SumEmbedding.apply(ids, weight)
    return F.embedding(ids, weight)


class _Fp32SumEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        used, slots = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(used), ctx.shape[1], dtype=torch.float32).index_add_(
            0, slots, grad.flatten(0, -2).float()
        )
        d_weight = torch.zeros(ctx.shape, dtype=grad.dtype)
        d_weight[used] = sums.to(grad.dtype)
        return None, d_weight
