"""Is `ds-slm plan` right about time on two hosts? Planned figures beside measured ones, over links of known speed.

    one core of this machine, timed with the recipe's blocks
    two hosts in network namespaces, a rank each --> a launch over a cable without a limit, then over limited ones
                                                 --> OUT/CASE.json, with the core's speed just before
    the plan of the same topology and core --> a table: planned and measured seconds and bytes

python -m benchmarks.plan_network [RECIPE ...] [--stages 1 2 3] [--precisions fp32 bf16] [--links 1 0.1] [--table]

A case that has its file is not run again, so the same command goes on where it ended. Measured are the median of the
steps after the first, and the bytes that the first host sends in each of them, by its interface's own counter. The
network's time is the difference to a step over the cable without a limit. Blocks are eager. Needs root and the Debian
packages that benchmarks/hosts.py names; the hosts share this machine's cores.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import tiny_runs
from benchmarks import train as bench_train
from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import TwoHosts
from ds_slm.errors import DataError, run_program
from ds_slm.recipe import ds_config, loading, plan, rates, times
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import Topology

RECIPES = ("demo", "slm-10m")
LINKS_GBIT_PER_S = (1.0, 0.1)
UNLIMITED = math.inf
NODES = ("node1", "node2")
STEPS, ACCUMULATION = 5, 2
POLL_S = 0.02
LAUNCH_TIMEOUT_S = 600.0
TABLE_WIDTH = 150


@dataclass(frozen=True)
class Case:
    """One launch."""

    name: str
    precision: str
    stage: int
    link_gbit_per_s: float
    micro_batch: int

    @property
    def key(self) -> str:
        """Its file's name."""
        return f"{self.name}-{self.precision}-zero{self.stage}-rows{self.micro_batch}-{self.link_gbit_per_s:g}gbit"

    @property
    def recipe(self) -> Recipe:
        """The recipe with a step of ACCUMULATION forwards on each host."""
        recipe = loading.load(self.name, [f"train.precision={self.precision}"])
        tokens = len(NODES) * self.micro_batch * ACCUMULATION * recipe.data.seq_len
        train = recipe.train.model_copy(update={"global_batch_tokens": tokens})
        return recipe.model_copy(update={"train": train})


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for."""
    for name in args.recipes:
        recipe = loading.load(name)
        rows = plan.default_micro_batch("cpu", recipe.data.seq_len)
        for precision in args.precisions:
            for stage in args.stages:
                for link in (UNLIMITED, *args.links):
                    yield Case(name, precision, stage, link, rows)


def measure(case: Case, hosts: TwoHosts, folder: Path) -> dict[str, Any]:
    """Time a core, then launch a case. Raises DataError with its output if it fails."""
    from ds_slm.engine.core_speed import core_speed

    recipe = case.recipe
    speed = core_speed(recipe, case.micro_batch, cores=len(NODES))
    laid_out = folder / case.name
    settings = [*bench_train.lay_out(recipe, laid_out), f"train.precision={case.precision}"]
    bench = bench_train.Bench(
        case.name, recipe, settings, laid_out, len(NODES), on_gpu=False, stage=case.stage, compile_blocks=False
    )
    own = folder / case.key
    own.mkdir()
    launcher = [str(bench_train.PROGRAMS / "deepspeed"), "--hostfile", str(bench_train.ROOT / "hostfiles" / "two_node")]
    command = bench_train.our_command(bench, own, case.micro_batch, ACCUMULATION, STEPS, launcher)

    for node in NODES:
        hosts.limit(node, case.link_gbit_per_s)

    # Note what the first host has sent when each step is recorded, in a run folder that this process sees, too.
    counters: list[int] = []
    with (own / "said").open("w") as said:
        process = hosts.start(command, said, subprocess.STDOUT, {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"})
        deadline_s = time.monotonic() + LAUNCH_TIMEOUT_S
        while process.poll() is None:
            if time.monotonic() > deadline_s:
                hosts.end_processes()
            time.sleep(POLL_S)
            if len(records(own)) > len(counters):
                counters.append(hosts.sent_bytes(NODES[0]))
    if process.returncode:
        raise DataError(f"{case.key} failed ({process.returncode}):\n{(own / 'said').read_text()[-4000:]}")

    steps = records(own)
    return {
        "case": case.key,
        "step_s": statistics.median(one["step_s"] for one in steps[1:]),
        "steps_s": [one["step_s"] for one in steps],
        "mfu": statistics.median(one["mfu"] for one in steps[1:]),
        "sent_bytes": (counters[-1] - counters[0]) / (len(counters) - 1) if len(counters) > 1 else None,
        "core": asdict(speed),
        "date": date.today().isoformat(),
    }


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps so far."""
    try:
        return tiny_runs.records(folder / "run")
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def planned(case: Case, speed: rates.CoreSpeed) -> tuple[float, float, int]:
    """The plan's figures: seconds of a step, the network's part of them, and bytes that a host sends."""
    settings = ds_config.read(bench_train.ROOT / "ds_configs" / f"zero{case.stage}.json")
    own = rates.OwnCpu(None, "", speed=speed)
    topology = Topology(len(NODES), len(NODES), case.link_gbit_per_s, None, own)
    time_ = plan.plan(case.recipe, case.name, settings, topology).times[-1]
    sent = times.traffic(case.recipe, settings["zero_optimization"], topology, ACCUMULATION, "cpu")
    return time_.step_s, time_.network_s, sent.all_bytes


