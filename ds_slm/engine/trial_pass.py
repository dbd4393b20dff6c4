"""A forward and backward pass as in a run, over made-up tokens: it is timed before a run, or instead of a run.

Recipe, rows, device, dtype --> TrialPass: a fresh model, fp32 sums of its gradients, ids over the whole vocabulary
"""

import torch

from ds_slm.model import decoder
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe.schema import Recipe


class TrialPass:
    """A pass with its own model; a call adds a micro-batch's gradients to `gradients`, as a step does."""

    def __init__(self, recipe: Recipe, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Gradient checkpointing follows the recipe; blocks are eager until the model compiles them."""
        model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing)
        self.model = model.to(device, dtype).train()
        self.gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.model.parameters()]
        self._z_loss, seq_len = recipe.train.z_loss, recipe.data.seq_len
        ids = torch.arange(rows * (seq_len + 1), device=device) * 7919 % recipe.model.vocab_size
        self._ids_BT = ids.view(rows, seq_len + 1)

    def __call__(self, documents: PackedDocuments | None = None) -> None:
        """One micro-batch, packed if `documents` are given."""
        sums = self.model(self._ids_BT[:, :-1], self._ids_BT[:, 1:], sight=documents, z_scale=self._z_loss)
        sums.objective.backward()
        for parameter, total in zip(self.model.parameters(), self.gradients, strict=True):
            assert parameter.grad is not None
            total += parameter.grad
            parameter.grad = None
