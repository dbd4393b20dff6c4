"""Attention's backward pass in bf16 on a CPU: ours, in blocks, compared with torch's.

    q, k, v, dy of a recipe's shape, random --> both passes' errors against float64, on one row
                                            --> each in turn, ROUNDS times --> a table of least times

python -m benchmarks.cpu_attention [RECIPE ...] [--rows 2] [--tokens 64 1024] [--rounds 7] [--threads 1]

The least time of the rounds counts, and the ratio of a round's two times: other programs only add to a time.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ds_slm.errors import DeviceError, run_program
from ds_slm.model import cpu_attention
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Model
from ds_slm.run import measure

forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
torch_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Pass = Callable[[], tuple[Tensor, ...]]


def operands(shape: Model, rows: int, tokens: int) -> tuple[Tensor, ...]:
    """dy, q, k, v in bf16, in the memory layout of a block's heads."""
    generator, heads, keys = torch.Generator().manual_seed(0), shape.num_attention_heads, shape.num_key_value_heads
    return tuple(
        torch.randn(rows, tokens, count, shape.head_dim, generator=generator).bfloat16().transpose(1, 2)
        for count in (heads, heads, keys, keys)
    )


def passes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Pass, Pass]:
    """torch's pass and ours, each with everything that it needs."""
    y, logsumexp = forward(q, k, v, 0.0, True)
    return (
        lambda: torch_backward(dy, q, k, v, y, logsumexp, 0.0, True),
        lambda: cpu_attention.backward(dy, q, k, v, y, logsumexp),
    )


def errors(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[float]:
    """The largest relative error of dq, dk and dv against float64: torch's, ours."""
    exact = [one.double().requires_grad_() for one in (q, k, v)]
    y = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad(y, exact, dy.double())
    return [
        max(float((one.double() - right).norm() / right.norm()) for one, right in zip(run(), wanted, strict=True))
        for run in passes(dy, q, k, v)
    ]


def times_ms(runs: tuple[Pass, Pass], rounds: int) -> list[list[float]]:
    """Milliseconds of each pass in each round, after one that does not count; the passes take turns to begin."""
    found: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            begin_s = time.perf_counter()
            runs[which]()
            if number:
                found[which].append(1e3 * (time.perf_counter() - begin_s))
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["gpt-s-1.4m", "slm-10m", "slm-124m", "axiom-380m"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if reason := cpu_attention.build():
        raise DeviceError(f"nothing to measure: {reason}.")

    title = f"{args.rows} rows, {args.threads} threads, {measure.device_name(torch.device('cpu'))}"
    grid = Table(title=f"{title}, torch {torch.__version__}, {datetime.date.today()}")
    for name in ("recipe", "tokens", "torch ms", "ours ms", "torch / ours (least, most)", "errors: torch, ours"):
        grid.add_column(name, justify="left" if name == "recipe" else "right")

    for name in args.recipes:
        shape = loading.load(name).model
        for tokens in args.tokens:
            off = errors(*operands(shape, 1, min(tokens, 256)))
            theirs, ours = times_ms(passes(*operands(shape, args.rows, tokens)), args.rounds)
            ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            precision = ", ".join(f"{one:.1e}" for one in off)
            grid.add_row(name, str(tokens), f"{min(theirs):.1f}", f"{min(ours):.1f}", ratio, precision)
    Console(width=120).print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
