"""Weighted cross-entropy and z-loss over a large vocabulary, a few tokens at a time.

    hidden_ND, head_weight_VD --> logits_CV of one chunk --> nll, logsumexp, and at once d_logits_CV
                              --> d_hidden_CD, and d_weight_VD added up in fp32 --> the next chunk

The logits of all tokens would be the largest tensor of the run. Here a chunk's logits live only until its share of the
gradient is formed, in the forward pass; the backward pass multiplies the stored gradient by one scalar.

    nll_n = logsumexp(logits_n) - logits_n[target_n]          z_n = logsumexp(logits_n)
    objective = sum_n w_n nll_n + z_scale * sum over w_n > 0 of z_n^2
    d objective / d logits_n = (w_n + 2 z_scale z_n [w_n > 0]) softmax(logits_n) - w_n onehot(target_n)

Precision: softmax, sums and the accumulated d_weight are fp32. Where the device multiplies in the model's dtype, each
chunk's three products come in that dtype; where it upcasts (see kernels.py) they stay fp32. The backward pass scales
both gradients in fp32 and rounds them to the dtype of their tensors.

An evaluation forms a chunk's d_logits_CV as well, so that it shares training's compiled graph, and leaves out the two
products after it.

Known gaps: not differentiable twice; softmax costs five passes over a chunk unless it is compiled.

Shapes: N tokens, C tokens of one chunk, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_slm.model.kernels import multiplies
from ds_slm.recipe.sizes import loss_chunk_tokens

ALIGNMENT = {"cpu": 1, "cuda": 128}
"""The vocabulary is padded to a multiple of this, only inside the loss: a GPU's products are slow at odd sizes."""


class Targets(NamedTuple):
    """The targets of N tokens and their weights."""

    ids_N: Tensor
    """The id to predict at each token."""
    weights_N: Tensor
    """Loss weight of each token, at least 0."""
    z_scale: float = 0.0
    """Factor of the sum of squared logsumexps."""


class LossSums(NamedTuple):
    """Sums over one micro-batch, fp32 scalars; the trainer divides them by sums over the whole step."""

    objective: Tensor
    """Sum of w * nll + z_scale * sum of z^2: the only one with a gradient."""
    nll: Tensor
    """Sum of w * nll, in nats."""
    weight: Tensor
    """Sum of w."""
    z2: Tensor
    """Sum of logsumexp^2 over tokens with w > 0."""
    count: Tensor
    """Tokens with w > 0."""


def chunked_loss(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    targets: Targets,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> LossSums:
    """The loss sums of N tokens without ever holding N x V logits.

    Tokens of weight 0 add exactly nothing, to the sums or to the gradients, whatever their hidden state or target.

    Args:
        hidden_ND: final hidden states.
        head_weight_VD: the output projection.
        targets: what each token is to predict, and how much it counts.
        chunk_tokens: tokens whose logits are held at a time; None chooses by device and vocabulary.
        compiled: whether torch.compile fuses what happens between the products.
    """
    chunk_tokens = chunk_tokens or loss_chunk_tokens(hidden_ND.device.type, head_weight_VD.shape[0])
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_weight_VD.requires_grad)
    options = _Options(chunk_tokens, needs_grad, compiled)
    return LossSums(*_ChunkedLoss.apply(hidden_ND, head_weight_VD, targets, options))


class TokenScores(NamedTuple):
    """A model's log-probabilities of single tokens."""

    log_probability_N: Tensor
    """In nats, fp32."""
    is_greedy_N: Tensor
    """Whether no other token is likelier; of equally likely tokens only the one with the smallest id counts."""


