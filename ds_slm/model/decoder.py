"""The whole decoder: one pre-norm transformer whose parameter names are Hugging Face's.

    ids_BT --> embed_tokens --> blocks: x += attention(norm(x)); x += mlp(norm(x)) --> norm --> hidden_BTD
    hidden_BTD, targets_BT, weights_BT --> head and loss in chunks --> LossSums          (training, evaluation)
    hidden_BTD, continuations --> head at scored tokens --> TokenScores                  (benchmarks)
    hidden_BTD --> head --> logits_BTV                                                   (generation)

RMSNorm is computed in fp32 (arXiv 1910.07467); rotary positions turn half against half (arXiv 2104.09864); SwiGLU has
no biases (arXiv 2002.05202); queries share keys and values in groups (arXiv 2305.13245). Optional: RMSNorm of each
query and key head before rotation (arXiv 2302.05442), exclusive attention (arXiv 2603.09078), a head tied to the
embedding.

Shapes: B rows, T tokens of a row, S keys in sight (cached ones and T new ones), D hidden size, H query heads, K key and
value heads, G = H / K, E head dimension, F feed-forward size, V vocabulary, N = B * T.

Known gaps: no dropout, no sliding window, no RoPE scaling.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_slm.model import cpu_attention, documents, kernels
from ds_slm.model.documents import PackedDocuments
from ds_slm.model.kernels import attention, embed, product
from ds_slm.model.loss import LossSums, Targets, TokenScores, chunked_loss, score_tokens
from ds_slm.recipe.sections import Model

__all__ = ["Continuations", "Decoder", "KVCache", "build", "exclude_own_value", "initialise"]


class Linear(nn.Module):
    """x @ weight.T, without bias; `initialise` fills the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """From [..., inputs] to [..., outputs]."""
        return product(x, self.weight)


class Embedding(nn.Module):
    """A row of the weight for each id."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """x_BTD."""
        return embed(ids_BT, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Positions(NamedTuple):
    """The positions of a batch's tokens and what each token may see: the same for every block."""

    cos: Tensor
    """Cosines of the rotation, fp32 [..., T, E / 2]."""
    sin: Tensor
    mask_BTS: Tensor | None
    """True where a token may look. None: it sees all S keys, or what the next two fields allow."""
    causal: bool
    """Whether a token sees only keys up to its own."""
    offsets_C: Tensor | None = None
    """Where documents begin (`documents.offsets_of`): a token sees only keys up to its own in its document."""


class Continuations(NamedTuple):
    """What is scored in a batch whose rows hold a context once and several continuations of it, one after another."""

    branch_ids_BT: Tensor | None
    """0 for the context's tokens, then a number for each continuation, and -1 for padding. A continuation sees the
    context and itself, and its positions follow the context's. None if each row is one plain sequence."""
    places_N: Tensor
    """The token, counted over all B x T, after which a target is scored."""
    targets_N: Tensor
    """The ids that are scored."""


