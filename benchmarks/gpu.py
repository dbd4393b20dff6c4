"""What only a GPU can show: numerics against fp32 first, then speed and memory beside what was promised.

    every case: its model in fp32, eager --> the same in the case's precision, compiled: loss, direction of the gradient
                one that differs --> nothing is timed, exit code 2
    every case: micro-batches tried --> the best, ROUNDS times (benchmarks/train.py) --> OUT/result.json and a table

python benchmarks/gpu.py [--cases NAME...] [--rounds 3] [--rehearse]

One GPU. Without one it measures nothing and says so; `--rehearse` goes through every step on a CPU with tiny shapes, so
that the program is right before it first meets a GPU; its figures mean nothing.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # the folder of this file has a train.py, too
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import train as bench_train
from ds_slm.engine.devices import DTYPES
from ds_slm.errors import DataError, DeviceError, run_program
from ds_slm.model import decoder, kernels
from ds_slm.recipe import plan, schema
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure

LOSS_TOLERANCE = 2e-3
"""Relative, of a fresh model's loss."""
COSINE = {"fp32": 0.99999, "bf16": 0.995, "fp16": 0.999}
"""Least cosine of the whole gradient with fp32's."""
SCALE = 256.0
"""Of the objective in the numerics' backward pass, as fp16's scaler has it."""
TINY = [
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=2", "model.num_attention_heads=4",
    "model.num_key_value_heads=2", "model.head_dim=16", "data.seq_len=64", "train.precision=bf16",
]  # fmt: skip
"""A rehearsal's overrides. A CPU refuses fp16."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    micro_batches: tuple[int, ...]
    promised: str
    """What the row is held against."""
    tokens_per_s: float | None = None
    """At least so many."""
    peak_gb: float | None = None
    """At most so many."""


FREE = ("train.gradient_checkpointing=false", "optimizer.name=adamw", "train.precision=bf16")
CASES = [
    Case("380m", "axiom-380m", FREE, (8, 16, 32), "at least 165,000 tokens/s, aim 190,000", tokens_per_s=165_000),
    Case("380m-card", "axiom-380m", (), (16, 32, 64), "at least 140,000 tokens/s", tokens_per_s=140_000),
    Case("380m-sft", "axiom-380m", (), (1,), "the card's SFT shape: at most 5.0 GB (card: 5.32)", peak_gb=5.0),
    Case("slm-10m", "slm-10m", ("train.precision=fp16",), (16, 32, 64), "reported"),
    Case("gpt-s-1.4m", "gpt-s-1.4m", ("train.precision=fp16",), (64, 128, 256), "reported"),
    Case("ant-10m", "ant-10m", ("train.precision=fp16",), (16, 32, 64), "83,000 tokens/s on a T4 (card)"),
]


@dataclass(frozen=True)
class Numerics:
    """A case's model in its own precision beside fp32."""

    loss_fp32: float
    loss: float
    cosine: float

    def is_right(self, precision: str) -> bool:
        """Whether it is as near as the precision lets it be."""
        near = abs(self.loss / self.loss_fp32 - 1) <= LOSS_TOLERANCE
        return near and self.cosine >= COSINE[precision]


def numerics(recipe: Recipe, device: torch.device, rows: int = 2) -> Numerics:
    """Loss and gradient of a fresh model, in fp32 eager and in the recipe's precision compiled, on the same tokens."""
    kernels.fix_sums(deterministic=False)  # as a run does
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(recipe.model.vocab_size, (rows, recipe.data.seq_len + 1), generator=generator).to(device)

    # First the reference, eager; then the model to be judged, compiled.
    losses, gradients = [], []
    for dtype in (torch.float32, DTYPES[recipe.train.precision]):
        model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing).to(device, dtype)
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


def load(case: Case, rehearsing: bool) -> tuple[Recipe, list[str]]:
    """A case's recipe, and the overrides that make it."""
    settings = [*case.settings, *(TINY if rehearsing else [])]
    return schema.load(case.recipe, settings), settings


