"""The network interface that ranks use: the one whose route leads to rank 0's host, unless the user names another.

gloo's own choice is the address of the host's name, which on many Debian hosts is 127.0.1.1: the ranks of several hosts
then never connect. NCCL takes the first interface it finds. Imports neither torch nor deepspeed.
"""

import getpass
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import MutableMapping, Sequence
from types import ModuleType

import psutil

from ds_slm.errors import DeviceError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
NCCL_FILES = ("/etc/nccl.conf", "~/.nccl.conf")


def reserve_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Create the environment variables that are set later, before there is a second thread.

    A process may crash if one thread reads the environment, as each look-up of a host's name does, while another makes
    it grow; changing the value of an existing variable is harmless. Call this once torch is imported: by then its
    OpenMP has read OMP_NUM_THREADS.
    """
    # These are chosen later; until then an empty value counts as unset. But even an empty variable hides nccl.conf.
    configured = any(os.path.exists(os.path.expanduser(file)) for file in NCCL_FILES)
    for name in (GLOO, "OMP_NUM_THREADS", *([] if configured else [NCCL])):
        environ.setdefault(name, "")

    # torch's compiler and DeepSpeed themselves would set these values.
    environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}"))
    environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def choose_accelerator(build: ModuleType, environ: MutableMapping[str, str] = os.environ) -> None:
    """Name the CPU to DeepSpeed if torch is built for CPUs only: DeepSpeed would search, and warn that it found none.

    Args:
        build: torch.version.
        environ: where the variable goes.
    """
    if not (build.cuda or build.hip):
        environ.setdefault("DS_ACCELERATOR", "cpu")


def _user() -> str:
    try:
        return re.sub(r"\W", "_", getpass.getuser())
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid_{os.getuid()}"


def address_towards(host: str, port: int) -> str:
    """This host's own address on the route to another. Sends nothing. Raises OSError if there is no route."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]).partition("%")[0]


def interface_of(address: str) -> str | None:
    """The interface that has an address; None if none does."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def is_loopback(address: str) -> bool:
    """Whether an address means its own host."""
    return ipaddress.ip_address(address).is_loopback


def refuse_unknown_interfaces(environ: MutableMapping[str, str] = os.environ) -> None:
    """Raise DeviceError if the user names an interface that this host does not have."""
    there = list(psutil.net_if_addrs())
    problems = []

    # gloo takes whole names.
    for name in environ.get(GLOO, "").split(","):
        if name and name not in there:
            problems.append(f"{GLOO}={environ[GLOO]}: this host has no interface {name!r}")

    # NCCL takes beginnings of names, whole names after `=`, and names to avoid after `^`.
    nccl = environ.get(NCCL, "")
    names = [name for name in nccl.removeprefix("=").split(",") if name]
    if names and not nccl.startswith("^"):
        exact = nccl.startswith("=")
        found = [name for name in names if any(one == name if exact else one.startswith(name) for one in there)]
        if not found:
            problems.append(f"{NCCL}={nccl}: this host has no such interface")

    if problems:
        way_out = "leave the variable out, and the interface that leads to rank 0's host is taken"
        raise DeviceError([f"{problem}; there are {', '.join(there)}. Name one, or {way_out}." for problem in problems])


def own_address(master: str, port: int) -> str | None:
    """The address that a rank sends to the others: its own on the route to rank 0's host; None without a route."""
    try:
        return address_towards(master, port)
    except OSError:
        return None


def choose(
    addresses: Sequence[str | None], rank: int, is_cuda: bool, environ: MutableMapping[str, str] = os.environ
) -> str | None:
    """Set the variables of gloo and NCCL that are not set, so that both take the interface to the other hosts.

    Args:
        addresses: `own_address` of every rank.
        rank: this rank.
        is_cuda: whether NCCL is used.
        environ: where the variables go.

    Returns:
        gloo's interface, chosen here or by the user; None if no route shows one.
    """
    mine = addresses[rank]
    others = [one for one in addresses if one is not None and not is_loopback(one)]
    if mine is not None and is_loopback(mine) and others:
        # On its own host rank 0's name means loopback: take the route to any other host instead.
        mine = own_address(others[0], 1)
    found = interface_of(mine) if mine is not None else None
    if found is not None:
        environ[GLOO] = environ.get(GLOO) or found
        if is_cuda and others:
            environ[NCCL] = environ.get(NCCL) or f"={found}"
    return environ.get(GLOO) or None
