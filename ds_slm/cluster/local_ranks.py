"""The ranks of a launch on this machine's CPU, started as DeepSpeed's launcher starts them.

    ds-slm train --> python -u -m ds_slm.cluster.local_ranks RANKS PORT SCRIPT [FLAGS] --> a process for each rank

DeepSpeed's launcher imports PyTorch before it starts anything, and each rank imports it again; this program does not.
The first rank that fails ends the others, and its exit code is the launch's. SIGTERM and SIGINT end all.
"""

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import psutil

from ds_slm.errors import EXIT_FAILURE, EXIT_OK

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OWN_END_S = 1.0
"""Once a rank has failed, the others have this time to end by themselves and say why."""
SAVE_S = 30.0
"""Time between SIGTERM and SIGKILL, as with DeepSpeed's launcher: ranks save meanwhile."""


class _Told(BaseException):
    """A signal came."""


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that tell a process which rank it is."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    hosts = {"CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in (here | hosts).items()}


def run(ranks: int, port: int, command: list[str]) -> int:
    """Run a Python script as every rank; returns the exit code of the first rank that failed, 1 after a signal."""
    started = [
        subprocess.Popen([sys.executable, "-u", *command], env=os.environ | variables(rank, ranks, port))
        for rank in range(ranks)
    ]

    def tell(number: int, frame: Any) -> None:
        _ignore_signals()
        raise _Told

    for number in SIGNALS:
        signal.signal(number, tell)
    try:
        code = _first_failure(started)
        if code != EXIT_OK:
            psutil.wait_procs(_processes(started), timeout=OWN_END_S)
    except _Told:
        code = EXIT_FAILURE

    _ignore_signals()
    _end(_processes(started))
    return code if code >= 0 else EXIT_FAILURE


def _ignore_signals() -> None:
    """Told again, this process still waits for ranks that save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for the first rank that fails; its exit code, negative if a signal ended it. 0 if none fails."""
    while ranks:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for rank in ranks:
            if code := rank.poll():
                return code
        ranks = [rank for rank in ranks if rank.returncode is None]
    return EXIT_OK


def _processes(ranks: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The ranks that still run, and what they have started."""
    found = []
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(rank.pid)
                found += [process, *process.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=SAVE_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