def speed(case: Case, out: Path, rounds: int, rehearsing: bool) -> list[bench_train.Round]:
    """The case's rounds at its best micro-batch."""
    recipe, settings = load(case, rehearsing)
    out = out / case.name
    bench = bench_train.Bench(
        case.recipe, recipe, [*settings, *bench_train.lay_out(recipe, out)], out, devices=1, on_gpu=not rehearsing
    )
    chosen = bench_train.best_micro_batch(bench, "ours", case.micro_batches[:1] if rehearsing else case.micro_batches)
    return [bench_train.measure(bench, "ours", chosen) for _ in range(rounds)]


def table(found: dict[str, list[bench_train.Round]], device: str, peak_flops: float | None, rehearsing: bool) -> Table:
    """A row for each case."""
    grid = Table(title=f"{device}, one device, torch {torch.__version__}")
    for name in ("case", "precision", "micro-batch", "tokens/s", "spread", "MFU", "peak GB", "promised", "kept"):
        grid.add_column(name, justify="left" if name in ("case", "promised") else "right")

    for case in CASES:
        recipe, _ = load(case, rehearsing)
        rounds = found.get(case.name)
        if not rounds:
            grid.add_row(case.name, recipe.train.precision, "-", "not yet run", "-", "-", "-", case.promised, "-")
            continue

        speeds = [one.tokens_per_s for one in rounds]
        median, peak_gb = statistics.median(speeds), max(one.peak_gb for one in rounds)
        flops = plan.flops_per_token(recipe.model, recipe.data.seq_len) * median
        grid.add_row(
            case.name,
            recipe.train.precision,
            str(rounds[0].micro_batch),
            f"{median:,.0f}",
            f"{(max(speeds) - min(speeds)) / median:.1%}",
            f"{flops / peak_flops:.1%}" if peak_flops else "-",
            f"{peak_gb:.2f}",
            case.promised,
            "rehearsal" if rehearsing else kept(case, median, peak_gb),
        )
    return grid


def kept(case: Case, tokens_per_s: float, peak_gb: float) -> str:
    """Whether the figures keep what was promised."""
    if case.tokens_per_s is None and case.peak_gb is None:
        return "-"
    fast = case.tokens_per_s is None or tokens_per_s >= case.tokens_per_s
    small = case.peak_gb is None or peak_gb <= case.peak_gb
    return "yes" if fast and small else "no"


def main() -> int:
    """Check, measure, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "gpu")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, with tiny shapes")
    args = parser.parse_args()

    if not (args.rehearse or torch.cuda.is_available()):
        raise DeviceError("no GPU: nothing measured. --rehearse goes through it on a CPU with tiny shapes.")

    device = torch.device("cpu" if args.rehearse else "cuda")
    cases = [case for case in CASES if case.name in args.cases]
    result: dict[str, Any] = {"device": measure.device_name(device), "torch": torch.__version__, "cases": {}}

    # Numerics of all cases first: the speed of a wrong model is worth nothing.
    wrong = []
    for case in cases:
        recipe, _ = load(case, args.rehearse)
        seen = numerics(recipe, device)
        right = seen.is_right(recipe.train.precision)
        told = f"{case.name}: loss {seen.loss:.5f}, in fp32 {seen.loss_fp32:.5f}; gradients' cosine {seen.cosine:.6f}"
        print(f"{told} {'' if right else 'WRONG'}", flush=True)
        wrong += [] if right else [told]
        result["cases"][case.name] = {"numerics": dataclasses.asdict(seen)}
        if device.type == "cuda":
            torch.cuda.empty_cache()

    if wrong:
        raise DataError([*wrong, "Nothing was timed."])

    out, found = args.out.resolve(), {}
    for case in cases:
        found[case.name] = speed(case, out, args.rounds, args.rehearse)
        result["cases"][case.name]["rounds"] = [dataclasses.asdict(one) for one in found[case.name]]
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")  # a machine may be lent for minutes only

    peak = None if args.rehearse else measure.peak_flops(device, torch.bfloat16)
    Console(width=bench_train.TABLE_WIDTH).print(table(found, result["device"], peak, args.rehearse))
    print(f"written: {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
