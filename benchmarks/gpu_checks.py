"""The checks of benchmarks/gpu.py, each run as `python -m benchmarks.gpu_checks NAME --out FOLDER`.

    demo       the demo recipe's first steps, profiled; their losses compared with a CPU's
    resume     a killed and resumed run compared with one that was not, with deterministic algorithms: bit for bit
    auto       the micro-batch that is found by measuring
    packed     fine-tuning's packed rows compared with plain ones, with and without a mask (benchmarks/packed.py)
    the rest   a case of benchmarks/gpu_cases.py: numerics against fp32 first, then speed and memory

Each writes rows into FOLDER/result.json as soon as it has them: what was measured, beside the promise.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_cases
from benchmarks.tiny_runs import free_port
from ds_slm.errors import DataError, run_program
from ds_slm.run import metrics_file
from ds_slm.run.folder import newest_saved

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sysconfig.get_path("scripts"))
LAUNCHER = (str(PROGRAMS / "deepspeed"), "--quiet", "--num_accelerators", "1", "--master_port")
"""A port follows."""
ALONE = (sys.executable, "-u")
"""One device needs no launcher, and starts seconds sooner."""
DEMO = "demo"
LOSS_TOLERANCE = 5e-3
"""Relative tolerance of the first steps' losses on a GPU and on a CPU, both in bf16."""
STEPS, PROFILED = 60, "40:50"
REHEARSED_STEPS, REHEARSED_PROFILED = 4, "2:4"
COMPARED_STEPS = 3
PACKED = ("slm-10m", "--rows", "32")
REHEARSED_PACKED = (DEMO, "--rows", "2", "--rounds", "1", "--lengths", "20", "60")
PACKED_SHARE = 0.9
"""The promised share of the speed of plain rows."""


@dataclass
class Rows:
    """A check's figures, written whenever one is added."""

    folder: Path
    rehearsing: bool
    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, measured: str, promised: str = "", kept: bool | None = None) -> None:
        """Add one figure."""
        self.found.append({"what": what, "measured": measured, "promised": promised, "kept": kept})
        (self.folder / "result.json").write_text(json.dumps(self.found, indent=2) + "\n")


def environment(on_cpu: bool) -> dict[str, str]:
    """The environment of a launch; without a GPU if it should compute on the CPU."""
    return os.environ | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if on_cpu else {})


def run_folder(rows: Rows, name: str) -> Path:
    """A run's folder, beside the folders of the checks."""
    return rows.folder.parent / "runs" / name


def pretrain(
    rows: Rows, name: str, steps: int, *flags: str, starter: Sequence[str] = ALONE, on_cpu: bool = False
) -> list[dict[str, Any]]:
    """Train the demo recipe for some steps on one device; returns the records of its steps.

    The run is beside the check's folder, where the next checks find it. An existing run is replaced; otherwise it would
    be resumed, and its old figures reported again.

    Raises:
        DataError: the launch failed; its output is in the log.
    """
    run_dir = run_folder(rows, name)
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [*starter, str(ROOT / "ds_slm" / "pretrain.py"), "--recipe", DEMO, "--run-dir", str(run_dir)]
    command += ["--data-root", str(rows.folder.parent / "data"), "--max-steps", str(steps)]
    command += ["--set", "run.log_every_steps=1", *flags]

    # It has its own cache, so that it measures again what an earlier launch has measured.
    environ = environment(on_cpu or rows.rehearsing) | {"XDG_CACHE_HOME": str(rows.folder / "cache")}
    done = subprocess.run(command, env=environ, check=False)
    if done.returncode:
        raise DataError(f"{name}: the launch ended with {done.returncode}.")

    return metrics_file.read(run_dir)["train"]


def demo(rows: Rows) -> None:
    """Does it train at all, started as a user would, and with the same losses as on a CPU?"""
    steps, profiled = (REHEARSED_STEPS, REHEARSED_PROFILED) if rows.rehearsing else (STEPS, PROFILED)
    records = pretrain(rows, DEMO, steps, "--profile", profiled, starter=(*LAUNCHER, str(free_port())))
    losses = [record["loss"] for record in records]
    learns = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    rows.add(f"loss of steps 1 and {steps}", f"{losses[0]:.4f}, {losses[-1]:.4f}", "finite, falling", learns)
    rows.add("demo, tokens/s of the last step", f"{records[-1]['tokens_per_s']:,.0f}")
    rows.add("demo, peak memory", f"{records[-1]['peak_memory_gb']:.2f} GB")

    # The same rows and weights on this machine's CPU.
    on_cpu = [record["loss"] for record in pretrain(rows, "on-cpu", COMPARED_STEPS, on_cpu=True)]
    differs = max(abs(ours / cpu - 1) for ours, cpu in zip(losses, on_cpu, strict=False))
    rows.add(
        f"losses of {len(on_cpu)} steps beside a CPU's",
        f"differ by {differs:.1e} at most",
        f"{LOSS_TOLERANCE:.0e}",
        differs <= LOSS_TOLERANCE,
    )


