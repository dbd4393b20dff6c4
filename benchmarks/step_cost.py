"""What a step costs beside its arithmetic: the tiny recipe of tiny_runs.py, whose products take next to no time.

    checkouts A, B --> A B B A A B ..., each launch some hundred steps --> its median step --> median and least of all

python -m benchmarks.step_cost [CHECKOUT ...] [--ranks 1 2] [--micro-batch 1 4] [--rounds 5]

Several checkouts (each with a `.venv` of its own) take turns, so that a machine whose speed drifts is the same for all;
the pairs' ratios are what to quote. Without one, this checkout alone is measured.
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

from benchmarks import tiny_runs
from ds_slm.errors import TrainingError, run_program

STEPS, WARM_STEPS = 400, 50


def median_step_ms(checkout: Path, folder: Path, ranks: int, micro_batch: int) -> float:
    """The median step of one launch, in milliseconds, without the first ones."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)

    binaries = checkout / ".venv" / "bin"
    launcher = [binaries / "deepspeed", "--num_accelerators", ranks, "--master_port", tiny_runs.free_port()]
    files = ["--recipe", folder / "tiny.toml", "--run-dir", run_dir, "--data-root", folder / f"data-{checkout.name}"]
    every = [f"run.{what}_every_steps={STEPS}" for what in ("eval", "save")]
    settings = [part for one in (*every, f"train.steps={STEPS}") for part in ("--set", one)]
    command = [*launcher, checkout / "ds_slm" / "pretrain.py", *files, "--micro-batch", micro_batch, *settings]

    environment = {**tiny_runs.environment(), "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]])}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )

    if done.returncode:
        raise TrainingError(f"{checkout} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    durations_s = [record["step_s"] for record in tiny_runs.records(run_dir)][WARM_STEPS:]
    return 1e3 * statistics.median(durations_s)


def measure(checkouts: list[Path], folder: Path, ranks: int, micro_batch: int, rounds: int) -> dict[str, list[float]]:
    """Checkout -> the median step of each of its launches; who begins changes from round to round."""
    found: dict[str, list[float]] = {str(one): [] for one in checkouts}
    for number in range(rounds):
        for checkout in checkouts[:: -1 if number % 2 else 1]:
            found[str(checkout)].append(median_step_ms(checkout, folder, ranks, micro_batch))
    return found


def main() -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[tiny_runs.ROOT])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    checkouts = [one.resolve() for one in args.checkouts]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_runs.write_recipe(folder)

        for ranks in args.ranks:
            for micro_batch in args.micro_batch:
                found = measure(checkouts, folder, ranks, micro_batch, args.rounds)
                first = found[str(checkouts[0])]

                # Launches of one round are compared, because the machine's speed drifts between rounds.
                for checkout, medians_ms in found.items():
                    ratio = statistics.median(b / a for a, b in zip(first, medians_ms, strict=True))
                    print(
                        f"{ranks} ranks, micro-batch {micro_batch}: median {statistics.median(medians_ms):.2f} ms, "
                        f"least {min(medians_ms):.2f} ms a step, {ratio:.3f} of the first, {checkout}",
                        flush=True,
                    )

                print(json.dumps({"ranks": ranks, "micro_batch": micro_batch, "median_step_ms": found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
