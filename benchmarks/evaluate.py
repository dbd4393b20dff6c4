"""Our scorer beside lm-evaluation-harness's own: the same tasks, items and model, side after side in one run.

    EXPORT, benchmarks' files --> each side in a process of its own, rounds times --> seconds, CPU seconds, peak memory,
    worst difference of a log-probability --> a table, and JSON with --json

python benchmarks/evaluate.py EXPORT --bench-dir DIR [--items 150] [--batch-sizes 8 32 auto] [--rounds 2]

Timed is the scoring alone: rows are found and questions made before. One thread for each process by default: two that
wait for each other on a busy machine are slower than one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande")
"""The tasks of the published cards whose files one package holds in full."""


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process: what it took, and every log-probability."""
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


def run(side: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """One side in a process of its own."""
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
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return

    sides = ["ours", *(f"lm_eval {size}" for size in args.batch_sizes)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            found[side].append(run(side, sys.argv[1:], args.threads))

    def of(side: str, key: str) -> float:
        return median(one[key] for one in found[side])

    rows = [
        {
            "side": side,
            **{key: of(side, key) for key in ("seconds", "cpu_seconds", "ready_s", "peak_gb")},
            "times ours": of(side, "cpu_seconds") / of("ours", "cpu_seconds"),
            "worst difference": worst_difference(found["ours"][0], found[side][0]),
        }
        for side in sides
    ]
    if args.json:
        print(
            json.dumps({"tasks": list(args.tasks), "items": args.items, "rounds": args.rounds, "sides": rows}, indent=2)
        )
        return
    for row in rows:
        print("  ".join(f"{key} {value if isinstance(value, str) else f'{value:.3g}'}" for key, value in row.items()))


if __name__ == "__main__":
    main()
