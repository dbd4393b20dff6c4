"""The ranks of a launch on this machine's CPU, started as DeepSpeed's launcher starts them.

    ds-slm train --> python -u -m ds_slm.distributed.local_ranks RANKS PORT SCRIPT [FLAGS] --> a process for each rank

DeepSpeed's launcher imports PyTorch before it starts anything, and each rank imports it again; this program does not.
The first rank that fails ends the others, and its exit code is the launch's. SIGTERM, SIGINT and the death of the
process that started this one end all ranks.

Known gap: where the kernel is not Linux, nothing notices that a process above has died.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from ds_slm.distributed.store import wait_until
from ds_slm.distributed.world import OWN_LAUNCHER, signal_at_launchers_death
from ds_slm.errors import EXIT_FAILURE, EXIT_OK, DeviceError, run_program

LOOK_EVERY_S = 0.05
OWN_END_S = 1.0
"""Once a rank has failed, the others have this time to end by themselves and say why."""
SAVE_S = 30.0
"""Time between SIGTERM and SIGKILL, as with DeepSpeed's launcher: ranks save meanwhile."""

Ranks = list[subprocess.Popen[bytes]]


def command(script: Path, arguments: Sequence[str], ranks: int, port: int) -> list[str]:
    """The command line of a launch; `port` is rank 0's."""
    program = [sys.executable, "-u", "-P", "-m", OWN_LAUNCHER]
    return [*program, str(ranks), str(port), str(script), *arguments]


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that say which rank a process is."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    host = {"CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in (numbers | host).items()}


def run(ranks: int, port: int, script: Sequence[str]) -> int:
    """Run a script as every rank; returns the exit code of the first rank that failed, 1 after a signal.

    Raises:
        DeviceError: a process could not be started.
    """
    # From here on signals are only noted; each loop below looks for them.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    parent = os.getppid()
    signal_at_launchers_death(signal.SIGTERM)
    if os.getppid() != parent:
        return EXIT_FAILURE

    started: Ranks = []
    try:
        for rank in range(ranks):
            if not signals:
                started.append(_start(script, rank_variables(rank, ranks, port)))
        return _first_failure(started, signals)
    except OSError as error:
        raise DeviceError(f"rank {len(started)} of {ranks} cannot be started: {error}.") from error
    finally:
        _end(started, at_once=bool(signals))


def _start(script: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank, which gets SIGTERM if this process dies."""
    # This process has no threads, so that code of ours may run between fork and exec.
    dies_with_this = partial(signal_at_launchers_death, signal.SIGTERM)
    return subprocess.Popen([sys.executable, "-u", *script], env=os.environ | variables, preexec_fn=dies_with_this)


def _first_failure(ranks: Ranks, signals: list[int]) -> int:
    """Wait until a rank fails, all have ended, or a signal comes; the exit code."""
    while not signals:
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                hint = ", most often because no memory was left: `dmesg` says so" if code == -signal.SIGKILL else ""
                print(f"error: rank {rank} was ended by signal {-code}{hint}.", file=sys.stderr, flush=True)
                return EXIT_FAILURE
            if code:
                return code
        if None not in codes:
            return EXIT_OK
        time.sleep(LOOK_EVERY_S)
    return EXIT_FAILURE


def _end(ranks: Ranks, at_once: bool) -> None:
    """End the ranks that still run, and whatever they have started."""
    processes = _running(ranks)
    if not at_once:
        _await_end(ranks, OWN_END_S)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _await_end(ranks, SAVE_S)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _await_end(ranks: Ranks, limit_s: float) -> None:
    wait_until(lambda: all(rank.poll() is not None for rank in ranks), limit_s, LOOK_EVERY_S)


def _running(ranks: Ranks) -> list[psutil.Process]:
    """Ranks that have not ended, and all processes below them."""
    found = []
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(rank.pid)
                found += [process, *process.children(recursive=True)]
    return found


if __name__ == "__main__":
    sys.exit(run_program(lambda: run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
