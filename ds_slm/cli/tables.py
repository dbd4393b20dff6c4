"""Tables for people, printed without --json. They are plain text: importing rich takes as long as starting Python."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ds_slm.recipe.budget import Memory
from ds_slm.recipe.counts import Batch
from ds_slm.recipe.plan import Plan
from ds_slm.recipe.rates import OwnCpu
from ds_slm.run.scores import CONFIDENCE, Row

if TYPE_CHECKING:
    from ds_slm.evaluate.comparison import Difference
    from ds_slm.evaluate.ranking import Ranked

WORDS = ("published", "ours")
"""Columns that are aligned to the left, like a table's first column."""
FITS = {True: "yes", False: "no", None: "-"}
GAP = "  "
LEAST_WIDTH = 20
"""The least width of a last column that is wrapped."""


def show_recipes(rows: list[dict[str, Any]]) -> None:
    """One line per recipe."""
    table: list[Sequence[str]] = [("recipe", "parameters", "tokens", "published", "ours")]
    for row in rows:
        published = f"{row['metric']} {row['published']:g}" if row["metric"] else "-"
        ours = row["ours"] or "not yet run"
        table.append((row["name"], f"{row['params']:,}", _count(row["tokens"]), published, ours))
    _print_table(table)


def show_plan(plan: Plan, inherited: str, own: OwnCpu) -> None:
    """Print what the recipe inherits, the plan's figures, the time on each kind of device, and what both rest on.

    Args:
        plan: all figures.
        inherited: the inherited part of the recipe as TOML.
        own: the kind of device that this machine's CPU is.
    """
    print(f"{plan.recipe}: {plan.reproduces}\n" if plan.reproduces else f"{plan.recipe}\n")
    if inherited:
        print(f"# from its base:\n{inherited}")
    for name, value in _facts(plan).items():
        print(f"{name:18}{value}")

    print("\nPredicted, with one setting turned over:")
    columns = "memory per GPU", "host memory per GPU", "or per CPU rank", "computing time of a step"
    table: list[Sequence[str]] = [("", *columns)]
    on_cpu = {one.name: _gigabytes(one.device_bytes) for one in plan.cpu_alternatives}
    for one in plan.alternatives:
        ratio = "not measured" if one.step_ratio is None else f"x {one.step_ratio:.2f}"
        per_gpu = _gigabytes(one.device_bytes), _gigabytes(one.host_bytes)
        table.append((one.name, *per_gpu, on_cpu.get(one.name, "-"), ratio))
    _print_table(table)

    print("\nPredicted, not measured:")
    table = [("if every device is a", "tokens/s", "step", "run", "fits")]
    for time in plan.times:
        duration = _duration(time.step_s), _duration(time.run_s)
        table.append((time.device, _count(time.tokens_per_s), *duration, FITS[time.fits]))
    _print_table(table)
    for line in _scaling_lines(plan):
        print(line)

    row = (
        f"Of these, {own.device.name} is nearest to this machine's CPU"
        if own.device
        else "No row is this machine's CPU"
    )
    print(textwrap.fill(f"{row}: {own.basis}. Each step's line of `ds-slm train` tells its tokens/s.", width=100))

    print()
    print(textwrap.fill("Assumed: " + "; ".join(plan.assumptions) + ".", width=100))
    for warning in plan.warnings:
        print(f"warning: {warning}")


def _scaling_lines(plan: Plan) -> list[str]:
    """Lines on where more devices stop helping, and why; none for one device."""
    scaling = plan.scaling
    if plan.world_size == 1:
        return []
    lines = [
        f"Scaling, predicted: a step has {scaling.most_devices:,} rows, so more than {scaling.most_devices:,} devices "
        f"bring nothing; of the rows that these {plan.world_size:,} compute, {scaling.busy_share:.0%} count."
    ]

    if scaling.network_shares:
        half = {
            name: f"half at {nodes:,} hosts" if nodes else "never half"
            for name, nodes in scaling.balanced_hosts.items()
        }
        shares = (f"{name} {share:.0%} ({half[name]})" for name, share in scaling.network_shares.items())
        lines.append(f"The network's share of a step: {', '.join(shares)}.")
    return [textwrap.fill(line, width=100) for line in lines]


def show_evaluation(rows: list[Row]) -> None:
    """Print published figures beside ours."""
    table: list[Sequence[str]] = [
        ("task", "metric", "published", "ours", "±", "chance", "commonest", "bits/byte", "items", "what")
    ]
    for row in rows:
        figures = (row.published, row.ours, row.plus_minus, row.chance, row.commonest)
        cells = ["" if one is None else _figure(one) for one in figures]
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
        items = "" if row.items is None else f"{row.items:,}"
        table.append((row.task, row.metric, *cells, bits, items, row.what))
    _print_table(table)