@torch.no_grad()
def score_tokens(hidden_ND: Tensor, head_weight_VD: Tensor, places_N: Tensor, targets_N: Tensor) -> TokenScores:
    """The log-probabilities of single tokens, a few places at a time: the head runs only where something is scored.

    Args:
        hidden_ND: final hidden states of all tokens.
        head_weight_VD: the output projection.
        places_N: the token after which each target is scored. Equal places next to each other are computed once.
        targets_N: the ids that are scored.
    """
    compute_dtype = hidden_ND.dtype if multiplies(hidden_ND.device.type, hidden_ND.dtype) else torch.float32
    matrix_VD = head_weight_VD.to(compute_dtype)
    chunk_tokens = loss_chunk_tokens(hidden_ND.device.type, len(head_weight_VD))

    found = []
    for places_C, targets_C in zip(places_N.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True):
        once_U, index_C = places_C.unique_consecutive(return_inverse=True)
        logits_UV = F.linear(hidden_ND[once_U].to(compute_dtype), matrix_VD).float()
        log_probability_C = logits_UV[index_C, targets_C] - logits_UV.logsumexp(-1)[index_C]
        found.append((log_probability_C, logits_UV.argmax(-1)[index_C] == targets_C))

    return TokenScores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _Options(NamedTuple):
    """How the loss is computed; its sums do not depend on this."""

    chunk_tokens: int
    needs_grad: bool
    compiled: bool


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_weight_VD: Tensor, targets: Targets, options: _Options
    ) -> tuple[Tensor, ...]:
        weights_N = targets.weights_N.float()
        counted_N = weights_N > 0
        ids_N = targets.ids_N.long().masked_fill(~counted_N, 0)

        # Gradients are formed with weights of at most 1: fp16 would lose small ones before the loss scale reaches them.
        unit = weights_N.max().clamp_min(torch.finfo(torch.float32).tiny)

        upcast = not multiplies(hidden_ND.device.type, hidden_ND.dtype)
        compute_dtype = torch.float32 if upcast else hidden_ND.dtype
        vocab_size, matrix_VD = len(head_weight_VD), head_weight_VD.to(compute_dtype)
        if padding := -vocab_size % ALIGNMENT[hidden_ND.device.type]:
            matrix_VD = F.pad(matrix_VD, (0, 0, 0, padding))

        # Filled on the device: a copy from the host would wait for a GPU.
        z_scale_1 = hidden_ND.new_full((), targets.z_scale, dtype=torch.float32)
        from_logits = _compiled() if options.compiled else _from_logits

        nll = hidden_ND.new_zeros((), dtype=torch.float32)
        z2 = torch.zeros_like(nll)
        d_hidden_ND = torch.empty_like(hidden_ND, dtype=compute_dtype) if options.needs_grad else None
        d_weight_VD = torch.zeros_like(matrix_VD, dtype=torch.float32) if options.needs_grad else None

        for start in range(0, len(ids_N), options.chunk_tokens):
            chunk = slice(start, start + options.chunk_tokens)
            counted_C, weights_C, ids_C1 = counted_N[chunk], weights_N[chunk], ids_N[chunk].unsqueeze(1)

            # A masked token may hold anything, infinities too: zero its hidden state before, not its loss after.
            hidden_CD = hidden_ND[chunk].to(compute_dtype).masked_fill(~counted_C.unsqueeze(1), 0)
            logits_CV = F.linear(hidden_CD, matrix_VD)
            logits_CV[:, vocab_size:] = -torch.inf

            nll_chunk, z2_chunk, d_logits_CV = from_logits(logits_CV, ids_C1, weights_C, unit, z_scale_1)
            nll += nll_chunk
            z2 += z2_chunk

            # The chunk's gradients are formed at once, so that its logits need not be kept.
            if d_hidden_ND is None or d_weight_VD is None:
                continue
            torch.mm(d_logits_CV, matrix_VD, out=d_hidden_ND[chunk])
            if compute_dtype == torch.float32:
                d_weight_VD.addmm_(d_logits_CV.T, hidden_CD)
            else:
                d_weight_VD += d_logits_CV.T @ hidden_CD

        if options.needs_grad:
            assert d_weight_VD is not None
            ctx.save_for_backward(d_hidden_ND, d_weight_VD[:vocab_size], unit)
            ctx.dtypes = hidden_ND.dtype, head_weight_VD.dtype

        objective = nll + targets.z_scale * z2
        constants = nll, weights_N.sum(), z2, counted_N.sum(dtype=torch.float32)
        ctx.mark_non_differentiable(*constants)
        return objective, *constants

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD, unit = ctx.saved_tensors
        scale = grad.float() * unit
        # .float() first: against a bf16 tensor the scalar itself would be rounded to bf16, and every gradient with it.
        d_hidden_ND = d_hidden_ND.float().mul(scale).to(ctx.dtypes[0])
        # in place: the weight's gradient is the largest tensor here, and a second backward pass is refused
        return d_hidden_ND, d_weight_VD.mul_(scale).to(ctx.dtypes[1]), None, None


def _from_logits(
    logits_CV: Tensor, ids_C1: Tensor, weights_C: Tensor, unit: Tensor, z_scale_1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's sums of w nll and z^2, and its d_logits_CV / unit, written over the logits in their dtype."""
    dtype, logits_CV = logits_CV.dtype, logits_CV.float()
    counted_C = weights_C > 0
    target_logits_C = logits_CV.gather(1, ids_C1).squeeze(1)
    peak_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(peak_C1).exp_()  # in place: the one large tensor of the chunk
    sum_C1 = exp_CV.sum(1, keepdim=True)
    z_C = (sum_C1.log() + peak_C1).squeeze(1)

    nll = (weights_C * (z_C - target_logits_C)).sum()
    z2 = (z_C.square() * counted_C).sum()

    coefficient_C = (weights_C + 2 * z_scale_1 * z_C * counted_C) / unit
    d_logits_CV = exp_CV.mul_(coefficient_C.unsqueeze(1) / sum_C1)
    d_logits_CV.scatter_add_(1, ids_C1, -(weights_C / unit).unsqueeze(1))
    return nll, z2, d_logits_CV.to(dtype)


@lru_cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_from_logits` in fused passes over the chunk."""
    return torch.compile(_from_logits, dynamic=False)
