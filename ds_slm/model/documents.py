"""Packed rows: where their documents begin, and attention within each document without a mask over T x T.

    document_ids_BT --> starts_BT --> positions that restart, and the documents' offsets in all B x T tokens
    offsets, q, k, v --> a GPU: torch's variable-length flash attention, all documents at once
                     --> a CPU: torch's flash attention, one document after another, as one operator

`kernels.packed_form` says which form a device takes. The third is a mask of all earlier tokens in the same document.

The offsets' length has no effect on the host or the graph: it is padded with empty documents to one of few sizes
(`padded_count`), a function of the batch alone. A GPU's kernel also starts a block of threads for each empty document,
and its deterministic backward pass adds in an order that depends on their number.

Known gaps: on a CPU only a document's heads and blocks run in parallel, so dozens of threads idle on short documents.

Shapes: B rows, T tokens of a row, N = B * T, H query heads, K key and value heads, E head dimension, C documents,
including empty ones.
"""

import inspect
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_slm.model import cpu_attention

LEAST_PER_ROW = 8
"""The offsets always have a place for this many documents of a row, so that most batches have one shape."""


class PackedDocuments(NamedTuple):
    """Which tokens of packed rows may see each other."""

    ids_BT: Tensor
    """The document of each token: a run of equal ids in a row is one document."""
    count: int | None = None
    """Documents in all rows; None counts them, and waits for a GPU to do so."""


def starts_of(document_ids_BT: Tensor) -> Tensor:
    """True where a run of equal document ids begins; a row's first token always begins one."""
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return starts_BT


def positions_of(starts_BT: Tensor) -> Tensor:
    """Positions that restart with each document, positions_BT."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return index_T - torch.where(starts_BT, index_T, 0).cummax(1).values


def padded_count(count: int, rows: int) -> int:
    """Documents, including empty ones: for each row the next power of two of their mean number, or LEAST_PER_ROW."""
    per_row = -(-count // rows)
    return rows * max(LEAST_PER_ROW, 1 << (per_row - 1).bit_length())


def offsets_of(starts_BT: Tensor, count: int) -> Tensor:
    """Where each document begins among all B x T tokens, then N for each empty one: int32 [C + 1], on the device.

    Args:
        starts_BT: where documents begin.
        count: documents in all rows; the device is not asked, because the host would have to wait for it.
    """
    size = padded_count(count, len(starts_BT)) + 1
    number_N = starts_BT.flatten().cumsum(0)  # of each token's document, from 1
    wanted_C = torch.arange(1, size + 1, device=starts_BT.device)
    return torch.searchsorted(number_N, wanted_C, out_int32=True)


@lru_cache
def varlen_parameters() -> frozenset[str]:
    """The parameters of torch's variable-length attention; empty if this torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_takes_groups() -> bool:
    """Whether it attends with fewer keys and values than queries. A compiled graph holds the answer."""
    return "enable_gqa" in varlen_parameters()


def attend_varlen(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, offsets_C: Tensor) -> Tensor:
    """Causal attention within documents on a GPU, y_BHTE; half precision only."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler

    B, H, T, _ = q_BHTE.shape
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if k_BKTE.shape[1] != H:
        if varlen_takes_groups():
            options["enable_gqa"] = True
        else:
            k_BKTE, v_BKTE = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BKTE, v_BKTE))

    q_NHE, k_NKE, v_NKE = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q_BHTE, k_BKTE, v_BKTE))
    y_NHE = varlen_attn(q_NHE, k_NKE, v_NKE, offsets_C, offsets_C, T, T, **options)
    assert isinstance(y_NHE, Tensor)
    return y_NHE.unflatten(0, (B, T)).transpose(1, 2)


def whole_rows(B: int, T: int) -> Tensor:
    """Offsets of documents that are whole rows, on a CPU."""
    return torch.arange(0, B * T + 1, T, dtype=torch.int32)


def attend_each(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, offsets_C: Tensor) -> Tensor:
    """Causal attention within documents on a CPU, y_BHTE; one node of a compiled graph, whatever the offsets."""
    return torch.ops.ds_slm.attend_each(q_BHTE, k_BKTE, v_BKTE, offsets_C)[0]


def _places(offsets_C: Tensor, T: int) -> Iterator[tuple[slice, slice, slice]]:
    """The place of each document in a tensor [B, heads, T, ...]; one place for all if each is a whole row."""
    bounds = offsets_C.tolist()
    if bounds == list(range(0, bounds[-1] + 1, T)):
        yield slice(None), slice(None), slice(None)
        return

    for begin, end in pairwise(bounds):
        if end > begin:
            row, first = divmod(begin, T)
            yield slice(row, row + 1), slice(None), slice(first, first + end - begin)


def _forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    assert offsets[-1] == q.shape[0] * q.shape[2], "more documents than were counted"
    y, logsumexp = _empty_results(q, k, v, offsets)
    for at in _places(offsets, q.shape[2]):
        y[at], logsumexp[at] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[at], k[at], v[at], 0.0, is_causal=True
        )
    return y, logsumexp


def _empty_results(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
    grad: Tensor, operands: list[Tensor], y: Tensor, logsumexp: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad, operands, y, logsumexp, offsets)
    backward = cpu_attention.backward if cpu_attention.is_built(y.dtype) else _backward_by_torch
    for at in _places(offsets, y.shape[2]):
        q, k, v = (one[at] for one in operands)
        parts = backward(grad[at], q, k, v, y[at], logsumexp[at])
        for whole, part in zip(gradients, parts, strict=True):
            whole[at] = part
    return gradients


def _backward_by_torch(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, y, logsumexp, 0.0, is_causal=True
    )


def _empty_gradients(
    grad: Tensor, operands: list[Tensor], y: Tensor, logsumexp: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = operands
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _AttendEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, logsumexp = torch.ops.ds_slm.attend_each(q, k, v, offsets)
        ctx.save_for_backward(q, k, v, offsets, y, logsumexp)
        ctx.mark_non_differentiable(logsumexp)
        return y, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, offsets, y, logsumexp = ctx.saved_tensors
        return *torch.ops.ds_slm.attend_each_backward(grad, [q, k, v], y, logsumexp, offsets), None


# Operators of their own: the compiler sees no loop. `torch.library.custom_op` would import it in every process.
_LIBRARY = torch.library.Library("ds_slm", "DEF")
_LIBRARY.define("attend_each(Tensor q, Tensor k, Tensor v, Tensor offsets) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attend_each_backward(Tensor grad, Tensor[] operands, Tensor y, Tensor logsumexp, Tensor offsets)"
    " -> (Tensor, Tensor, Tensor)"
)
for _name, _computes, _shapes in (
    ("attend_each", _forward, _empty_results),
    ("attend_each_backward", _backward, _empty_gradients),
):
    _LIBRARY.impl(_name, _computes, "CPU")
    _LIBRARY.impl(_name, _shapes, "Meta")
_LIBRARY.impl("attend_each", _AttendEach.apply, "AutogradCPU")
