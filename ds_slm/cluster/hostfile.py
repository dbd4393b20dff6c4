"""The hosts on which a run is launched: read strictly, and checked against what DeepSpeed's launcher really did.

    hostfile ──parse_hostfile──► [Host(name, slots), ...]

    deepspeed --hostfile H script.py      the runner: consumes --hostfile, the script never sees it
      └─ python -m deepspeed.launcher.launch --world_info=...      the launcher: one per host
           └─ python script.py            a rank: refuse_missing_hostfile() reads both command lines above it

DeepSpeed trains on the wrong machine in two cases without failing: if a hostfile does not exist, it only warns; if a
hostfile (or a filter) leaves a single host, its ranks start on the machine where the command was typed. Both are
refused here. The grammar of a line, and of the runner's command line, comes from `deepspeed/launcher/runner.py`
(DeepSpeed 0.19), except that DeepSpeed ignores whatever follows `slots=N` and accepts `slots=0`; we do not.

Known gaps: in a launch over ssh the runner is not an ancestor of any rank; it needs no check, because it has found
its hostfile. A host known only by an ssh alias, without an address, counts as another machine. Imports neither torch
nor deepspeed.
"""

import argparse
import base64
import difflib
import ipaddress
import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from ds_slm.errors import HostfileError

_EXPECTED = "expected `host slots=N`"
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]+)(\s+#.*)?")
# One name, address or user@name. Neither a pdsh range (`node[1-4]`), which DeepSpeed counts as one host, nor an option.
_SSH_PORT = 22
_MOST_SLOTS = 64
"""A larger number after a host is a port, not a number of devices."""
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.%@-]*")

_RUNNER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds"}
_RUNNER_MODULE = "deepspeed.launcher.runner"
_LAUNCHER_MODULE = "deepspeed.launcher.launch"
# Where the runner looks without --hostfile.
_DEFAULT_HOSTFILE = "/job/hostfile"
# The runner's options, to distinguish them from the options of the script after it.
RUNNER_VALUE_OPTIONS = (
    ("-i", "--include"),
    ("-e", "--exclude"),
    ("--num_nodes",),
    ("--num_gpus", "--num_accelerators"),
    ("--master_port",),
    ("--master_addr",),
    ("--node_rank",),
    ("--launcher",),
    ("--launcher_args",),
    ("--enable_each_rank_log",),
    ("--autotuning",),
    ("--bind_core_list",),
    ("--ssh_port",),
    ("--venv_script",),
    ("--log_level",),
    ("-H", "--hostfile"),
)
RUNNER_FLAGS = (
    ("--module",),
    ("--no_python",),
    ("--no_local_rank",),
    ("--no_ssh",),
    ("--no_ssh_check",),
    ("--force_multi",),
    ("--save_pid",),
    ("--bind_cores_to_rank",),
    ("-q", "--quiet"),
)
# Python's own options that take a separate value, before the program.
_PYTHON_VALUE_OPTIONS = {"-W", "-X", "--check-hash-based-pycs"}


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    """What ssh is given: a name, an address, or user@name."""
    slots: int
    """Ranks on this host, at least 1."""


