"""Helpers for tests that run whole programs: those of the benchmarks, and a `run` that forks from a warm process."""

import json
import subprocess
from pathlib import Path

from benchmarks import tiny_runs
from benchmarks.tiny_runs import (
    BIN,
    ROOT,
    TINY,
    deepspeed_command,
    environment,
    free_port,
    records,
    write_corpus,
    write_recipe,
)
from ds_slm.data.shards import prepared
from tests.support import warm

__all__ = [
    "BIN",
    "ROOT",
    "TINY",
    "deepspeed_command",
    "environment",
    "free_port",
    "records",
    "write_corpus",
    "write_recipe",
]

SHORT_EPOCH = 17
"""Documents of a corpus whose first epoch ends within the tiny recipe's step 7, and the second within step 13."""


def hide_change(shard: Path) -> None:
    """Let a shard pass for one that was found right as it is: bits that change by themselves leave no trace."""
    path = shard.parents[1] / prepared.STAMPS
    stamps = json.loads(path.read_text())
    name = str(shard.relative_to(path.parent))
    path.write_text(json.dumps({**stamps, name: prepared._stamp(shard, stamps[name][-1])}))


def run(command: list[str], cwd: Path, timeout_s: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """As `tiny_runs.run`; programs of the project are forked from a warm process."""
    if warm.can_run(command, environment(**extra)):
        return warm.run(command, cwd, environment(**extra), timeout_s)
    return tiny_runs.run(command, cwd, timeout_s, **extra)