class KVCache:
    """Keys and values of the tokens seen so far, for decoding; every row has the same length."""

    def __init__(self, shape: Model, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.num_hidden_layers, 2, rows, shape.num_key_value_heads, capacity, shape.head_dim)
        self.buffer = torch.empty(size, dtype=dtype, device=device)
        self.length = 0
        """Tokens seen by every layer."""

    def extend(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; returns all of them, k_BKSE and v_BKSE."""
        end = self.length + k_BKTE.shape[2]
        keys, values = self.buffer[layer]
        keys[:, :, self.length : end] = k_BKTE
        values[:, :, self.length : end] = v_BKTE
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal attention with grouped keys and values."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, queries)
        self.k_proj = Linear(shape.hidden_size, keys)
        self.v_proj = Linear(shape.hidden_size, keys)
        self.o_proj = Linear(queries, shape.hidden_size)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else nn.Identity()
        self.exclusive = shape.exclusive_attention

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        """What the block adds to x_BTD."""
        q_BHTE = rotate(self.q_norm(self._heads(self.q_proj(x_BTD))).transpose(1, 2), positions)
        k_BKTE = rotate(self.k_norm(self._heads(self.k_proj(x_BTD))).transpose(1, 2), positions)
        v_BKTE = self._heads(self.v_proj(x_BTD)).transpose(1, 2)
        k_BKSE, v_BKSE = (k_BKTE, v_BKTE) if cache is None else cache.extend(layer, k_BKTE, v_BKTE)
        y_BHTE = attention(q_BHTE, k_BKSE, v_BKSE, positions.mask_BTS, positions.causal, positions.offsets_C)
        if self.exclusive:
            y_BHTE = exclude_own_value(y_BHTE, v_BKTE)
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def exclude_own_value(y_BHTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Exclusive attention: y minus its component along the token's own value, y - (y.v / v.v) v, in fp32.

    A token that sees only itself has y = v and gets exactly zero: y.v and v.v are then the same sum.
    """
    y_BKGTE = y_BHTE.unflatten(1, (v_BKTE.shape[1], -1)).float()
    v_BKGTE = v_BKTE.unsqueeze(2).float().expand_as(y_BKGTE)
    share = (y_BKGTE * v_BKGTE).sum(-1, keepdim=True) / (v_BKGTE * v_BKGTE).sum(-1, keepdim=True).clamp_min(1e-20)
    return (y_BKGTE - share * v_BKGTE).flatten(1, 2).to(y_BHTE.dtype)


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotary positions on x [B, heads, T, E]: component i turns against i + E / 2, in fp32."""
    left, right = x.float().chunk(2, dim=-1)
    turned = left * positions.cos - right * positions.sin, right * positions.cos + left * positions.sin
    return torch.cat(turned, dim=-1).to(x.dtype)


@lru_cache(maxsize=8)
def rotary_tables(head_dim: int, theta: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [length, head_dim / 2]. No buffers: casting a model to bf16 must not round them."""
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angles = torch.arange(length, dtype=torch.float32, device=device).outer(1.0 / theta**exponents)
        return angles.cos(), angles.sin()


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the block adds to x_BTD."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """The residual stream after this block."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), positions, cache, layer)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Backbone(nn.Module):
    """Everything below the head."""

    def __init__(self, shape: Model, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.shape = shape
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, ids_BT: Tensor, positions: Positions, cache: KVCache | None, with_training_graph: bool = False
    ) -> Tensor:
        """Final hidden states, hidden_BTD."""
        x_BTD = self.embed_tokens(ids_BT)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            if recompute:  # nothing in a block is random, so no generator state needs restoring
                x_BTD = checkpoint(block, x_BTD, positions, use_reentrant=False, preserve_rng_state=False)
            elif with_training_graph:
                x_BTD = run_with_training_graph(block, x_BTD, positions)
            elif cache is None:
                x_BTD = block(x_BTD, positions)  # without its number, or each layer would be compiled separately
            else:
                x_BTD = block(x_BTD, positions, cache, layer)
        if cache is not None:
            cache.length += ids_BT.shape[1]
        return self.norm(x_BTD)

    def positions(self, ids_BT: Tensor, cache: KVCache | None) -> Positions:
        """The rotation of each token, and what it sees: all tokens before it."""
        T, seen = ids_BT.shape[1], cache.length if cache else 0
        limit = self.shape.max_position_embeddings
        assert seen + T <= limit, f"{seen + T} tokens exceed max_position_embeddings = {limit}"
        cos, sin = rotary_tables(self.shape.head_dim, self.shape.rope_theta, limit, ids_BT.device)
        cos, sin = cos[seen : seen + T], sin[seen : seen + T]
        if seen == 0 or T == 1:  # one new token sees everything, and is_causal would align it with the first key
            return Positions(cos, sin, None, causal=T > 1)
        mask_TS = torch.ones(T, seen + T, dtype=torch.bool, device=ids_BT.device).tril(seen)
        return Positions(cos, sin, mask_TS.expand(len(ids_BT), -1, -1), causal=False)

    def positions_of(self, positions_BT: Tensor, mask_BTT: Tensor | None, offsets_C: Tensor | None = None) -> Positions:
        """The same for rows whose tokens do not simply follow each other: packed documents, branches."""
        limit = self.shape.max_position_embeddings
        cos, sin = rotary_tables(self.shape.head_dim, self.shape.rope_theta, limit, positions_BT.device)
        cos, sin = cos[positions_BT].unsqueeze(1), sin[positions_BT].unsqueeze(1)
        return Positions(cos, sin, mask_BTT, causal=False, offsets_C=offsets_C)

    def packed_positions(self, packed_documents: PackedDocuments) -> Positions:
        """The same for packed rows."""
        document_ids_BT, count = packed_documents
        B, T = document_ids_BT.shape
        starts_BT = documents.starts_of(document_ids_BT)
        form = kernels.packed_form(document_ids_BT.device, self.embed_tokens.weight.dtype, self.shape.head_dim).name
        if form == "mask":
            return self.positions_of(*packed(document_ids_BT))

        count = int(starts_BT.sum()) if count is None else count
        if form == "each" and not kernels.calls_pay(self.shape.num_attention_heads, T, B * T / count):
            return self.positions_of(*packed(document_ids_BT))
        return self.positions_of(documents.positions_of(starts_BT), None, documents.offsets_of(starts_BT, count))


def packed(document_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that restart with each run of equal document ids, and the mask of all before in the same run.

    Returns:
        positions_BT and mask_BTT.
    """
    positions_BT = documents.positions_of(documents.starts_of(document_ids_BT))
    first_BT = torch.arange(positions_BT.shape[1], device=positions_BT.device) - positions_BT
    same_BTT = first_BT.unsqueeze(2) == first_BT.unsqueeze(1)
    return positions_BT, same_BTT.tril()


def branched(branch_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that go on after the context in each branch, and the mask of context and own branch.

    Returns:
        positions_BT, 0 for padding, and mask_BTT.
    """
    starts_BT = torch.ones_like(branch_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = branch_ids_BT[:, 1:] != branch_ids_BT[:, :-1]
    index_T = torch.arange(branch_ids_BT.shape[1], device=branch_ids_BT.device)
    first_BT = torch.where(starts_BT, index_T, 0).cummax(1).values

    in_context_BT = branch_ids_BT == 0
    context_length_B1 = in_context_BT.sum(1, keepdim=True)
    positions_BT = torch.where(in_context_BT, index_T, index_T - first_BT + context_length_B1)
    positions_BT = positions_BT.masked_fill(branch_ids_BT < 0, 0)

    seen_BTT = in_context_BT.unsqueeze(1) | (branch_ids_BT.unsqueeze(2) == branch_ids_BT.unsqueeze(1))
    return positions_BT, seen_BTT.tril()


def run_with_training_graph(block: nn.Module, x_BTD: Tensor, positions: Positions) -> Tensor:
    """A compiled block's output without its gradient, computed by the graph that was compiled for training.

    If gradients are off, torch.compile makes another graph, which takes seconds. The training graph also writes what a
    backward pass would need. That is freed as soon as the block is done, so only one block's share is held at a time.
    """
    with torch.enable_grad():
        return block(x_BTD.detach().requires_grad_(), positions).detach()


class Decoder(nn.Module):
    """A causal language model; `Model` gives its shape."""

    def __init__(self, shape: Model, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape, gradient_checkpointing)
        self.lm_head = None if shape.tie_word_embeddings else Linear(shape.hidden_size, shape.vocab_size)
        self.compiled = False

    def compile_parts(self) -> None:
        """From the next forward on, fuse the operations between the products, in each block and in the loss.

        Blocks share one graph, in training and in evaluation. Batches should keep their shape: each new shape is
        compiled again, which takes seconds to minutes.
        """
        from torch._functorch import config

        # Compile the backward pass together with the first forward. A stopping signal ends compilers too: a forward
        # pass that then fails to compile runs eagerly, but a backward pass would end the run with an error.
        config.force_non_lazy_backward_lowering = True
        if torch.are_deterministic_algorithms_enabled():
            from torch._inductor import config as inductor

            inductor.deterministic = True  # no kernel is chosen by a timing
        weight = self.model.embed_tokens.weight
        if kernels.wants_blocked_backward(weight.device.type, weight.dtype):
            cpu_attention.build()
        kernels.make_device_checks_constant()
        for block in self.model.layers:
            block.compile(dynamic=False)
        self.compiled = True

    @property
    def head_weight_VD(self) -> Tensor:
        """The output projection: the embedding itself if the head is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        target_ids_BT: Tensor | None = None,
        weights_BT: Tensor | None = None,
        sight: PackedDocuments | KVCache | None = None,
        z_scale: float = 0.0,
        continuations: Continuations | None = None,
    ) -> LossSums | TokenScores | Tensor:
        """Loss sums if there are targets, scores if there are continuations, otherwise logits.

        There is one entry for all three, because ZeRO-3 gathers a module's weights only when the module is called.

        Args:
            input_ids_BT: tokens; none may stand at a position of max_position_embeddings or more.
            target_ids_BT: the token to predict at each place.
            weights_BT: its loss weight; None means 1 everywhere. Targets of weight 0 are never read.
            sight: what a token may see. None: all tokens before it in its row. Documents: those in its own document. A
                cache, in decoding: the cached tokens, too; the new tokens are added to the cache.
            z_scale: factor of the sum of squared logsumexps in the objective.
            continuations: which tokens are scored, and how rows are made of a context and its continuations.

        Returns:
            `LossSums`, `TokenScores`, or logits_BTV in the model's dtype; with a cache the last token's, logits_B1V.
        """
        cache = sight if isinstance(sight, KVCache) else None
        if isinstance(sight, PackedDocuments):
            positions = self.model.packed_positions(sight)
            if self.compiled and positions.offsets_C is not None:
                torch._dynamo.mark_dynamic(positions.offsets_C, 0)  # one graph for any number of documents
        elif continuations is not None and continuations.branch_ids_BT is not None:
            positions = self.model.positions_of(*branched(continuations.branch_ids_BT))
        else:
            positions = self.model.positions(input_ids_BT, cache)
        evaluating = target_ids_BT is not None and not torch.is_grad_enabled()
        hidden_BTD = self.model(input_ids_BT, positions, cache, with_training_graph=evaluating and self.compiled)

        if continuations is not None:
            hidden_ND = hidden_BTD.flatten(0, 1)
            return score_tokens(hidden_ND, self.head_weight_VD, continuations.places_N, continuations.targets_N)
        if target_ids_BT is None:
            return product(hidden_BTD if cache is None else hidden_BTD[:, -1:], self.head_weight_VD)
        weights_BT = torch.ones_like(target_ids_BT, dtype=torch.float32) if weights_BT is None else weights_BT
        targets = Targets(target_ids_BT.flatten(), weights_BT.flatten(), z_scale)
        return chunked_loss(hidden_BTD.flatten(0, 1), self.head_weight_VD, targets, compiled=self.compiled)


def build(shape: Model, seed: int, gradient_checkpointing: bool = False) -> Decoder:
    """An initialised fp32 decoder on the CPU."""
    model = Decoder(shape, gradient_checkpointing)
    initialise(model, shape, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, shape: Model, seed: int) -> None:
    """Fill every parameter with its `initial_weights`."""
    parameters = dict(model.named_parameters())
    for name, values in initial_weights({name: one.shape for name, one in parameters.items()}, shape, seed):
        parameters[name].copy_(values)


def initial_weights(shapes: Mapping[str, torch.Size], shape: Model, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and initial values, fp32 on the CPU, one at a time: matrices normal, norms one.

    Each parameter has its own generator, seeded by `seed` and its name, so neither the order of the parameters nor
    torch's global generator changes a value.
    """
    for name, size in shapes.items():
        if len(size) < 2:
            yield name, torch.ones(size, dtype=torch.float32, device="cpu")
            continue
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
        values = torch.empty(size, dtype=torch.float32, device="cpu")
        yield name, values.normal_(0.0, _standard_deviation(name, shape), generator=generator)


def _standard_deviation(name: str, shape: Model) -> float:
    if name == "model.embed_tokens.weight":
        return shape.embedding_init_std or shape.init_std
    if shape.scaled_residual_init and name.endswith(("o_proj.weight", "down_proj.weight")):
        return shape.init_std / math.sqrt(2 * shape.num_hidden_layers)
    return shape.init_std