def resume(rows: Rows) -> None:
    """Does a killed and resumed run equal, bit for bit, one that was not killed?"""
    # Use the demo's run, or a new one if that check failed, was not asked for, or saved nothing.
    run_dir = run_folder(rows, DEMO)
    if not newest_saved(run_dir)[0]:
        run_dir = run_folder(rows, "resumed")
        pretrain(rows, "resumed", 2)

    command = [str(PROGRAMS / "ds-slm"), "verify", str(run_dir), "--resume"]
    command += ["--json", "--data-root", str(rows.folder.parent / "data")]
    done = subprocess.run(command, env=environment(rows.rehearsing), stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if not done.stdout.strip():
        raise DataError(f"nothing was compared: `ds-slm verify --resume` ended with {done.returncode}.")

    same = json.loads(done.stdout)["same"]
    rows.add("killed and resumed, deterministic", "the same bits" if same else "differs", "the same bits", same)


def auto(rows: Rows) -> None:
    """Which micro-batch does `--micro-batch auto` choose, and how fast is it?"""
    steps = REHEARSED_STEPS if rows.rehearsing else 20
    records = pretrain(rows, "auto", steps, "--micro-batch", "auto")
    config = json.loads((run_folder(rows, "auto") / "ds_config.json").read_text())
    chosen = config["train_micro_batch_size_per_gpu"]
    rows.add("demo, micro-batch chosen", f"{chosen} rows, {records[-1]['tokens_per_s']:,.0f} tokens/s")


def packed(rows: Rows) -> None:
    """How fast are fine-tuning's packed rows compared with plain ones?"""
    recipe, *size = REHEARSED_PACKED if rows.rehearsing else PACKED
    command = [sys.executable, str(ROOT / "benchmarks" / "packed.py"), "--recipe", recipe, "--compiled", *size]
    done = subprocess.run(command, env=environment(rows.rehearsing), stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        raise DataError(f"packed rows: exit code {done.returncode}.")

    seconds = {side: statistics.median(found) for side, found in json.loads(done.stdout.splitlines()[-1]).items()}
    for side in ("packed", "packed, mask"):
        ratio = seconds["plain rows"] / seconds[side]
        promised, kept = (f"at least {PACKED_SHARE}", ratio >= PACKED_SHARE) if side == "packed" else ("", None)
        rows.add(f"{recipe}, {side}", f"{ratio:.2f} of plain rows' speed", promised, kept)


def case(name: str, rows: Rows, rounds: int) -> None:
    """Check numerics, then speed and memory; nothing is timed if the numerics are wrong."""
    chosen = gpu_cases.named(name, rows.rehearsing)
    recipe, _ = gpu_cases.load(chosen, rows.rehearsing)
    seen = gpu_cases.numerics(recipe, gpu_cases.device(rows.rehearsing))
    right = seen.is_right(recipe.train.precision)
    rows.add(
        f"{recipe.train.precision} beside fp32",
        f"loss {seen.loss:.5f}, {seen.loss_fp32:.5f}; gradients' cosine {seen.cosine:.6f}",
        f"loss within {gpu_cases.LOSS_TOLERANCE:.0e}, cosine {gpu_cases.COSINE[recipe.train.precision]}",
        right,
    )
    if not right:
        raise DataError(f"{name}: the numerics are wrong, so nothing was timed.")

    measured = gpu_cases.speed(chosen, rows.folder, rounds, rows.rehearsing)
    (rows.folder / "rounds.json").write_text(json.dumps([asdict(one) for one in measured], indent=2) + "\n")
    for row in gpu_cases.figures(chosen, recipe, measured, rows.rehearsing):
        rows.add(*row)


OWN = {"demo": demo, "resume": resume, "auto": auto, "packed": packed}
NAMES = (*OWN, *(one.name for one in gpu_cases.CASES))


def main() -> int:
    """Run one check."""
    parser = argparse.ArgumentParser(description="One check of benchmarks/gpu.py.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()

    rows = Rows(args.out.resolve(), args.rehearse)
    if args.name in OWN:
        OWN[args.name](rows)
    else:
        case(args.name, rows, args.rounds)

    wrong = [row for row in rows.found if row["kept"] is False]
    if wrong and not args.rehearse:
        raise DataError([f"{row['what']}: {row['measured']}, promised: {row['promised']}." for row in wrong])
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
