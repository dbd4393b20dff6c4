"""What grows with the number of ranks, shown with tiny ranks on one machine.

    for each number of ranks: two launches of different length --> CPU time of a rank for a step, and for its start
    some readers of one data root at once --> how long each takes, and that all see the same data

python -m benchmarks.scale [--ranks 1 2 8 32] [--readers 128] [--out FILE]

Every rank trains one row a step, so its own arithmetic stays the same. CPU time is counted, the children's of a launch,
because ranks that share two cores wait for each other. What a step costs beyond a ring's share shows as growth.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import tiny_runs
from ds_slm.errors import TrainingError, run_program
from ds_slm.run import measure

STEPS = (20, 120)
"""Of the two launches whose difference counts."""
READ = """
import sys, time
from pathlib import Path
from ds_slm.data.shards.prepare import prepare
from ds_slm.recipe import schema
recipe, root = schema.load(sys.argv[1]), Path(sys.argv[2])
begin_s = time.process_time()
print(prepare(recipe, root / "tiny", report=lambda line: None).sha256, time.process_time() - begin_s)
"""


def cpu_s(folder: Path, ranks: int, steps: int) -> float:
    """CPU seconds of a launch with all its processes. Raises TrainingError with what it said where it fails."""
    every = [f"run.{what}_every_steps={steps}" for what in ("eval", "save")]
    settings = [*every, f"train.steps={steps}", f"train.global_batch_tokens={32 * ranks}", "schedule.warmup_steps=4"]
    files = ["--recipe", folder / "tiny.toml", "--run-dir", folder / f"run-{ranks}-{steps}", "--data-root", folder]
    words = [word for one in settings for word in ("--set", one)]
    command = tiny_runs.deepspeed_command(ranks, *files, "--micro-batch", 1, *words)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = tiny_runs.run(command, cwd=folder, timeout_s=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise TrainingError(f"{ranks} ranks ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def readers(folder: Path, count: int) -> dict[str, float]:
    """Open the prepared data in so many processes at once: CPU and wall seconds.

    Raises:
        TrainingError: one failed, or saw other data than the rest.
    """
    command = [sys.executable, "-c", READ, str(folder / "tiny.toml"), str(folder)]
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
    """Measure and tell."""
    parser = argparse.ArgumentParser(description="What grows with the number of ranks.")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8, 32])
    parser.add_argument("--readers", type=int, default=128)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found: dict[str, object] = {
        "device": measure.device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "date": today,
    }
    print(f"{found['device']}, {found['cores']} cores, {today}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_runs.write_recipe(folder)
        cpu_s(folder, 1, STEPS[0])  # prepares the data and compiles DeepSpeed's op

        for ranks in args.ranks:
            few, many = (cpu_s(folder, ranks, steps) for steps in STEPS)
            step_ms = 1e3 * (many - few) / (STEPS[1] - STEPS[0]) / ranks
            start_s = few / ranks - STEPS[0] * step_ms / 1e3
            rows.append({"ranks": ranks, "cpu_ms_per_rank_and_step": step_ms, "cpu_s_per_rank_to_start": start_s})
            print(f"{ranks:4} ranks: {step_ms:7.2f} ms of CPU a rank and step, {start_s:6.2f} s to start", flush=True)

        opened = readers(folder, args.readers)
        print(
            f"{args.readers} readers of one data root: {opened['median_cpu_s'] * 1e3:.0f} ms of CPU each (median), "
            f"{opened['most_cpu_s'] * 1e3:.0f} at most; all done after {opened['all_started_and_done_s']:.1f} s"
        )

    if args.out:
        args.out.write_text(json.dumps(found | {"steps": rows, "data": opened}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
