"""How the seconds from the command to the first step are spent, in the real program, with cached results and without.

    random ids, made-up tokenizer --> one launch that fills the caches --> ROUNDS launches --> medians, and a table

python benchmarks/startup.py RECIPE [--program deepspeed] [--rounds 3] [--set SECTION.KEY=VALUE] [--json]

The parts are the times of `ds_slm.run.start_clock` on rank 0, from the run's record of its launch. `first step` is the
step itself; if blocks are compiled, it includes the pause in which torch takes them from its cache. With `--program
ds-slm`, `ds-slm train` starts the ranks; its own time, like that of `ds-slm plan`, is not in the parts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from rich.console import Console

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import tables, train
from ds_slm.errors import DataError, run_program
from ds_slm.recipe import loading
from ds_slm.run import metrics_file

FIRST_STEP = "first step"


def start(bench: train.Bench, program: str) -> dict[str, float]:
    """Launch one step; returns the seconds of each part. Raises DataError with its output if it fails."""
    folder = bench.out / "launches" / f"start-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    command = train.our_command(bench, folder, micro_batch=1, accumulation=1, steps=1)
    if program == "ds-slm":
        flags = command[command.index(str(train.PRETRAIN)) + 1 :]
        named = flags.index("--recipe")
        flags = flags[:named] + flags[named + 2 :]  # `ds-slm train` takes the recipe without a flag
        command = [str(train.PROGRAMS / program), "train", bench.name, "--devices", str(bench.devices), *flags]

    environment = bench.environment("ours")
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False
    )
    if done.returncode:
        raise DataError(f"the launch failed ({done.returncode}):\n{done.stdout[-4000:]}")

    records = metrics_file.read(folder / "run")
    return {**records["launch"][-1]["start_s"], FIRST_STEP: records["train"][-1]["step_s"]}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds, of each part and of the time to the first forward."""
    parts = {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
    first_forward = [sum(seconds for what, seconds in one.items() if what != FIRST_STEP) for one in rounds]
    return {**parts, "first forward after": statistics.median(first_forward)}


def main() -> int:
    """Launch, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--program", choices=("deepspeed", "ds-slm"), default="deepspeed", help="what is typed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    import torch

    from ds_slm.run import measure

    bench = train.bench_of(args.recipe, args.set, args.out.resolve() / loading.recipe_path(args.recipe).stem)

    first = start(bench, args.program)  # prepares the data, and compiles blocks that torch's cache does not hold
    warm = medians([start(bench, args.program) for _ in range(args.rounds)])

    device = measure.device_name(torch.device("cuda" if bench.on_gpu else "cpu"))
    facts = {
        "recipe": args.recipe,
        "program": args.program,
        "overrides": args.set,
        "device": device,
        "ranks": bench.devices,
    }
    facts |= {"torch": torch.__version__, "date": str(date.today()), "load": os.getloadavg()[0]}
    columns = {"first launch": medians([first]), f"median of {args.rounds}": warm}
    if args.json:
        print(json.dumps({**facts, "first_launch_s": columns["first launch"], "warm_s": warm}, indent=2))
    else:
        title = (
            f"{args.program}, {args.recipe}, {bench.devices} ranks, {device}, {facts['date']}, load {facts['load']:.1f}"
        )
        Console(width=train.TABLE_WIDTH).print(tables.by_case(title, "seconds for", columns, ".2f"))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