def show_differences(differences: "list[Difference]") -> None:
    """Print the differences of two models on the same items."""
    table: list[Sequence[str]] = [
        ("task", "metric", "ours", "theirs", "difference", "±", "only ours", "only theirs", "p", "items")
    ]
    for one in differences:
        plus_minus = "" if one.stderr is None else f"{CONFIDENCE * one.stderr:.3f}"
        only = ["" if count is None else f"{count:,}" for count in (one.only_ours, one.only_theirs)]
        chance = "" if one.probability is None else f"{one.probability:.2g}"
        figures = f"{one.ours:.3f}", f"{one.theirs:.3f}", f"{one.difference:+.3f}"
        table.append((one.task, one.metric, *figures, plus_minus, *only, chance, f"{one.items:,}"))
    _print_table(table)


def show_ranking(context: str, choices: "list[Ranked]") -> None:
    """Print the choices of one context, the likeliest first."""
    print(context)
    table: list[Sequence[str]] = [("sum", "mean", "tokens", "choice")]
    for one in choices:
        table.append((f"{one.log_probability:.4f}", f"{one.mean_log_probability:.4f}", str(one.tokens), one.choice))
    _print_table(table)


def _figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.4g}"


def _facts(plan: Plan) -> dict[str, str]:
    parts, memory, cpu = plan.parameters, plan.memory, plan.cpu_memory
    published = "" if plan.published_params in (None, plan.params) else f" (published: {plan.published_params:,})"
    named = {"embedding": parts.embedding, "head": parts.head, "attention": parts.attention, "MLP": parts.mlp}

    # A blank key continues the line above: "" and " ", since keys must differ.
    facts = {
        "parameters": f"{plan.params:,}{published}",
        "": ", ".join(f"{name} {_count(part)}" for name, part in named.items() if part),
        "FLOPs per token": f"{plan.flops_per_token:,}",
        "steps": f"{plan.steps:,} x {plan.tokens // plan.steps:,} tokens = {_count(plan.tokens)}",
        "FLOPs": f"{plan.flops:.3g}",
        "first loss": f"{plan.first_loss:.3f}",
        "devices": f"{plan.world_size} on {plan.nodes} host{'s' * (plan.nodes > 1)}, ZeRO-{plan.zero_stage}",
        "a step on GPUs": _cut(plan.batch, plan.world_size),
        "memory per GPU": f"{_gigabytes(memory.device_bytes)}, predicted",
        " ": _parts(memory),
        "a step on CPUs": _cut(plan.cpu_batch, plan.world_size),
        "or per CPU rank": f"{_gigabytes(cpu.device_bytes)}, predicted",
        "  ": _parts(cpu),
        "a save": f"{_gigabytes(plan.save_bytes)} more of the host's memory, on a rank that writes it",
    }

    if memory.host_bytes:
        facts["offloaded"] = f"{_gigabytes(memory.host_bytes)} of the host's memory for each device"
    return facts


def _cut(batch: Batch, world_size: int) -> str:
    """How a step's rows are divided, in words."""
    rows = batch.rows_per_step + batch.filler_rows
    filler = f", {batch.filler_rows} of them filler" if batch.filler_rows else ""
    return (
        f"{batch.micro_batch} rows x {batch.accumulation_steps} forwards x {world_size} ranks = {rows:,} rows{filler}"
    )


def _parts(memory: Memory) -> str:
    """The parts of a rank's memory, in GB."""
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.parts.items() if size)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _count(number: float) -> str:
    """Three figures: 9968640 -> 9.97M, 25e9 -> 25B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """A time span in its natural unit."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns, named by the first row. A last cell that is too long for the terminal goes on below itself."""
    names = rows[0]
    *widths, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    margin = sum(widths) + len(GAP) * len(widths)
    if sys.stdout.isatty():
        last = min(last, max(LEAST_WIDTH, len(names[-1]), shutil.get_terminal_size().columns - margin))

    for row in rows:
        end, *more = textwrap.wrap(row[-1], last) if len(row[-1]) > last else [row[-1]]
        cells = zip(names, [*row[:-1], end], [*widths, last], strict=True)
        line = [cell.ljust(width) if name in (names[0], *WORDS) else cell.rjust(width) for name, cell, width in cells]
        print(GAP.join(line).rstrip())
        for rest in more:
            print(" " * margin + rest)