def table(found: dict[Case, dict[str, Any]], device: str) -> Table:
    """A table with a row for each measured case that has a limit, planned again."""
    dates = sorted({one["date"] for one in found.values()})
    grid = Table(title=f"a step on two hosts with a core each, {device}, {' and '.join(dates)}")
    names = ("s: planned", "measured", "ratio", "network s: planned", "measured", "MB sent: planned", "measured")
    for name in ("case", *names):
        grid.add_column(name, justify="left" if name == "case" else "right")

    for case, one in found.items():
        if case.link_gbit_per_s == UNLIMITED:
            continue
        step_s, network_s, sent = planned(case, rates.CoreSpeed(**one["core"]))
        unlimited = found.get(replace(case, link_gbit_per_s=UNLIMITED))
        measured_network_s = f"{one['step_s'] - unlimited['step_s']:.2f}" if unlimited else "-"
        measured_mb = "-" if one["sent_bytes"] is None else f"{one['sent_bytes'] / 1e6:.1f}"
        seconds = f"{step_s:.2f}", f"{one['step_s']:.2f}", f"{step_s / one['step_s']:.2f}"
        grid.add_row(case.key, *seconds, f"{network_s:.2f}", measured_network_s, f"{sent / 1e6:.1f}", measured_mb)
    return grid


def main() -> int:
    """Measure the missing cases, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--links", type=float, nargs="+", default=LINKS_GBIT_PER_S, help="Gbit/s")
    parser.add_argument("--table", action="store_true", help="measure nothing: show what is there")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "plan_network")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    import torch

    from ds_slm.run.measure import device_name

    asked = list(cases(args))
    missing = [case for case in asked if not (out / f"{case.key}.json").exists()]
    if missing and not args.table:
        measure_all(missing, out)

    found = {case: json.loads(path.read_text()) for case in asked if (path := out / f"{case.key}.json").exists()}
    if not found:
        raise DataError(f"{out} holds none of these cases: leave out --table.")
    Console(width=TABLE_WIDTH).print(table(found, device_name(torch.device("cpu"))))
    return 0


def measure_all(missing: list[Case], out: Path) -> None:
    """Launch each case on two hosts, and write its figures at once. Raises DataError if hosts cannot be made."""
    if problems := missing_requirements():
        raise DataError(" ".join(problems))
    with tempfile.TemporaryDirectory() as folder, TwoHosts(bench_train.ROOT, Path(folder) / "hosts") as hosts:
        for case in missing:
            measured = measure(case, hosts, Path(folder))
            (out / f"{case.key}.json").write_text(json.dumps(measured, indent=2) + "\n")
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
