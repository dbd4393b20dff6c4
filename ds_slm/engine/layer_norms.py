"""Norms of weights and gradients, layer by layer, at every ZeRO stage.

    before an optimiser step: partition.grad -> sums of squares by parameter -> over all ranks -> norms by layer

Over all ranks the inner optimiser holds every gradient once, after clipping. The norms given here are norms before
clipping, like the global norm: the two differ by one factor.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_slm.engine.partitions import partitions, shapes


class LayerNorms:
    """Measures each layer's norms in a DeepSpeed engine's next step, if asked to."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._layers = list(dict.fromkeys(layer_of(name) for name in shapes(engine)))
        self._grad_squares = torch.zeros(0)
        self._wanted = False
        engine.optimizer.optimizer.register_step_pre_hook(self._before_step)

    def measure_next_step(self) -> None:
        """Measure the gradients of the next step; other steps have no extra cost."""
        self._wanted, self._grad_squares = True, torch.zeros(len(self._layers), dtype=torch.float64)

    def result(self, grad_norm: float, sum_over_ranks: Callable[[Tensor], list[float]]) -> dict[str, float]:
        """`grad_norm/LAYER` and `weight_norm/LAYER` of the step that was taken. Collective.

        Args:
            grad_norm: the global gradient norm, before clipping.
            sum_over_ranks: adds up a tensor over all ranks.
        """
        self._wanted = False
        weight_squares = torch.zeros_like(self._grad_squares)
        for partition in partitions(self._engine):
            self._add(weight_squares, partition.flat.detach(), partition.fragments)

        sums = sum_over_ranks(torch.cat([self._grad_squares, weight_squares]))
        grad_squares, weight_squares_of_all = sums[: len(self._layers)], sums[len(self._layers) :]
        applied = math.sqrt(sum(grad_squares))
        before_clipping = grad_norm / applied if applied else 0.0
        norms = {
            f"grad_norm/{layer}": math.sqrt(one) * before_clipping
            for layer, one in zip(self._layers, grad_squares, strict=True)
        }
        return norms | {
            f"weight_norm/{layer}": math.sqrt(one)
            for layer, one in zip(self._layers, weight_squares_of_all, strict=True)
        }

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """DeepSpeed takes the step in parts, each with the partitions of one group."""
        if not self._wanted:
            return
        stepped = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        for partition in partitions(self._engine):
            if id(partition.flat) in stepped and partition.flat.grad is not None:
                self._add(self._grad_squares, partition.flat.grad, partition.fragments)

    def _add(self, squares: Tensor, flat: Tensor, fragments: list[Any]) -> None:
        for part in fragments:
            values = flat[part.flat_start : part.flat_start + part.numel]
            squares[self._layers.index(layer_of(part.name))] += values.double().square().sum().cpu()


def layer_of(parameter: str) -> str:
    """The layer of a parameter: `embedding`, `layer-01` and so on for the blocks, `last-norm`, `head`."""
    _, _, below = parameter.partition("layers.")
    if below:
        return f"layer-{int(below.split('.')[0]) + 1:02d}"
    return {"embed_tokens": "embedding", "lm_head": "head", "norm": "last-norm"}[parameter.split(".")[-2]]
