"""Parameter groups and the two optimisers: AdamW with 32-bit states, AdamW with 8-bit states.

    embeddings  embedding and head     decay   bits = recipe.optimizer.embedding_bits
    matrices    everything else >= 2D  decay   bits = 8
    rest        norms                  none    bits = 32

Under ZeRO the optimiser sees one flat partition per group, so parameters that need other bits need their own group:
embeddings are unstable in 8 bits early in pretraining, and norms are too small to gain from it.
"""

from typing import Any, assert_never

import torch
from torch import nn

from ds_slm.recipe.sections import Optimizer
from ds_slm.recipe.sizes import BLOCK_VALUES

CPU_PIECE = 1 << 18
"""Values that the 8-bit optimiser updates at a time on a CPU."""
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The groups above, without empty ones; each holds its parameters, decay, bits and name."""
    groups: dict[str, list[nn.Parameter]] = {"embeddings": [], "matrices": [], "rest": []}
    for name, parameter in model.named_parameters():
        kind = "embeddings" if name in EMBEDDINGS else "matrices" if parameter.ndim >= 2 else "rest"
        groups[kind].append(parameter)
    decay = {"embeddings": settings.weight_decay, "matrices": settings.weight_decay, "rest": 0.0}
    bits = {"embeddings": settings.embedding_bits, "matrices": 8, "rest": 32}
    return [
        {"name": name, "params": parameters, "weight_decay": decay[name], "optim_bits": bits[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimiser over the model's parameter groups."""
    groups = parameter_groups(model, settings)
    options = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "adamw8bit":
        return _adamw8bit()(groups, **options)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    assert_never(settings.name)


def _adamw8bit() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW8bit, with the bits read from the group, because its own overrides do not survive ZeRO."""
    from bitsandbytes.optim import AdamW8bit

    class GroupwiseAdamW8bit(AdamW8bit):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = {key: group[key] for key in ("betas", "eps", "weight_decay", "lr", "optim_bits")}
            constant = {"min_8bit_size": 0, "max_unorm": 0.0, "skip_zeros": False, "alpha": 0.0}
            return {**config, **constant, "t_alpha": None, "t_beta3": None}

        def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
            if p.device.type != "cpu":
                super().update_step(group, p, gindex, pindex)
                return

            # On a CPU the whole tensor's moments would be held in fp32. Piece by piece the same values need almost no
            # memory, and stay in the cache.
            state, config = self.state[p], self.get_config(gindex, pindex, group)
            state["step"] += 1
            assert p.grad is not None
            weights, gradient = p.data.view(-1), p.grad.view(-1)
            for begin in range(0, p.numel(), CPU_PIECE):
                piece = slice(begin, begin + CPU_PIECE)
                blocks = slice(begin // BLOCK_VALUES, (begin + CPU_PIECE) // BLOCK_VALUES)
                _update_piece(state, config, weights[piece], gradient[piece], piece, blocks)

    return GroupwiseAdamW8bit


def _update_piece(
    state: dict[str, Any],
    config: dict[str, Any],
    weights: torch.Tensor,
    gradient: torch.Tensor,
    piece: slice,
    blocks: slice,
) -> None:
    """AdamW on a piece of a flat tensor, in place, as bitsandbytes' own step does it on the whole tensor."""
    from bitsandbytes import functional as bnb

    first, second = (state[name].view(-1)[piece] for name in ("state1", "state2"))
    (beta1, beta2), eps, decay = config["betas"], config["eps"], config["weight_decay"]
    step, rate = state["step"], config["lr"]
    if first.dtype == torch.float32:
        bnb.optimizer_update_32bit(
            "adam", gradient, weights, first, beta1, eps, step, rate, second, beta2, weight_decay=decay
        )
        return
    bnb.optimizer_update_8bit_blockwise(
        "adam", gradient, weights, first, second, beta1, beta2, 0.0, 0.0, eps, step, rate,
        state["qmap1"], state["qmap2"], state["absmax1"][blocks], state["absmax2"][blocks], decay,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
