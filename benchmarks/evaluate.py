"""Our scorer compared with lm-evaluation-harness's own: the same tasks, items and model, side after side in one run.

    EXPORT, benchmarks' files --> each side in its own process, rounds times --> seconds, CPU seconds, peak memory,
    worst difference of a log-probability --> a Markdown table, and JSON with --json
    --start: the steps of `ds-slm eval`, up to its first batch --> seconds, CPU seconds

python benchmarks/evaluate.py EXPORT --bench-dir DIR [--items 150] [--batch-sizes 8 32 auto] [--rounds 2] [--start]

Only the scoring is timed: rows are found and questions made before. `--tasks card` takes every task whose rows are in
the folder, except MMLU. By default each process has one thread, because two threads that wait for each other on a busy
machine are slower than one. CPU seconds of busy cores differ by a quarter from run to run, so sides take turns: `times
ours` is the median of each round's ratio.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande")
"""The tasks of the published cards whose files one package holds in full."""
COLUMNS = ("seconds", "cpu_seconds", "times ours", "peak_gb", "worst difference")


class FirstBatch(Exception):
    """A batch was scored."""


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side, in this process: its time and memory, and every log-probability."""
    begun_s = time.monotonic()
    import torch

    torch.set_num_threads(args.threads)
    from ds_slm.evaluate import benchmarks, harness
    from ds_slm.evaluate.opening import open_scorer
    from ds_slm.evaluate.text import TextEncoder

    tasks = {}
    for name in args.tasks:
        benchmark = benchmarks.BENCHMARKS[name]
        rows = benchmarks.find_rows(benchmark, args.bench_dir).rows
        tasks[name] = harness.task_of(Path(benchmark.config), rows[: args.items])

    if side == "ours":
        opened = open_scorer(args.export)
        model: Any = harness.HarnessModel(opened.scorer, TextEncoder(opened.tokenizer))
    else:
        from lm_eval.models.huggingface import HFLM

        size = side.removeprefix("lm_eval ")
        batch_size = size if size == "auto" else int(size)
        model = HFLM(pretrained=str(args.export), device="cpu", batch_size=batch_size, dtype="float32")

    ready_s, cpu_s = time.monotonic(), time.process_time()
    items = harness.run(tasks, model)
    return {
        "side": side,
        "seconds": time.monotonic() - ready_s,
        "cpu_seconds": time.process_time() - cpu_s,
        "ready_s": ready_s - begun_s,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "log_probabilities": {name: [item.log_probabilities for item in answered] for name, answered in items.items()},
    }


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Time `ds-slm eval` until its first batch is scored, in this process, including imports."""
    begun_s = time.monotonic()
    import ds_slm.cli.evaluation  # noqa: F401 - what the command imports
    from ds_slm.evaluate import evaluation
    from ds_slm.evaluate.opening import open_scorer

    def end(rows: int) -> None:
        raise FirstBatch

    opened = open_scorer(args.export)
    tasks = evaluation.prepare(args.tasks, args.bench_dir, lambda line: None)
    with suppress(FirstBatch):
        evaluation.evaluate(opened, tasks, args.items, end)
    return {"side": "start", "seconds": time.monotonic() - begun_s, "cpu_seconds": time.process_time()}


def tasks_with_rows(bench_dir: Path) -> list[str]:
    """The tasks of the cards whose rows are in the folder, without MMLU."""
    from ds_slm.errors import DataError
    from ds_slm.evaluate.benchmarks import BENCHMARKS, MMLU, find_rows

    found = []
    for name, benchmark in BENCHMARKS.items():
        if benchmark in MMLU:
            continue
        try:
            find_rows(benchmark, bench_dir)
            found.append(name)
        except DataError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def run(side: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run one side in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed: run {' '.join(command)} to see why.")
    return json.loads(done.stdout.splitlines()[-1])


def worst_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest relative difference of a log-probability."""
    pairs = (
        (one, other)
        for name, items in ours["log_probabilities"].items()
        for mine, others in zip(items, theirs["log_probabilities"][name], strict=True)
        for one, other in zip(mine, others, strict=True)
    )
    return max(abs(one - other) / abs(other) for one, other in pairs)


def main() -> None:
    """Measure every side in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--bench-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--batch-sizes", nargs="+", default=["8", "32", "auto"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", action="store_true", help="measure nothing but the time to the first batch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(start(args) if args.side == "start" else measure(args.side, args)))
        return

    if args.tasks == ["card"]:
        args.tasks = tasks_with_rows(args.bench_dir)
        sys.argv += ["--tasks", *args.tasks]
    if args.start:
        starts = [run("start", sys.argv[1:], args.threads) for _ in range(args.rounds)]
        for key in ("seconds", "cpu_seconds"):
            print(f"start to the first batch, {key}: {median(one[key] for one in starts):.1f}, of {args.rounds}")
        return

    sides = ["ours", *(f"lm_eval {size}" for size in args.batch_sizes)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            found[side].append(run(side, sys.argv[1:], args.threads))

    def of(side: str, key: str) -> float:
        return median(one[key] for one in found[side])

    ours = [one["cpu_seconds"] for one in found["ours"]]
    rows = [
        {
            "side": side,
            **{key: of(side, key) for key in ("seconds", "cpu_seconds", "ready_s", "peak_gb")},
            "times ours": median(one["cpu_seconds"] / mine for one, mine in zip(found[side], ours, strict=True)),
            "worst difference": worst_difference(found["ours"][0], found[side][0]),
        }
        for side in sides
    ]
    if args.json:
        print(
            json.dumps({"tasks": list(args.tasks), "items": args.items, "rounds": args.rounds, "sides": rows}, indent=2)
        )
        return
    print(f"{', '.join(args.tasks)}; {args.items} items each, {args.threads} thread, {args.rounds} rounds\n")
    print("| side | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        print(f"| {row['side']} | " + " | ".join(f"{row[key]:.3g}" for key in COLUMNS) + " |")


if __name__ == "__main__":
    main()
