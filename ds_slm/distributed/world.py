"""Which rank this process is, from its environment: checked once, before anything waits for the others.

Launchers that start several processes set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A process without
RANK was started by hand and trains alone on one device: other variables (a scheduler's, MPI's, or an earlier launch's)
are ignored. Imports neither torch nor deepspeed.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_slm.errors import DeviceError

PR_SET_PDEATHSIG = 1
"""The constant in Linux's prctl.h."""
OWN_LAUNCHER = "ds_slm.distributed.local_ranks"
LAUNCHER_MODULES = ("deepspeed.launcher.launch", OWN_LAUNCHER)
"""The programs that start the ranks of a host, as modules."""
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LEFTOVERS = (
    *("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "ROLE_RANK", "CROSS_RANK", "CROSS_SIZE"),
)
"""Variables that a launch leaves in an environment; torch and DeepSpeed would read them."""
LEFTOVER_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "TORCHELASTIC_")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
"""Variables that say how many processes somebody wanted to start."""
WAY_OUT = "launch with `deepspeed`, which sets them all, or unset RANK to train on one device."


@dataclass(frozen=True)
class World:
    """This process among all processes of a launch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    local_size: int | None = None
    """Ranks on this host; None if the launcher does not say it."""

    @property
    def on_one_host(self) -> bool:
        """Whether a launcher on this host ends the other ranks when one has failed."""
        return self.size == (self.local_size or 1)

    @property
    def master(self) -> str:
        """The address at which rank 0 listens."""
        return f"{self.address}:{self.port}"


def launcher() -> psutil.Process | None:
    """The launcher on this host, if it started this process; the ranks of a host share it."""
    with contextlib.suppress(psutil.Error):  # it may be ending
        parent = psutil.Process().parent()
        return parent if parent and set(LAUNCHER_MODULES) & set(parent.cmdline()) else None
    return None


def signal_at_launchers_death(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the process that started this one dies: a rank alone would train on, unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def die_with_torchrun() -> None:
    """End this rank at once with torchrun's agent, if one started it: the other hosts' agents go on without them."""
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_launchers_death(signal.SIGKILL)


def rank() -> int:
    """The rank of this process; 0 if it was started alone."""
    return int(os.environ.get("RANK", "0"))


def first_on_host() -> bool:
    """Whether this process is the first rank of its host; may be asked before anything is checked."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def host_id() -> str:
    """This host's name, with something that distinguishes hosts of the same name."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot_id.read_text().strip() if boot_id.exists() else ''}"


def read(environ: MutableMapping[str, str] = os.environ) -> World:
    """The world of this process.

    Args:
        environ: if RANK is missing, it gets what torch and DeepSpeed expect of one device, and loses what they would
            misunderstand.

    Raises:
        DeviceError: with every variable that is missing or makes no sense.
    """
    if "RANK" not in environ:
        return _alone(environ)

    # A launch of one rank may leave out LOCAL_RANK, MASTER_PORT and MASTER_ADDR.
    problems: list[str] = []
    rank = _number(environ, "RANK", 0, problems)
    size = _number(environ, "WORLD_SIZE", 1, problems)
    alone = environ.get("WORLD_SIZE") == "1"
    local_rank = _number(environ, "LOCAL_RANK", 0, problems, "0" if alone else None)
    port = _number(environ, "MASTER_PORT", 1, problems, str(free_port()) if alone else None)

    # Numbers that are valid one by one must also fit together.
    if not problems:
        if rank >= size:
            problems.append(f"RANK={rank}, expected less than WORLD_SIZE={size}")
        if local_rank > rank:
            problems.append(f"LOCAL_RANK={local_rank}, expected at most RANK={rank}")
        if port > 65535:
            problems.append(f"MASTER_PORT={port}, expected a port of at most 65535")

    if environ.get("LOCAL_SIZE") and _local_size(environ) is None:
        problems.append(f"LOCAL_SIZE={environ['LOCAL_SIZE']!r}, expected a whole number")
    if not environ.get("MASTER_ADDR") and not alone:
        problems.append("MASTER_ADDR is not set, expected the address of rank 0's host")

    if problems:
        raise DeviceError([*(f"{problem}." for problem in problems), f"The environment is no launch's: {WAY_OUT}"])

    world = World(rank, size, local_rank, environ.get("MASTER_ADDR") or "127.0.0.1", port, _local_size(environ))
    return _export(world, environ)


def ignored(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """The warning for an environment that suggests several processes but lacks RANK; call it before `read`."""
    named = [f"{name}={environ[name]}" for name in SIZES if environ.get(name, "1") not in ("", "1")]
    if "RANK" in environ or not named:
        return None
    return (
        f"note: {', '.join(named)}: ignored, for without RANK a process trains alone on one device; launch several "
        "with `deepspeed`."
    )


def _alone(environ: MutableMapping[str, str]) -> World:
    for name in list(environ):
        if name in LEFTOVERS or name.startswith(LEFTOVER_PREFIXES):
            del environ[name]
    return _export(World(port=free_port(), local_size=1), environ)


def _export(world: World, environ: MutableMapping[str, str]) -> World:
    """Complete the variables, so that no library looks for others."""
    values = world.rank, world.size, world.local_rank, world.address, world.port
    environ.update({name: str(value) for name, value in zip(LAUNCH_VARIABLES, values, strict=True)})
    return world


def _number(
    environ: MutableMapping[str, str], name: str, least: int, problems: list[str], default: str | None = None
) -> int:
    text = environ.get(name) or default
    if text is None:
        problems.append(f"{name} is not set, expected a whole number, as RANK is set")
    elif not (text.isascii() and text.isdecimal() and int(text) >= least):
        problems.append(f"{name}={text!r}, expected a whole number of at least {least}")
    else:
        return int(text)
    return least


def _local_size(environ: MutableMapping[str, str]) -> int | None:
    text = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or ""
    return int(text) if text.isascii() and text.isdecimal() else None


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
