"""The cases of benchmarks/gpu.py that have a speed: each recipe, its precision, and the promise to compare with.

a model in fp32, eager --> the same in the case's precision, compiled: loss, direction of the gradient
micro-batches tried --> the best, some rounds (benchmarks/train.py) --> tokens/s, peak memory
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import train as bench_train
from ds_slm.recipe import loading, plan
from ds_slm.recipe.schema import Recipe

if TYPE_CHECKING:  # checks that have no case should not wait for torch
    import torch

LOSS_TOLERANCE = 2e-3
"""Relative tolerance of a fresh model's loss."""
COSINE = {"fp32": 0.99999, "bf16": 0.995, "fp16": 0.999}
"""Least cosine of the whole gradient with the fp32 gradient."""
SCALE = 256.0
"""Factor of the objective in the backward pass of the numerics, like the scale of fp16's scaler."""
TINY = [
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=2", "model.num_attention_heads=4",
    "model.num_key_value_heads=2", "model.head_dim=16", "data.seq_len=64", "train.precision=bf16",
]  # fmt: skip
"""A rehearsal's overrides. A CPU refuses fp16."""
REHEARSED_STEPS = 2
ROWS = 2
"""Rows of the numerics, and of a rehearsal's micro-batch, so that both share compiled code in torch's cache."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    micro_batches: tuple[int, ...]
    promised: str
    """The promise with which the row is compared."""
    tokens_per_s: float | None = None
    """The least tokens per second."""
    peak_gb: float | None = None
    """The largest peak in GB."""


FREE = ("train.gradient_checkpointing=false", "optimizer.name=adamw", "train.precision=bf16")
CASES = [
    Case("380m", "axiom-380m", FREE, (16, 32), "at least 165,000 tokens/s, aim 190,000", tokens_per_s=165_000),
    Case("380m-card", "axiom-380m", (), (32,), "at least 140,000 tokens/s", tokens_per_s=140_000),
    Case("380m-sft", "axiom-380m", (), (1,), "at most 5.3 GB (card: 5.32)", peak_gb=5.3),
    Case("slm-10m", "slm-10m", ("train.precision=fp16",), (32, 64), ""),
    Case("gpt-s-1.4m", "gpt-s-1.4m", ("train.precision=fp16",), (128, 256), ""),
    Case("ant-10m", "ant-10m", ("train.precision=fp16",), (32, 64), "83,000 tokens/s on a T4 (card)"),
]


@dataclass(frozen=True)
class Numerics:
    """A case's model in its own precision, compared with fp32."""

    loss_fp32: float
    loss: float
    cosine: float

    def is_right(self, precision: str) -> bool:
        """Whether the difference is within the precision's tolerance."""
        near = abs(self.loss / self.loss_fp32 - 1) <= LOSS_TOLERANCE
        return near and self.cosine >= COSINE[precision]


def numerics(recipe: Recipe, where: "torch.device") -> Numerics:
    """Loss and gradient of a fresh model, in fp32 eager and in the recipe's precision compiled, on the same tokens."""
    import torch

    from ds_slm.model import decoder, kernels
    from ds_slm.model.kernels import DTYPES

    kernels.fix_sums(deterministic=False)  # as a run does
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(recipe.model.vocab_size, (ROWS, recipe.data.seq_len + 1), generator=generator).to(where)

    # First the reference, eager; then the model to be judged, compiled.
    losses, gradients = [], []
    for dtype in (torch.float32, DTYPES[recipe.train.precision]):
        model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing).to(where, dtype)
        if gradients:
            model.compile_parts()
        sums = model(ids[:, :-1], ids[:, 1:], z_scale=recipe.train.z_loss)
        (sums.objective * (SCALE / sums.weight)).backward()
        losses.append((sums.nll / sums.weight).item())
        gradients.append(torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None]))
        del model, sums

    ours, reference = gradients[1].double(), gradients[0].double()
    cosine = (ours @ reference / (ours.norm() * reference.norm())).item()
    return Numerics(losses[0], losses[1], cosine)


def named(name: str, rehearsing: bool) -> Case:
    """A case; a rehearsal's has tiny micro-batches, and only the first one tries two of them."""
    (case,) = (one for one in CASES if one.name == name)
    tiny = (ROWS, 2 * ROWS) if case is CASES[0] else (ROWS,)
    return replace(case, micro_batches=tiny) if rehearsing else case


def load(case: Case, rehearsing: bool) -> tuple[Recipe, list[str]]:
    """A case's recipe, and the overrides that make it."""
    tiny = TINY if rehearsing else []
    replaced = {one.partition("=")[0] for one in tiny}
    settings = [*(one for one in case.settings if one.partition("=")[0] not in replaced), *tiny]
    return loading.load(case.recipe, settings), settings


def speed(case: Case, out: Path, rounds: int, rehearsing: bool) -> list[bench_train.Round]:
    """The case's rounds at its best micro-batch. The trials that found it are part of the first round."""
    recipe, settings = load(case, rehearsing)
    out = out / case.name
    overrides = [*settings, *bench_train.lay_out(recipe, out)]
    bench = bench_train.Bench(
        case.recipe, recipe, overrides, out, devices=1, on_gpu=not rehearsing, under_launcher=False
    )
    if rehearsing:  # beside another check
        bench = replace(bench, steps=REHEARSED_STEPS, threads=1)

    tried = bench_train.try_micro_batches(bench, "ours", case.micro_batches)
    chosen = bench_train.fastest(tried)
    first = bench_train.measure(bench, "ours", chosen, tried[chosen])
    return [first, *(bench_train.measure(bench, "ours", chosen) for _ in range(rounds - 1))]


def device(rehearsing: bool) -> "torch.device":
    """The device on which a case runs."""
    import torch

    return torch.device("cpu" if rehearsing else "cuda")


def figures(
    case: Case, recipe: Recipe, rounds: list[bench_train.Round], rehearsing: bool
) -> list[tuple[str, str, str, bool | None]]:
    """For speed and memory: what was measured, the figure, the promise, and whether it was kept."""
    import torch

    from ds_slm.run import measure

    speeds = [one.tokens_per_s for one in rounds]
    median, peak_gb = statistics.median(speeds), max(one.peak_gb for one in rounds)
    spread = f", spread {(max(speeds) - min(speeds)) / median:.1%}" if len(rounds) > 1 else ""

    peak_flops = None if rehearsing else measure.peak_flops(device(rehearsing), torch.bfloat16)
    flops = plan.flops_per_token(recipe.model, recipe.data.seq_len) * median
    used = f", {flops / peak_flops:.1%} of the peak" if peak_flops else ""

    fast = None if case.tokens_per_s is None else median >= case.tokens_per_s
    small = None if case.peak_gb is None else peak_gb <= case.peak_gb
    speed_promised, memory_promised = ("", case.promised) if case.peak_gb else (case.promised, "")
    return [
        (f"speed, micro-batch {rounds[0].micro_batch}", f"{median:,.0f} tokens/s{spread}{used}", speed_promised, fast),
        ("peak memory", f"{peak_gb:.2f} GB", memory_promised, small),
    ]
