"""A launch as a child of this process: the same command line that a user would type.

    script, its flags, hosts --command--> deepspeed [DeepSpeed's flags] script [the script's flags] --run--> exit code

The names of DeepSpeed's own flags (`--force_multi`, `--master_port N`) distinguish them from the script's.
If this machine has no CUDA device and no hostfile names others, the ranks run on its CPU and share its cores.

Known gaps: nothing is restarted, and a run that hangs is waited for; supervise.py does better.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO

import psutil

from ds_slm.cluster.hostfile import RUNNER_FLAGS, RUNNER_VALUE_OPTIONS, parse_hostfile
from ds_slm.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError

RUNNER = {
    **{name: True for names in RUNNER_VALUE_OPTIONS for name in names},
    **{name: False for names in RUNNER_FLAGS for name in names},
}
"""Names of DeepSpeed's own flags -> whether they take a value."""
_LAUNCHER_LINE = re.compile(rb"(\S+: )?\[[\d-]+ [\d:,]+\] \[(DEBUG|INFO|WARNING)\] \[\w+\.py:\d+:\w+\]")
"""A line of the launcher's log, after the name of a host if pdsh brings it."""


def split(arguments: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """The tokens of some flags, with their values, and all other tokens; both as they were typed.

    argparse says what a flag's value is, but not which tokens it was made of.

    Args:
        arguments: a command line that argparse has accepted.
        takes_value: the names of the flags; whether one takes a value, which is the next token, or stands after '='.
    """
    taken: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, equals, _ = argument.partition("=")
        tokens = [argument]
        if takes_value.get(name) and not equals:
            tokens += islice(left, 1)  # nothing, if it is the last token
        (taken if name in takes_value else rest).extend(tokens)
    return taken, rest


def command(
    script: Path,
    arguments: Sequence[str],
    hostfile: Path | None = None,
    devices: int | None = None,
    launcher: Sequence[str] = (),
) -> list[str]:
    """The command line of a launch.

    Args:
        script: the script that every rank runs.
        arguments: its flags.
        hostfile: the hosts; None for this machine alone.
        devices: ranks on this machine; None for one on each device.
        launcher: further flags of DeepSpeed.

    Raises:
        ConfigError: there is both a hostfile and a number of devices.
        HostfileError: the hostfile is missing or malformed.
    """
    if hostfile is not None and devices is not None:
        raise ConfigError("--hostfile already says how many devices each host has: leave out --devices.")
    where = []
    if hostfile is not None:
        parse_hostfile(hostfile)
        where = ["--hostfile", str(hostfile)]
    elif devices is not None:
        where = ["--num_accelerators", str(devices)]
    return ["deepspeed", *where, *launcher, str(script), *arguments]


def environment(inherited: Mapping[str, str], cpu_ranks: int | None) -> dict[str, str]:
    """The environment of a launch: this interpreter's programs first; `cpu_ranks` is None if it has GPUs."""
    found = {**inherited, "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])}
    if cpu_ranks:
        found["DS_ACCELERATOR"] = "cpu"
        found.setdefault("OMP_NUM_THREADS", str(max(own_cores() // cpu_ranks, 1)))
    return found


def cuda_devices() -> int:
    """GPUs that torch shows here. A torch built for CPUs only is not asked, because its import takes seconds."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count()


def own_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
    hold_back: bool = False,
) -> int:
    """Run a launch to its end; returns its exit code, 1 if a signal ended it, 130 if a signal was sent to us.

    What it prints goes to `stdout` and `stderr`, or where this process's own output goes. With `hold_back`, log lines
    of DeepSpeed's launcher are shown only if the launch fails.

    SIGTERM and SIGINT are passed on to the launch, as SIGTERM; a rank that also gets one from a terminal obeys the
    first.

    Raises:
        ConfigError: the program does not exist.
    """
    program = shutil.which(command[0], path=environ.get("PATH"))
    if program is None:
        raise ConfigError(f"there is no {command[0]!r} on the PATH: install the project with `make setup`.")

    # Pass signals on to the launch while it runs; one that comes before it runs waits for it.
    child: subprocess.Popen[bytes] | None = None
    signals: list[int] = []
    ending: list[psutil.Process] = []

    def pass_on(number: int, frame: Any) -> None:
        signals.append(number)
        if child is not None:
            ending.extend(_terminate(child.pid))

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    pipe = subprocess.PIPE if hold_back else None
    child = subprocess.Popen([program, *command[1:]], env=environ, stdout=pipe or stdout, stderr=pipe or stderr)
    if signals and not ending:
        ending.extend(_terminate(child.pid))

    # With `hold_back` the ranks' lines are shown at once, and the launcher's own are kept.
    held: list[bytes] = []
    copiers = [
        threading.Thread(target=_copy_lines, args=(source, target, held), daemon=True)
        for source, target in ((child.stdout, stdout or sys.stdout), (child.stderr, stderr or sys.stderr))
        if source is not None
    ]
    for copier in copiers:
        copier.start()

    try:
        code = child.wait()
        psutil.wait_procs(ending)  # the runner dies at once, but its ranks save first
        for copier in copiers:
            copier.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    # The launch failed by itself: the lines that were held back may say why.
    if code not in (0, EXIT_STOPPED) and held and not ending:
        print("what DeepSpeed's launcher said:", file=sys.stderr)
        sys.stderr.write(b"".join(held).decode(errors="replace"))

    if code and ending and code != EXIT_STOPPED:
        return EXIT_INTERRUPTED
    return code if code >= 0 else EXIT_FAILURE


def _copy_lines(source: IO[bytes], target: TextIO, held: list[bytes]) -> None:
    """Copy line by line; lines of DeepSpeed's launcher that are not errors are held back."""
    with source:
        for line in source:
            if _LAUNCHER_LINE.match(line):
                held.append(line)
            else:
                target.write(line.decode(errors="replace"))
                target.flush()


def _terminate(pid: int) -> list[psutil.Process]:
    """End a launch; returns all its processes on this machine.

    On one host SIGTERM ends DeepSpeed's runner, but does not reach the launcher below it, which ends the ranks.
    """
    try:
        runner = psutil.Process(pid)
        launchers, everyone = runner.children(), runner.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in [*launchers, runner]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    return [runner, *everyone]
