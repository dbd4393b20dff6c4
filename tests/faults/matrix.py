"""Helpers of the fault matrix: a tiny run on two ranks, broken somewhere, resumed, and held against one left alone."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ds_slm.checkpoint import files as checkpoint_files
from tests.support import runs

STEPS, SAVE_EVERY = 30, 3
RECIPE = (
    runs.TINY.replace('name = "adamw"', 'name = "adamw8bit"')
    .replace("steps = 20", f"steps = {STEPS}")
    .replace('precision = "fp32"', 'precision = "bf16"')
    .replace("save_every_steps = 10", f"save_every_steps = {SAVE_EVERY}")
    .replace("eval_every_steps = 10", "eval_every_steps = 6")
)
"""8-bit states in bf16; saved at every third step, evaluated at every sixth; four epochs end; a filler row a step."""


def command(folder: Path, name: str, *flags: object) -> list[str]:
    """The launch of one run; two micro-batches a step."""
    arguments = ("--recipe", folder / "tiny.toml", "--run-dir", folder / name, "--data-root", folder / "data")
    return runs.deepspeed_command(2, *arguments, "--micro-batch", 2, *flags)


def launch(folder: Path, name: str, *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever that is."""
    return runs.run(command(folder, name, *flags), cwd=folder, timeout_s=120, **environment)


def begin(folder: Path) -> None:
    """The recipe, and `whole`: the run nobody disturbs."""
    runs.write_corpus(folder / "corpus.jsonl", documents=runs.SHORT_EPOCH)
    runs.write_recipe(folder, text=RECIPE)
    done = launch(folder, "whole")
    assert done.returncode == 0, done.stdout + done.stderr


def resumed_end(folder: Path, name: str) -> dict[str, Any]:
    """Resume, and how the run ended."""
    done = launch(folder, name)
    return end_of(folder / name) if done.returncode == 0 else {"failed": done.stdout + done.stderr}


def end_of(run: Path) -> dict[str, Any]:
    """Of a run's end all that must be the same: steps, ledger, every tensor of the last checkpoint, what names it."""
    kept = ("step", "loss", "grad_norm", "ledger")
    checkpoints = run / "checkpoints"
    return {
        "steps": [[one[key] for key in kept] for one in runs.records(run)],
        "tensors": tensors(run),
        "done": (run / "done.json").is_file(),
        **{pointer: (checkpoints / pointer).read_text() for pointer in ("latest", "best")},
        "unfinished": [path.name for path in checkpoints.glob(".*.tmp-*")],
    }


def tensors(run: Path) -> dict[str, str]:
    """File -> sha256 of the last checkpoint's tensors; it is whole."""
    checkpoint = checkpoint_files.folder_of_step(run, STEPS)
    assert checkpoint_files.verify(checkpoint) == []
    files = json.loads((checkpoint / checkpoint_files.MANIFEST).read_text())["files"]
    return {name: one["sha256"] for name, one in files.items() if name.endswith(".safetensors")}


def problems_by_step(run: Path) -> dict[int, list[str]]:
    """Each checkpoint that has its name, and what is wrong with it."""
    folders = {step: checkpoint_files.folder_of_step(run, step) for step in checkpoint_files.steps(run)}
    return {step: checkpoint_files.verify(folder) for step, folder in folders.items()}


def kill(folder: Path, name: str, who: str, after_s: float, begun: str = "metrics.jsonl") -> None:
    """Start a run and send SIGKILL to `rank`, `all` or `launcher`, `after_s` seconds after a file of it has content."""
    environment = runs.environment()
    with subprocess.Popen(
        command(folder, name), cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as runner:
        sign = folder / name / begun
        wait_for(lambda: sign.is_file() and sign.stat().st_size)
        time.sleep(after_s)
        assert not (folder / name / "done.json").exists(), "it was finished before it was killed"
        try:
            everyone = psutil.Process(runner.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            everyone = []
        ranks = [one for one in everyone if _is_rank(one)]
        chosen = {"rank": ranks[-1:], "all": [*everyone], "launcher": [one for one in everyone if one not in ranks][:1]}
        for process in chosen[who]:
            _send(process, signal.SIGKILL)
        if who == "all":
            runner.kill()
        runner.wait(timeout=90)
        psutil.wait_procs(everyone, timeout=90)
        assert not [one for one in everyone if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def below(pid: int, word: str) -> list[psutil.Process]:
    """The processes below one whose command line holds a word."""

    def has_word(process: psutil.Process) -> bool:
        try:
            return any(word in part for part in process.cmdline())
        except psutil.NoSuchProcess:
            return False

    try:
        return [one for one in psutil.Process(pid).children(recursive=True) if has_word(one)]
    except psutil.NoSuchProcess:
        return []


def wait_for(sign: Callable[[], object], timeout_s: float = 90) -> None:
    """Until a sign is true, looked at a hundred times a second."""
    deadline = time.monotonic() + timeout_s
    while not (seen := sign()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("pretrain.py") for part in process.cmdline()) and "--local_rank" in " ".join(
            process.cmdline()
        )
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def instants(seed: int, count: int) -> list[tuple[str, float]]:
    """Who is killed, and how long after the first record: drawn from a seed."""
    rng = random.Random(seed)
    return [(rng.choice(["rank", "all", "launcher"]), round(rng.uniform(0, 1.0), 3)) for _ in range(count)]
