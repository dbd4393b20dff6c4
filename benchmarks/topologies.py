"""Every writer of a checkpoint with every reader: how much a resumed run differs from one that never moved.

    writer: WRITTEN steps, saved --> reader: the same run folder, STEPS more in the reader's topology
    reader: all steps in its own topology, undisturbed            |
                                                                  v
    cell: the largest relative difference of a loss over those STEPS; ledgers must be equal

python -m benchmarks.topologies [--out DIR] [--precision bf16]

It uses a tiny recipe (benchmarks/tiny_runs.py) on a CPU, because the comparison does not depend on size. Losses of two
undisturbed topologies also differ, by the order of their sums: the diagonal and the last row show by how much.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import tables, tiny_runs
from ds_slm.errors import DataError, run_program

PROGRAM = tiny_runs.ROOT / "tests" / "support" / "programs" / "cases.py"
WRITTEN, STEPS = 6, 20


@dataclass(frozen=True)
class Topology:
    """A ZeRO stage or ds_configs file, a number of ranks, an optimiser."""

    zero: str
    ranks: int
    optimizer: str

    @property
    def name(self) -> str:
        """Its name in the table."""
        short = {"adamw": "32", "adamw8bit": "8"}[self.optimizer]
        return f"z{self.zero.replace('_offload', 'o')}-w{self.ranks}-{short}bit"

    def settings(self, precision: str) -> str:
        """The settings for the test program."""
        values = f"optimizer.name={self.optimizer}", f"train.precision={precision}", f"train.steps={WRITTEN + STEPS}"
        quiet = "run.eval_every_steps=1000", "run.save_every_steps=1000"
        return ",".join([f"zero={self.zero}", *(f"set={one}" for one in (*values, *quiet))])


TOPOLOGIES = [
    Topology("1", 1, "adamw"),
    Topology("1", 2, "adamw8bit"),
    Topology("1", 3, "adamw"),
    Topology("2", 2, "adamw"),
    Topology("2", 3, "adamw8bit"),
    Topology("3", 2, "adamw"),
    Topology("3", 1, "adamw8bit"),
    Topology("2_offload", 2, "adamw8bit"),
]


def launch(folder: Path, ranks: int, cases: list[str], run: Callable[..., Any] = tiny_runs.run) -> None:
    """Run the cases one after another in one process group of this number of ranks."""
    arguments = ["--recipe", folder / "tiny.toml", "--out", folder, *cases]
    done = run(tiny_runs.deepspeed_command(ranks, *arguments, script=PROGRAM), cwd=folder, timeout_s=900)
    if done.returncode:
        raise DataError(f"{ranks} ranks failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")


def measure(folder: Path, precision: str, topologies: list[Topology]) -> dict[str, dict[str, float]]:
    """Reader -> writer (or "undisturbed in the first topology") -> the largest relative difference of a loss."""
    tiny_runs.write_recipe(folder)

    # Each topology writes a checkpoint, and trains undisturbed for comparison.
    worlds = sorted({one.ranks for one in topologies})
    for ranks in worlds:
        here = [one for one in topologies if one.ranks == ranks]
        cases = [f"written-{one.name}:{one.settings(precision)},max_steps={WRITTEN}" for one in here]
        launch(folder, ranks, cases + [f"whole-{one.name}:{one.settings(precision)}" for one in here])

    # Each reader goes on from a copy of each writer's run folder.
    for reader in topologies:
        for writer in topologies:
            shutil.copytree(folder / f"written-{writer.name}", folder / f"{writer.name}-to-{reader.name}")

    for ranks in worlds:
        cases = [
            f"{writer.name}-to-{reader.name}:{reader.settings(precision)}"
            for reader in topologies
            if reader.ranks == ranks
            for writer in topologies
        ]
        launch(folder, ranks, cases)

    found: dict[str, dict[str, float]] = {}
    for reader in topologies:
        whole = tiny_runs.records(folder / f"whole-{reader.name}")
        found[reader.name] = {
            writer.name: difference(tiny_runs.records(folder / f"{writer.name}-to-{reader.name}"), whole)
            for writer in topologies
        }

        first = tiny_runs.records(folder / f"whole-{topologies[0].name}")
        found[reader.name]["undisturbed, first"] = difference(first, whole)
    return found


def difference(found: list[dict], whole: list[dict]) -> float:
    """Largest relative difference of a loss after the move. Raises DataError if the rows differ."""
    if [one["ledger"] for one in found] != [one["ledger"] for one in whole]:
        raise DataError("the ledgers differ: other rows, or another number of steps.")
    after = [(a["loss"], b["loss"]) for a, b in zip(found, whole, strict=True) if a["step"] > WRITTEN]
    return max(abs(a / b - 1) for a, b in after)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "topologies")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()

    out = args.out.resolve() / args.precision
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    found = measure(out, args.precision, TOPOLOGIES)
    title = f"largest relative difference of a loss over {STEPS} steps after the move, {args.precision}"
    Console(width=130).print(tables.by_case(title, "written by, read by", found, ".1e"))
    (out / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
