"""Is `ds-slm plan` right about memory? Planned figures beside measured ones, on this machine's CPU.

    recipe x ZeRO stage x micro-batch --> a real launch of three steps on random ids --> OUT/CASE.json, at once
    every CASE.json, planned again --> a table: planned, measured, their ratio, the largest parts

python benchmarks/plan_memory.py [RECIPE ...] [--stages 1 2 3] [--tokens 1024 4096] [--precision own|fp32|bf16|fp16]
                                 [--compiled own|never|always] [--table]

A case that has its file is not run again, so the same command goes on where it ended. Blocks are compiled if the
recipe's own run would compile them. The measured figure is the kernel's peak of rank 0's resident memory, from its
start to the end of the second step. `save` is the growth of the peak by the end of the third step, during which a
checkpoint is written in the background.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import tiny_runs
from benchmarks import train as bench_train
from ds_slm.errors import DataError, run_program
from ds_slm.files import sha256_of_json
from ds_slm.recipe import budget, ds_config, loading, rates
from ds_slm.recipe.schema import Recipe

RECIPES = ("demo", "gpt-s-1.4m", "slm-10m", "ant-10m", "slm-124m")
RANKS = 2
ACCUMULATION = 2
"""Forwards of a step, so that memory that is kept between two of them counts."""
DEFAULT_TOKENS, TOKENS = (1024, 4096), {"slm-124m": (1024, 2048), "axiom-380m": (1024,)}
"""Tokens of a micro-batch: half and twice a CPU's default; less if a step would take minutes."""
STEPS, SAVED_AFTER = 3, 2
LARGEST_PARTS = 4
TABLE_WIDTH = 150


@dataclass(frozen=True)
class Case:
    """One launch."""

    name: str
    recipe: Recipe
    stage: int
    micro_batch: int
    compiled: bool
    """Whether blocks are compiled."""
    settings: tuple[str, ...] = ()
    """What `--set` changes of the recipe."""

    @property
    def key(self) -> str:
        """Its file's name."""
        how = "compiled" if self.compiled else "eager"
        changed = f"-{sha256_of_json(self.settings)[:8]}" if self.settings else ""
        return f"{self.name}-{self.recipe.train.precision}-zero{self.stage}-rows{self.micro_batch}-{how}{changed}"

    @property
    def zero(self) -> dict[str, Any]:
        """The checkout's ds_config of this stage."""
        return ds_config.read(bench_train.ROOT / "ds_configs" / f"zero{self.stage}.json")["zero_optimization"]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for, the fastest first."""
    for name in args.recipes:
        precision = [] if args.precision == "own" else [f"train.precision={args.precision}"]
        recipe = loading.load(name, [*precision, *args.set])
        for stage in args.stages:
            own = ds_config.compiles_blocks(recipe, stage, RANKS, "cpu")
            compiled = {"own": own, "never": False, "always": stage < 3}[args.compiled]
            for tokens in args.tokens or TOKENS.get(name, DEFAULT_TOKENS):
                yield Case(name, recipe, stage, max(tokens // recipe.data.seq_len, 1), compiled, tuple(args.set))


def measure(case: Case, out: Path) -> dict[str, Any]:
    """Launch a case. Raises DataError with its output if it fails."""
    folder = out / "launches" / case.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    recipe, laid_out = case.recipe, out / case.name
    never_saved = "run.save_every_steps="
    settings = [
        *case.settings,
        *(one for one in bench_train.lay_out(recipe, laid_out) if not one.startswith(never_saved)),
        f"{never_saved}{SAVED_AFTER}",
        f"train.precision={recipe.train.precision}",
    ]
    bench = bench_train.Bench(
        case.name, recipe, settings, laid_out, RANKS, on_gpu=False, stage=case.stage, compile_blocks=case.compiled
    )
    command = bench_train.our_command(bench, folder, case.micro_batch, ACCUMULATION, STEPS)

    begin_s = time.monotonic()
    done = subprocess.run(
        command,
        env=tiny_runs.environment(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DataError(f"{case.key} failed ({done.returncode}):\n{done.stdout[-4000:]}")

    peaks = [record["peak_memory_gb"] for record in tiny_runs.records(folder / "run")]
    shutil.rmtree(folder)
    return {
        "case": case.key,
        "compiled": case.compiled,
        "peak_gb": peaks[SAVED_AFTER - 1],
        "peak_with_save_gb": peaks[STEPS - 1],
        "launch_s": round(time.monotonic() - begin_s, 1),
        "date": date.today().isoformat(),
    }


def planned(case: Case) -> budget.Memory:
    """The plan's memory for the same topology."""
    half_products = case.recipe.train.precision in rates.own_cpu().half_products
    return budget.memory(case.recipe, case.zero, RANKS, case.micro_batch, "cpu", half_products)


def largest_parts(memory: budget.Memory) -> str:
    """The largest parts of a plan, in GB."""
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:LARGEST_PARTS]
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest)


def table(found: list[tuple[Case, dict[str, Any]]], device: str) -> Table:
    """A table with a row for each measured case, planned again."""
    dates = sorted({one["date"] for _, one in found})
    grid = Table(title=f"memory of rank 0 of {RANKS}, {device}, {' and '.join(dates)}")
    for name in ("case", "planned GB", "measured GB", "ratio", "save GB", "largest planned parts"):
        grid.add_column(name, justify="left" if name in ("case", "largest planned parts") else "right")
    for case, one in found:
        memory = planned(case)
        gigabytes, saved = memory.device_bytes / 1e9, one["peak_with_save_gb"] - one["peak_gb"]
        figures = (f"{gigabytes:.2f}", f"{one['peak_gb']:.2f}", f"{gigabytes / one['peak_gb']:.2f}", f"{saved:.2f}")
        grid.add_row(case.key, *figures, largest_parts(memory))
    return grid


def main() -> int:
    """Measure the missing cases, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch")
    choices = ("own", "never", "always")
    parser.add_argument("--compiled", default="own", choices=choices, help="own: as the recipe's run")
    parser.add_argument("--precision", default="own", choices=("own", "fp32", "bf16", "fp16"))
    parser.add_argument("--table", action="store_true", help="measure nothing: show what is there")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "plan_memory")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    args = parser.parse_args()
    out = args.out.resolve()

    import torch

    from ds_slm.run.measure import device_name

    found = []
    for case in cases(args):
        path = out / f"{case.key}.json"
        if args.table and not path.exists():
            continue
        if not path.exists():
            measured = measure(case, out)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measured, indent=2) + "\n")
            print(json.dumps(measured), flush=True)
        found.append((case, json.loads(path.read_text())))

    if not found:
        raise DataError(f"{out} holds none of these cases: leave out --table.")
    Console(width=TABLE_WIDTH).print(table(found, device_name(torch.device("cpu"))))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
