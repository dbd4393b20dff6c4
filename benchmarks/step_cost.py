"""What a step costs beyond its arithmetic, and how much of that is our code: the tiny recipe of tiny_runs.py.

    checkouts A, B --> A B B A A B ..., each launch --step_parts.py--> CPU ms of a step: ours, DeepSpeed's with torch
                   --> medians over the rounds, and the pairs' ratio

python -m benchmarks.step_cost [CHECKOUT ...] [--ranks 1 2 8] [--micro-batch 4] [--rounds 3] [--steps 120]

Several checkouts (each with its own `.venv`) take turns, so that a drift in the machine's speed is the same for all;
quote the pairs' ratios. Without CHECKOUT only this checkout is measured. Rank 0 keeps the records; the other ranks are
reported as their mean. Eight ranks on two cores take a minute a launch, nearly all of it their start.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import step_parts, tiny_runs
from ds_slm.errors import ConfigError, TrainingError, run_program
from ds_slm.files import sha256_of_json

Parts = dict[str, float]
"""Part of a step -> milliseconds."""


def data_root(folder: Path, checkout: Path) -> Path:
    """The folder in which a checkout prepares its data; each checkout has its own."""
    return folder / f"data-{checkout.name}-{sha256_of_json(str(checkout))[:8]}"


def measure_launch(checkout: Path, folder: Path, ranks: int, steps: int, *flags: object) -> list[Parts]:
    """The parts of a step in one launch, for each rank.

    Args:
        checkout: the checkout whose program is launched, with its own `.venv`.
        folder: holds tiny.toml; data and the run go there.
        ranks: number of ranks, on this machine.
        steps: number of steps of the launch.
        flags: further flags of the program.

    Raises:
        ConfigError: no step would count.
        TrainingError: the launch failed; with its output.
    """
    if steps <= step_parts.WARM_STEPS + 1:
        raise ConfigError(f"--steps {steps}: expected more than {step_parts.WARM_STEPS + 1}: the first do not count.")

    run_dir, found = folder / "run", folder / "parts"
    for old in (run_dir, found):
        shutil.rmtree(old, ignore_errors=True)
    found.mkdir()

    binaries = checkout / ".venv" / "bin"
    launcher = [binaries / "deepspeed", "--num_accelerators", ranks, "--master_port", tiny_runs.free_port()]
    files = ["--recipe", folder / "tiny.toml", "--run-dir", run_dir, "--data-root", data_root(folder, checkout)]
    every = [f"run.{what}_every_steps={steps}" for what in ("eval", "save")]
    settings = [part for one in (*every, f"train.steps={steps}") for part in ("--set", one)]
    command = [*launcher, Path(step_parts.__file__), *files, *settings, *flags]

    environment = {**tiny_runs.environment(), "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]])}
    environment |= {"STEP_PARTS": str(found), "STEP_PARTS_LAST": str(steps)}
    environment.pop("PYTHONPATH", None)  # it would put one checkout's modules into the launches of all
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise TrainingError(f"{checkout} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return [json.loads((found / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def summary(by_rank: list[Parts]) -> Parts:
    """One launch: rank 0's parts, our code's share of them, and the mean of our code's share on the other ranks."""

    def ours(parts: Parts) -> float:
        return parts["ours_main"] + parts["ours_threads"]

    first, others = by_rank[0], by_rank[1:]
    found = {**first, "ours": ours(first)}
    del found["start"]
    if others:
        found["ours_elsewhere"] = statistics.fmean(map(ours, others))
    return found


def measure(checkouts: list[Path], folder: Path, ranks: int, micro_batch: int, args: argparse.Namespace) -> None:
    """Launch the checkouts in turns, and print each one's medians; the checkouts take turns to begin a round."""
    found: dict[Path, list[Parts]] = {one: [] for one in checkouts}
    for number in range(args.rounds):
        for checkout in checkouts[:: -1 if number % 2 else 1]:
            by_rank = measure_launch(checkout, folder, ranks, args.steps, "--micro-batch", micro_batch)
            found[checkout].append(summary(by_rank))

    # Launches of one round are compared, because the machine's speed drifts between rounds.
    for checkout, rounds in found.items():
        print(f"{ranks} ranks, micro-batch {micro_batch}, {checkout}, ms a step and of the first checkout's:")
        for part in rounds[0]:
            median_ms = statistics.median(one[part] for one in rounds)
            ratio = statistics.median(
                one[part] / first[part] for one, first in zip(rounds, found[checkouts[0]], strict=True)
            )
            print(f"  {part:<15}{median_ms:8.3f}{ratio:8.3f}", flush=True)
    everything = {str(checkout): rounds for checkout, rounds in found.items()}
    print(json.dumps({"ranks": ranks, "micro_batch": micro_batch, "ms": everything}), flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[tiny_runs.ROOT])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help=f"of a launch; {step_parts.WARM_STEPS} do not count")
    args = parser.parse_args()

    checkouts = [one.resolve() for one in args.checkouts]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_runs.write_recipe(folder)
        for ranks in args.ranks:
            for micro_batch in args.micro_batch:
                measure(checkouts, folder, ranks, micro_batch, args)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