def parse_hostfile(path: str | os.PathLike[str]) -> list[Host]:
    """The hosts of a hostfile, in its order.

    Raises:
        HostfileError: with every problem of the file at once: missing or unreadable, malformed lines, a host named
            twice, no slots, no hosts.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(_missing(path))
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise HostfileError(f"Hostfile {path} cannot be read: {error.strerror}; make it readable.") from error

    hosts: dict[str, Host] = {}
    first_line_of: dict[str, tuple[int, str]] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue

        name = text.split()[0]
        key = name.lower()  # names of hosts ignore case
        if problem := _line_problem(text, first_line_of.get(key)):
            problems.append(f"Hostfile {path}, line {number}: {problem}")
        else:
            hosts[name] = Host(name, _slots(text))
        first_line_of.setdefault(key, (number, text))

    if not hosts and not problems:
        problems.append(
            f"Hostfile {path} names no host: {_EXPECTED} on at least one line that is no comment; add one, "
            "or leave out --hostfile to train on this machine."
        )
    if problems:
        raise HostfileError(problems)
    return list(hosts.values())


def launcher_hostfile() -> Path | None:
    """The hostfile of the `deepspeed` command above this process, resolved against that command's working folder.

    None if no ancestor is such a command (a plain `python` run, a rank started over ssh), or if the flag is missing.
    Does not check whether the file exists.
    """
    return _read_launch().hostfile


def refuse_missing_hostfile() -> None:
    """Refuse a launch that DeepSpeed silently started on other machines than its hostfile names.

    Raises:
        HostfileError: the hostfile given does not exist, is malformed, or leaves a single host that is not this one.
    """
    launch = _read_launch()
    if launch.hostfile is not None:
        parse_hostfile(launch.hostfile)
    hosts = launch.local_hosts
    if len(hosts) == 1 and not launch.without_ssh and not is_this_machine(hosts[0]):
        raise HostfileError(_one_remote_host(hosts[0], launch.hostfile))


@dataclass(frozen=True)
class _Launch:
    """What the command lines above this process say."""

    hostfile: Path | None = None
    """The runner's --hostfile, absolute."""
    local_hosts: tuple[str, ...] = ()
    """The hosts left after the runner's filters, if the runner started the ranks on its own machine."""
    without_ssh: bool = False
    """--no_ssh: each host is launched by itself, so a local start was asked for."""


def _read_launch() -> _Launch:
    """Walk up from this process to the nearest `deepspeed` runner."""
    local_hosts: tuple[str, ...] = ()
    for process in _ancestors():
        try:
            program, arguments = _program(process.cmdline())
        except psutil.Error:
            continue

        # On the way up the launcher comes first: it is the runner's child.
        if _is_launcher(program):
            local_hosts = _world_hosts(arguments)
        elif _is_runner(program):
            options = _runner_options(arguments)
            if options is None:
                return _Launch()
            hostfile = None if options.hostfile is None else _working_folder(process) / options.hostfile
            return _Launch(hostfile, local_hosts, options.no_ssh)
    return _Launch()


def _ancestors() -> list[psutil.Process]:
    try:
        return psutil.Process().parents()
    except psutil.Error:
        return []


def _working_folder(process: psutil.Process) -> Path:
    try:
        return Path(process.cwd())
    except psutil.Error:
        return Path.cwd()


def _program(argv: Sequence[str]) -> tuple[str, list[str]]:
    """What a command line runs (a script's path, or the name of a module after `-m`), and its arguments."""
    if argv and Path(argv[0]).name in _RUNNER_PROGRAMS:
        return argv[0], list(argv[1:])
    index = 1
    while index < len(argv):
        argument = argv[index]
        if argument == "-m" and index + 1 < len(argv):
            return argv[index + 1], list(argv[index + 2 :])
        if argument == "-c":
            break
        if not argument.startswith("-"):
            return argument, list(argv[index + 1 :])
        index += 2 if argument in _PYTHON_VALUE_OPTIONS else 1
    return "", []


def _is_runner(program: str) -> bool:
    return Path(program).name in _RUNNER_PROGRAMS or _is_module(program, _RUNNER_MODULE)


def _is_launcher(program: str) -> bool:
    return _is_module(program, _LAUNCHER_MODULE)


def _is_module(program: str, module: str) -> bool:
    return program == module or program.endswith("/" + module.replace(".", "/") + ".py")


class _QuietParser(argparse.ArgumentParser):
    """Raises when argparse would exit; takes abbreviations like DeepSpeed's parser."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _runner_options(arguments: Sequence[str]) -> argparse.Namespace | None:
    """The runner's own options (`hostfile`, `no_ssh`, ...), or None if the runner would refuse the command line."""
    parser = _QuietParser(add_help=False)
    for names in RUNNER_VALUE_OPTIONS:
        parser.add_argument(*names)
    for names in RUNNER_FLAGS:
        parser.add_argument(*names, action="store_true")
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    try:
        return parser.parse_known_args(list(arguments))[0]
    except ValueError:
        return None


