"""Moments in 8 bits, between an engine's codes and named tensors."""

import torch

from ds_slm.engine import optim, partitions
from ds_slm.recipe.sections import Optimizer
from ds_slm.recipe.sizes import BLOCK_VALUES


def test_requantising_finds_the_same_codes() -> None:
    """Oracle: bitsandbytes' own state after steps; value / absmax must lead back to every code, in both maps."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5000))
    settings = Optimizer(name="adamw8bit", lr=1e-2)
    optimizer = optim._adamw8bit()([{"params": [parameter], "optim_bits": 8, "name": "x"}], lr=settings.lr)
    for scale in (1.0, 1e-3, 30.0):
        parameter.grad = torch.randn(5000) * scale * (torch.arange(5000) % 3 > 0)
        optimizer.step()
    state = optimizer.state[parameter]
    for codes, code_map, absmax in (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2")):
        scales = state[absmax].repeat_interleave(BLOCK_VALUES)[:5000]
        values = state[code_map][state[codes].long()] * scales
        assert torch.equal(partitions.quantise(values, state[absmax], state[code_map]), state[codes])
        again = partitions.block_absmax(values)
        restored = state[code_map][partitions.quantise(values, again, state[code_map]).long()]
        error = (restored * again.repeat_interleave(BLOCK_VALUES)[:5000] - values).abs()
        assert (error <= 0.02 * scales).all()  # the quantiser's own step near 1 is 1/64 of a block's largest


def test_a_block_of_zeros_stays_zero() -> None:
    """absmax 0 divides nothing."""
    from bitsandbytes.functional import create_dynamic_map

    code_map = create_dynamic_map(signed=True)
    codes = partitions.quantise(torch.zeros(300), torch.zeros(2), code_map)
    assert code_map[codes.long()].eq(0).all()
