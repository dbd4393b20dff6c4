"""The table of benchmarks/train.py: every recipe in every precision that this machine multiplies, and its rivals.

    for each row: each side's best micro-batch --> ours, trainer, trainer-ds, bare; ours, ... until the ratios agree
                  --> OUT/RECIPE-PRECISION.json after each side's best micro-batch and after each round
    every OUT/RECIPE-PRECISION.json --> one table

python benchmarks/train.py --all [--precisions bf16 fp32] [--out runs/benchmarks]

A machine's speed drifts, so a ratio compares two launches of one round, and a row is done when each side's ratios lie
within SPREAD of their median. A row with a file goes on where it ended, so the same command makes the table in pieces.
"""

import datetime
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import train
from ds_slm.errors import DataError
from ds_slm.model import kernels
from ds_slm.model.kernels import DTYPES
from ds_slm.recipe import loading
from ds_slm.run import measure

RECIPES = ("gpt-s-1.4m", "slm-10m", "ant-10m", "slm-124m", "axiom-380m")
PRECISIONS = ("bf16", "fp32")
SPREAD, LEAST_ROUNDS, MOST_ROUNDS = 0.05, 2, 5
"""Rounds end if the ratios' range is below this share of their median, or at MOST_ROUNDS."""


@dataclass
class Row:
    """A recipe in one precision, as far as it has been measured."""

    asked: dict[str, Any] = field(default_factory=dict)
    """Micro-batches that were tried, and steps that count: rounds of a row are alike."""
    micro_batches: dict[str, int] = field(default_factory=dict)
    """Each side's best micro-batch."""
    rounds: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """Side -> its figures (`train.Round`), for each whole round."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Device, PyTorch, date and load of the last round."""

    def ratios(self, side: str) -> list[float]:
        """The ratio of our tokens a second to this side's, for each round."""
        return [one["ours"]["tokens_per_s"] / one[side]["tokens_per_s"] for one in self.rounds]

    @property
    def spread(self) -> float:
        """The widest range of a side's ratios, as a share of their median."""
        found = [self.ratios(side) for side in train.SIDES[1:]]
        return max((max(one) - min(one)) / statistics.median(one) for one in found)

    @property
    def is_done(self) -> bool:
        """Whether no further round is needed."""
        count = len(self.rounds)
        return count >= MOST_ROUNDS or (count >= LEAST_ROUNDS and self.spread < SPREAD)

    def median(self, side: str, figure: str) -> float:
        """The median of a figure over the rounds."""
        return statistics.median(one[side][figure] for one in self.rounds)


def read(path: Path) -> Row:
    """The row that an earlier call left; an empty row if there is none."""
    return Row(**json.loads(path.read_text())) if path.exists() else Row()


def write(path: Path, row: Row) -> None:
    """Write the whole row, or keep the old file: a call may be ended at any moment."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(asdict(row), indent=2) + "\n")
    beside.replace(path)


def measure_row(path: Path, bench: train.Bench, choices: list[int]) -> None:
    """Measure the rest of one row. Raises DataError if it was begun with other flags."""
    row, asked = read(path), {"micro_batches": choices, "steps": bench.steps}
    if row.asked not in ({}, asked):
        raise DataError(f"{path} was begun with {row.asked}, this call has {asked}: name another --out, or remove it.")
    row.asked = asked
    for side in train.SIDES:
        if side not in row.micro_batches:
            row.micro_batches[side] = train.best_micro_batch(bench, side, choices)
            write(path, row)

    while not row.is_done:
        sides = train.SIDES if len(row.rounds) % 2 == 0 else train.SIDES[::-1]
        found = {side: asdict(train.measure(bench, side, row.micro_batches[side])) for side in sides}
        row.rounds.append(found)
        device = torch.device("cuda" if bench.on_gpu else "cpu")
        row.facts = {"device": measure.device_name(device), "ranks": bench.devices, "torch": torch.__version__}
        row.facts |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "load": os.getloadavg()[0]}
        write(path, row)
        speeds = ", ".join(f"{side} {found[side]['tokens_per_s']:,.0f}" for side in train.SIDES)
        print(f"{path.stem}, round {len(row.rounds)}: {speeds} tokens/s", flush=True)


def table(out: Path, lacking: set[str]) -> Table:
    """A table with a line for each row; rows that this machine cannot run, or that are not measured, say so."""
    grid = Table(title="Tokens/s of ours; in brackets its ratio to the side, median (least, most) of the rounds")
    for name in ("recipe", "ours", "Trainer", "Trainer, ZeRO-1", "bare loop", "GB: ours, Trainer", "start s", "rounds"):
        grid.add_column(name)

    for name in RECIPES:
        for precision in PRECISIONS:
            label, row = f"{name}, {precision}", read(out / f"{name}-{precision}.json")
            if not row.rounds:
                grid.add_row(label, f"no {precision} instructions" if precision in lacking else "not yet run")
                continue

            cells = []
            for side in train.SIDES[1:]:
                ratios = row.ratios(side)
                middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
                cells.append(f"{row.median(side, 'tokens_per_s'):,.0f} [{middle}]")
            memory = f"{row.median('ours', 'peak_gb'):.2f}, {row.median('trainer', 'peak_gb'):.2f}"
            ours, start_s = row.median("ours", "tokens_per_s"), row.median("ours", "start_s")
            grid.add_row(label, f"{ours:,.0f}", *cells, memory, f"{start_s:.1f}", str(len(row.rounds)))
    return grid


def run(out: Path, choices: list[int], steps: int, precisions: Sequence[str]) -> None:
    """Measure what is not yet measured, one row after another, and print the whole table.

    Args:
        out: where the rows are kept.
        choices: micro-batches; each side takes its best.
        steps: steps of a launch that count.
        precisions: the precisions to measure; all recipes in the first one, then in the next.
    """
    out.mkdir(parents=True, exist_ok=True)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = {one for one in PRECISIONS if not kernels.multiplies(device_type, DTYPES[one])}

    for precision in precisions:
        for name in RECIPES:
            path = out / f"{name}-{precision}.json"
            if precision in lacking or read(path).is_done:
                continue
            settings = [f"train.precision={precision}"]
            bench = train.bench_of(name, settings, out / "data" / loading.recipe_path(name).stem, steps)
            measure_row(path, bench, choices)

    Console(width=170).print(table(out, lacking))
    print(f"written: {out}")
