"""What grows with the number of ranks, shown with tiny ranks on one machine.

    for each number of ranks: one launch --step_parts.py--> CPU time of a rank for a step and its parts, and to start
    some readers of one data root at once --> how long each takes, and whether all see the same data

python -m benchmarks.scale [--ranks 1 2 8 16 32] [--steps 120] [--readers 128] [--out FILE]

Every rank trains one row a step, so its own arithmetic is always the same. CPU time is counted, because ranks that
share two cores wait for each other. The cost of a step beyond a ring's share shows as growth. Numbers of ranks can be
measured one by one (`--ranks 32 --readers 0`), and the readers alone (`--ranks --readers 128`).
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import step_cost, tiny_runs
from ds_slm.errors import TrainingError, run_program
from ds_slm.run import measure

READ = """
import sys, time
from pathlib import Path
from ds_slm.data.shards.prepare import prepare
from ds_slm.recipe import loading
recipe, root = loading.load(sys.argv[1]), Path(sys.argv[2])
begin_s = time.process_time()
print(prepare(recipe, root / "tiny", report=lambda line: None).sha256, time.process_time() - begin_s)
"""


def of_ranks(folder: Path, ranks: int, steps: int) -> dict[str, float]:
    """CPU time of a rank, the mean of all: milliseconds of a step and its parts, seconds until the first step is taken.

    Raises TrainingError with the launch's output if it fails.
    """
    settings = [f"train.global_batch_tokens={32 * ranks}", "schedule.warmup_steps=4"]
    words = [word for one in settings for word in ("--set", one)]
    by_rank = step_cost.measure_launch(tiny_runs.ROOT, folder, ranks, steps, "--micro-batch", 1, *words)

    mean = {part: statistics.fmean(one[part] for one in by_rank) for part in by_rank[0]}
    parts = {part: mean[part] for part in ("process", "deepspeed", "ours_main", "ours_threads")}
    return {"ranks": ranks, "start_s": mean["start"] / 1e3, **parts}


def readers(folder: Path, data_root: Path, count: int) -> dict[str, float]:
    """Open the prepared data in `count` processes at once: CPU and wall seconds.

    Raises:
        TrainingError: one failed, or saw other data than the rest.
    """
    command = [sys.executable, "-c", READ, str(folder / "tiny.toml"), str(data_root)]
    begin_s = time.monotonic()
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tiny_runs.ROOT) for _ in range(count)]
    answers = [process.communicate()[0].split() for process in started]
    wall_s = time.monotonic() - begin_s

    seen = {answer[0] if answer else "nothing" for answer in answers}
    if len(seen) > 1 or any(process.returncode for process in started):
        raise TrainingError(f"{count} readers saw {', '.join(sorted(seen))}: expected the same data in all.")
    durations_s = [float(answer[1]) for answer in answers]
    return {"readers": count, "median_cpu_s": statistics.median(durations_s), "most_cpu_s": max(durations_s),
            "all_started_and_done_s": wall_s}  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What grows with the number of ranks.")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--readers", type=int, default=128, help="0: none")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = {"device": measure.device_name(torch.device("cpu")), "cores": os.cpu_count(), "date": today}
    print(f"{facts['device']}, {facts['cores']} cores, {today}")
    steps, opened = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_runs.write_recipe(folder)
        of_ranks(folder, 1, args.steps)  # prepares the data and compiles DeepSpeed's op

        for ranks in args.ranks:
            found = of_ranks(folder, ranks, args.steps)
            steps.append(found)
            print(
                f"{ranks:4} ranks, CPU each: {found['start_s']:6.2f} s to start, a step {found['process']:6.2f} ms: "
                f"DeepSpeed and torch {found['deepspeed']:.2f}, ours {found['ours_main']:.2f} and in threads "
                f"{found['ours_threads']:.2f}, the rest is gloo's",
                flush=True,
            )

        if args.readers:
            opened = readers(folder, step_cost.data_root(folder, tiny_runs.ROOT), args.readers)
            print(
                f"{args.readers} readers of one data root: {opened['median_cpu_s'] * 1e3:.0f} ms of CPU each (median), "
                f"{opened['most_cpu_s'] * 1e3:.0f} at most; all done after {opened['all_started_and_done_s']:.1f} s"
            )

    if args.out:
        args.out.write_text(json.dumps({**facts, "steps": steps, "data": opened}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
