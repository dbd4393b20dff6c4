"""Parameter groups, and steps of AdamW8bit in pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.engine import optim
from ds_slm.model import decoder
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support import runs


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loading.load(str(runs.write_recipe(tmp_path)))


def test_parameter_groups_cover_everything_once(recipe: Recipe) -> None:
    """Oracle: the model's own list of parameters. Norms have no decay and 32 bits."""
    model = decoder.build(recipe.model, 0)
    groups = {group["name"]: group for group in optim.parameter_groups(model, recipe.optimizer)}
    assert sorted(map(id, model.parameters())) == sorted(id(p) for group in groups.values() for p in group["params"])
    assert [p.ndim for p in groups["rest"]["params"]] == [1] * len(groups["rest"]["params"])
    assert (groups["rest"]["weight_decay"], groups["rest"]["optim_bits"]) == (0.0, 32)
    assert (groups["embeddings"]["weight_decay"], groups["embeddings"]["optim_bits"]) == (0.1, 32)
    assert (groups["matrices"]["weight_decay"], groups["matrices"]["optim_bits"]) == (0.1, 8)


@pytest.mark.parametrize("bits", [8, 32])
def test_pieces_take_the_same_step_as_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bitsandbytes' own step of the whole tensor, bit by bit: weights, moments and scales after three steps."""
    from bitsandbytes.optim import AdamW8bit

    monkeypatch.setattr(optim, "CPU_PIECE", 1_024)
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(5_003, generator=generator)
    gradients = torch.randn(3, 5_003, generator=generator)
    ours, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    group = {"params": [ours], "optim_bits": bits, "name": "x"}
    whole = AdamW8bit([theirs], **options, min_8bit_size=0 if bits == 8 else 10_000)
    pieces = optim._adamw8bit()([group], **options)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        pieces.step()
        whole.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, begin)
    states = [
        {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        for optimizer, parameter in ((pieces, ours), (whole, theirs))
    ]
    assert states[0].keys() == states[1].keys() and (("absmax1" in states[0]) == (bits == 8))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