def _world_hosts(arguments: Sequence[str]) -> tuple[str, ...]:
    """The hosts in the launcher's `--world_info`: base64 of {host: [slot, ...]}."""
    for argument in arguments:
        if argument.startswith("--world_info="):
            try:
                return tuple(json.loads(base64.urlsafe_b64decode(argument.partition("=")[2])))
            except ValueError:
                return ()
    return ()


def is_this_machine(host: str) -> bool:
    """Whether a hostfile's name means the machine of this process."""
    name = host.rpartition("@")[2].lower()
    own_name = socket.gethostname().lower()
    if name in {"localhost", own_name, own_name.partition(".")[0]}:
        return True
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    own_addresses = {address.address for entries in psutil.net_if_addrs().values() for address in entries}
    return any(address.startswith("127.") or address == "::1" or address in own_addresses for address in addresses)


def _slots(text: str) -> int:
    match = _LINE.fullmatch(text)
    return int(match["slots"]) if match else 0


def _line_problem(text: str, first: tuple[int, str] | None) -> str | None:
    """What is wrong with a line that is not a comment: got, expected, the way out; None if it is right.

    Args:
        text: the line.
        first: number and text of the earlier line that named this host.
    """
    name = text.split()[0]
    host, advice = _host_meant(name), _advice(text)

    if _LINE.fullmatch(text) is None:
        return f"got `{text}`, {_EXPECTED} with no spaces around `=` and nothing behind N; write `{advice}`, say."
    if host != name:
        return (
            f"got the host `{name}`, expected one host's name or address alone; write `{advice}`, each host on a line "
            "of its own. The port of ssh is --ssh_port, that of the ranks --master_port."
        )
    if _slots(text) == 0:
        return f"got `slots=0`, expected at least 1; write `{advice}`, say, or delete the line."
    if first is not None:
        number, earlier = first
        total = _slots(earlier) + _slots(text)
        return f"got `{name}` again, expected each host once; write `{name} slots={total}` on line {number} alone."
    return None


def _advice(text: str) -> str:
    """The line that was probably intended: its host, and the number of slots wherever it was written."""
    name, *rest = text.partition("#")[0].split() or ["node1"]
    host = _host_meant(name)
    behind = re.search(r"[0-9]+", " ".join(rest))
    within = re.fullmatch(re.escape(host) + r":([0-9]+)", name)
    number = int(behind[0] if behind else within[1] if within else 1)
    is_port = not behind and number == _SSH_PORT
    return f"{host} slots={number if 1 <= number <= _MOST_SLOTS and not is_port else 1}"


def _host_meant(name: str) -> str:
    """The host in a name, without a port, brackets or other parts that ssh does not take; `node1` if there is none."""
    bare = name.removeprefix("[").partition("]")[0] if name.startswith("[") else name
    if _is_ipv6(bare):
        return bare
    host = bare.partition(":")[0]
    return host if _HOST.fullmatch(host) else "node1"


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.rpartition("@")[2]).version == 6
    except ValueError:
        return False


def _missing(path: Path) -> str:
    """The problem of a hostfile that is not a file, with the nearest existing name."""
    beside = path.parent if path.parent.is_dir() else Path("hostfiles")
    names = [entry.name for entry in sorted(beside.iterdir()) if entry.is_file()] if beside.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {beside / near[0]}? " if near else ""
    return (
        f"Hostfile {path} is not a file: DeepSpeed only warns of that and trains on this machine alone. {hint}"
        "Give the path of a file with one `host slots=N` per line, or leave out --hostfile to train on this machine."
    )


def _one_remote_host(host: str, hostfile: Path | None) -> str:
    return (
        f"Hostfile {hostfile or _DEFAULT_HOSTFILE} leaves one host, `{host}`, which is not this machine "
        f"({socket.gethostname()}): "
        f"DeepSpeed starts the ranks of a single host where it was typed. Add --force_multi to train on {host}; "
        "to train here, leave out --hostfile, or name this machine `localhost` in it."
    )
