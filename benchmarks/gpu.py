"""What only a GPU can show, the most valuable first, in the minutes for which such a machine may be lent.

    each check --> its own process, with a time limit (benchmarks/gpu_checks.py) --> OUT/NAME/result.json, OUT/NAME.log
               --> OUT/result.json, written anew after each check, and a table

python benchmarks/gpu.py [--only NAME...] [--seconds 480] [--rounds 1] [--rehearse]

A check that fails, hangs or finds no time left does not cost other checks their figures. Without a GPU nothing is
measured. `--rehearse` goes through every check on a CPU with tiny shapes, so that the program is right before it first
runs on a GPU; its figures mean nothing.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # the folder of this file has a train.py, too
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_slm.errors import EXIT_FAILURE, DeviceError, run_program
from ds_slm.run import measure

ROOT = Path(__file__).resolve().parents[1]
RESULT = "result.json"
LEAST_S = 15
"""No check begins with less time left than this."""
REHEARSED_TIMES = 4
"""On a CPU a check's time limit is multiplied by this."""
REHEARSED_AT_ONCE = 2
"""Checks that a rehearsal runs at a time: nothing is timed, and most of a check is one thread's start."""


@dataclass(frozen=True)
class Check:
    """One of the checks of benchmarks/gpu_checks.py."""

    name: str
    most_s: int
    """The check is ended after this time."""


CHECKS = [
    Check("demo", 120),
    Check("380m", 150),
    Check("resume", 90),
    Check("380m-card", 100),
    Check("380m-sft", 80),
    Check("packed", 90),
    Check("slm-10m", 80),
    Check("gpt-s-1.4m", 80),
    Check("ant-10m", 80),
    Check("auto", 60),
]
"""The most valuable first: whether it trains; the promised speed; whether a resumed run is the same; then the rest."""


def run_check(check: Check, out: Path, limit_s: float, flags: list[str]) -> dict[str, Any]:
    """Run one check in its own process group; returns how it ended, how long it took, and its rows."""
    folder = out / check.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    command = [sys.executable, "-m", "benchmarks.gpu_checks", check.name, "--out", str(folder), *flags]
    begin_s = time.monotonic()
    with (out / f"{check.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=limit_s)
            ended = "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit_s:.0f} s"
        finally:
            _end_group(process)

    # What was measured before a failure counts.
    found = folder / RESULT
    rows = json.loads(found.read_text()) if found.exists() else []
    return {"ended": ended, "seconds": round(time.monotonic() - begin_s, 1), "rows": rows}


def run_all(
    checks: Sequence[Check], run: Callable[[Check], dict[str, Any]], at_once: int
) -> Iterator[tuple[Check, dict[str, Any]]]:
    """Run checks, `at_once` at a time; yields each with its result, in order."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from zip(checks, pool.map(run, checks), strict=True)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a check's process and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _end_at_once(number: int, _: FrameType | None) -> None:
    """End all checks and this process: measurements are already written, and `timeout` does not wait."""
    for started in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            started.kill()
    os._exit(128 + number)


def table(result: dict[str, Any]) -> Table:
    """A table with a row for each figure, and one for each check without figures."""
    grid = Table(title=f"{result['device']}, torch {result['torch']}, {result['date']}")
    for name in ("check", "what", "measured", "promised", "kept"):
        grid.add_column(name)

    for check in CHECKS:
        seen = result["checks"].get(check.name, {"ended": "not yet run", "rows": []})
        for row in seen["rows"]:
            kept = "-" if row["kept"] is None else "yes" if row["kept"] else "no"
            kept = "rehearsal" if result["rehearsal"] else kept
            grid.add_row(check.name, row["what"], row["measured"], row["promised"], kept)
        if seen["ended"] != "done":
            grid.add_row(check.name, "", seen["ended"], "", "-")
    return grid


def describe_machine(rehearsing: bool) -> dict[str, Any]:
    """Device, driver, versions and date, which go with every figure."""
    device = torch.device("cpu" if rehearsing else "cuda")
    found = {"device": measure.device_name(device), "torch": torch.__version__, "rehearsal": rehearsing}
    if not rehearsing and (program := shutil.which("nvidia-smi")):
        query = [program, "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found | {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "checks": {}}


def main() -> int:
    """Run the checks and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", "--cases", nargs="+", choices=names, default=names, help="these checks alone")
    parser.add_argument("--seconds", type=float, default=480, help="the time for all of them")
    parser.add_argument("--rounds", type=int, default=1, help="how often each speed is measured")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "gpu")
    parser.add_argument("--rehearse", action="store_true", help="every check on a CPU, with tiny shapes")
    args = parser.parse_args()

    if not (args.rehearse or torch.cuda.is_available()):
        raise DeviceError("no GPU: nothing measured. --rehearse goes through it on a CPU with tiny shapes.")

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result, end_s = describe_machine(args.rehearse), time.monotonic() + args.seconds
    flags = ["--rounds", str(args.rounds), *(["--rehearse"] if args.rehearse else [])]

    def run(check: Check) -> dict[str, Any]:
        left_s = end_s - time.monotonic()
        if left_s < LEAST_S:
            return {"ended": "no time left", "seconds": 0, "rows": []}
        limit_s = check.most_s * (REHEARSED_TIMES if args.rehearse else 1)
        return run_check(check, out, min(limit_s, left_s), flags)

    if args.rehearse:  # waiting threads spin, on the core of another check
        os.environ["OMP_NUM_THREADS"] = "1"
    checks = [check for check in CHECKS if check.name in args.only]
    for check, seen in run_all(checks, run, REHEARSED_AT_ONCE if args.rehearse else 1):
        # Write it at once, because the machine may be taken back at any moment.
        result["checks"][check.name] = seen
        (out / RESULT).write_text(json.dumps(result, indent=2) + "\n")
        print(f"{check.name}: {seen['ended']}, {seen['seconds']:.0f} s", flush=True)
        for row in seen["rows"]:
            print(f"  {row['what']}: {row['measured']} (promised: {row['promised'] or '-'})", flush=True)

    Console(width=130).print(table(result))
    print(f"written: {out / RESULT}; what each check said: {out}/NAME.log")
    is_right = all(seen["ended"] == "done" for seen in result["checks"].values())
    return 0 if is_right else EXIT_FAILURE


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    sys.exit(run_program(main))
