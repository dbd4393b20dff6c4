"""How far two runs of a recipe may lie apart whose rows are the same and whose sums are formed in another order.

In bf16 the micro-batch's shape alone changes a step: each micro-batch's weight gradients are rounded to bf16 before
they are added in fp32, and another order of a sum rounds to another bf16. The optimiser carries that on. So loss and
gradient norm differ by rounding, the norm most, and by how much depends on how the CPU multiplies (model/kernels.py).

The tiny recipe (tests/support/runs.py), largest relative difference of 20 steps from one process with all rows in one
micro-batch, over micro-batches of 1, 2 and 4 rows, ZeRO 1, 2, 3, 1 and 2 ranks, eager and compiled:

                                              loss      gradient norm
    bf16 operands upcast (Zen 3, AVX2)        5.9e-5    6.6e-4
    bf16 products, torch's loops (Zen 3)      6.6e-5    1.4e-3
    bf16 products, AVX-512 bf16 (Zen 5)       6.6e-5    1.2e-3

The tolerances are about three times the worst: such noise, drawn a few dozen times, lies well within them, and a
mistake in the loss's rule (`MUTATION_FACTOR`) far outside.
"""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Relative, at every step."""

    loss: float
    grad_norm: float


TOPOLOGIES = {"fp32": Tolerance(1e-5, 1e-5), "bf16": Tolerance(2e-4, 4e-3)}
"""Precision -> how far topologies, micro-batches and hosts may lie apart, whatever the CPU."""

LATER_LOSS = {"fp32": 1e-5, "bf16": 1e-3}
"""Precision -> the same of a loss alone over 65 steps of a run whose rate falls later: differences have grown. Measured
over moves between 1, 2 and 3 ranks: 3.5e-4 in bf16 (native products), 2.9e-4 with 8-bit moments, 5.5e-8 in fp32."""

MUTATION_FACTOR = 10
"""A wrong rule for the loss must lie at least so many tolerances away."""

PRODUCTS = ("native", "upcast")
"""Both ways in which a CPU multiplies half-precision tensors: kernels.PRODUCTS_VARIABLE chooses one on any CPU."""


def excess(found: list[dict], expected: list[dict], precision: str) -> float:
    """The worst difference of a step's loss or gradient norm, in tolerances: more than 1 is too much."""
    assert len(found) == len(expected)
    return max(
        abs(ours[key] / theirs[key] - 1) / tolerance
        for ours, theirs in zip(found, expected, strict=True)
        for key, tolerance in TOPOLOGIES[precision]._asdict().items()
    )
