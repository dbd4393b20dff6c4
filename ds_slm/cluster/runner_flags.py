"""DeepSpeed's own flags after `ds-slm train` and `ds-slm sft`: which are passed on, and what to use instead of others.

If a flag makes no sense, DeepSpeed's launcher ends with a traceback, or trains somewhere else. So each is checked
before the launch: its value, the hosts and slots it names, and whether every remaining host answers over ssh.
"""

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ds_slm.cluster import asking
from ds_slm.cluster.hostfile import Host, is_this_machine, parse_hostfile
from ds_slm.cluster.limits import positive
from ds_slm.errors import ConfigError, HostfileError

INSTEAD = {
    "--num_gpus": "use --devices N on this machine, or slots=N in the hostfile",
    "--num_accelerators": "use --devices N on this machine, or slots=N in the hostfile",
    "--node_rank": "type `deepspeed --no_ssh --node_rank N ... ds_slm/pretrain.py` on each host instead",
    "--no_ssh": "type `deepspeed --no_ssh --node_rank N ... ds_slm/pretrain.py` on each host instead",
    "--launcher": "hosts are reached with pdsh over ssh: leave it out",
    "--module": "the program is ds_slm's own: leave it out",
    "--no_python": "the program is ds_slm's own: leave it out",
    "--no_local_rank": "the program is ds_slm's own: leave it out",
    "--autotuning": "--micro-batch auto measures what fits",
    "--enable_each_rank_log": "every rank's output is in the run folder's logs/",
}
"""Flags of DeepSpeed's launcher that are not passed on, each with the way out."""


PROGRAMS = {"ssh": "openssh-client", "pdsh": "pdsh"}
"""The programs with which DeepSpeed starts other hosts, and their Debian packages."""
SUPERVISED = {"-i", "--include", "-e", "--exclude", "--num_nodes", "--ssh_port", "--no_ssh_check", "--venv_script"}
SUPERVISED |= {"-q", "--quiet"}
"""Flags that a supervised run takes, too."""


def add_runner_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that are passed on, for the help and the check of a command line."""
    group = parser.add_argument_group("DeepSpeed's launcher", "passed on to it")
    group.add_argument(
        "--master_port",
        type=_port,
        metavar="PORT",
        help="where the ranks meet (default 29500; on this machine alone a free one)",
    )
    group.add_argument("--master_addr", metavar="ADDRESS", help="rank 0's host, as the other hosts reach it")

    # Which hosts and slots.
    group.add_argument("-i", "--include", metavar="HOST[:SLOT,...]@...", help="only these hosts and slots")
    group.add_argument("-e", "--exclude", metavar="HOST[:SLOT,...]@...", help="all but these hosts and slots")
    group.add_argument("--num_nodes", type=positive, metavar="N", help="only the first N hosts of the hostfile")

    # How the hosts are reached.
    group.add_argument("--force_multi", action="store_true", help="start over ssh, even on a single host")
    group.add_argument("--ssh_port", type=_port, metavar="PORT", help="of every host's ssh")
    group.add_argument("--no_ssh_check", action="store_true", help="do not try ssh to every host first")
    group.add_argument("--launcher_args", metavar="ARGS", help="for pdsh")
    group.add_argument("--venv_script", metavar="FILE", help="sourced on every host before the launch")

    # What each rank computes on.
    group.add_argument("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    group.add_argument("--bind_core_list", metavar="LIST", help="the cores to share out")

    # What the launcher prints about itself.
    group.add_argument("--save_pid", action="store_true", help="leave the launcher's process id in /tmp")
    levels = ("debug", "info", "warning", "error", "critical")
    group.add_argument("--log_level", choices=levels, help="what the launcher says (default error)")
    group.add_argument("-q", "--quiet", action="store_true", help="as --log_level error, the default")


def refuse_others(arguments: Sequence[str]) -> None:
    """Raise ConfigError for every flag of DeepSpeed's launcher that is not passed on."""
    names = [argument.partition("=")[0] for argument in arguments]
    if problems := [f"{name} is not passed on to DeepSpeed: {INSTEAD[name]}." for name in names if name in INSTEAD]:
        raise ConfigError(problems)


def over_ssh(args: argparse.Namespace, hosts: Sequence[Host]) -> bool:
    """Whether DeepSpeed reaches the hosts over ssh, instead of starting the ranks on this machine itself."""
    return bool(hosts) and (len(hosts) > 1 or args.force_multi)


def to_single_host(args: argparse.Namespace, hosts: Sequence[Host], runner: Sequence[str]) -> list[str]:
    """The launcher's flags that start the ranks on a single host that is another machine.

    DeepSpeed alone would start its ranks on this machine, whatever host the hostfile names.
    """
    if len(hosts) != 1 or args.force_multi or is_this_machine(hosts[0].name):
        return [*runner]
    args.force_multi = True
    return [*runner, "--force_multi"]


def refuse_unusable(
    args: argparse.Namespace, hosts: Sequence[Host], environ: Mapping[str, str] = os.environ, cores: int | None = None
) -> None:
    """Raise ConfigError for flags that would give a traceback of DeepSpeed, or that it would silently ignore.

    Args:
        args: the command line.
        hosts: the chosen hosts; empty for this machine.
        environ: where programs are looked for.
        cores: replaces this machine's own number of cores.
    """
    problems, cores = [], cores or os.cpu_count() or 1
    here = not over_ssh(args, hosts)

    if args.venv_script is not None and here:
        problems.append(
            f"--venv_script {args.venv_script} is sourced on hosts that are reached over ssh, and this launch starts "
            "on this machine itself: activate the environment first, and leave the flag out."
        )

    if args.bind_core_list is not None:
        problems += _core_list_problems(args.bind_core_list, cores if here else None, args.bind_cores_to_rank)
    if args.bind_cores_to_rank and here and shutil.which("numactl", path=environ.get("PATH")) is None:
        problems.append("--bind_cores_to_rank needs the program 'numactl', which is not on the PATH: install numactl.")
    if args.bind_cores_to_rank and here and (args.devices or 1) > cores:
        problems.append(f"--bind_cores_to_rank: {args.devices} ranks need a core each, this machine has {cores}.")
    if args.bind_cores_to_rank and here and "KMP_AFFINITY" in environ:
        problems.append("--bind_cores_to_rank does not go with the environment's KMP_AFFINITY: unset it.")

    if problems:
        raise ConfigError(problems)


def _core_list_problems(text: str, cores: int | None, is_used: bool) -> list[str]:
    """What is wrong with a list of cores; `cores` is None if other machines' cores are meant."""
    if not is_used:
        return [f"--bind_core_list {text} has no effect without --bind_cores_to_rank: give both, or none."]
    pieces = [piece.split("-") for piece in text.split(",")]
    if not all(number.isascii() and number.isdecimal() for piece in pieces for number in piece):
        return [f"--bind_core_list {text}: expected numbers and ranges in ascending order, such as 0-3,8."]
    numbers = [int(number) for piece in pieces for number in dict.fromkeys(piece)]
    if any(len(piece) > 2 for piece in pieces) or sorted(set(numbers)) != numbers:
        return [f"--bind_core_list {text}: expected numbers and ranges in ascending order, such as 0-3,8."]
    if cores is not None and numbers[-1] >= cores:
        return [f"--bind_core_list {text}: this machine has cores 0 to {cores - 1}."]
    return []


def chosen_hosts(args: argparse.Namespace) -> list[Host]:
    """The hosts of the hostfile that --include, --exclude and --num_nodes leave; none without a hostfile.

    Raises:
        ConfigError: flags exclude each other, or need a hostfile.
        HostfileError: a hostfile, host or slot does not exist.
    """
    filters = [name for name in ("include", "exclude") if getattr(args, name) is not None]
    if len(filters) == 2 or (filters and args.num_nodes):
        raise ConfigError("--include, --exclude and --num_nodes each choose hosts: give one of them.")
    if args.hostfile is None:
        return _without_hostfile(args, filters)
    if args.devices is not None:
        raise ConfigError("--hostfile already says how many devices each host has: leave out --devices.")
    hosts = parse_hostfile(args.hostfile)
    if args.num_nodes and args.num_nodes > len(hosts):
        raise HostfileError(f"--num_nodes {args.num_nodes}: hostfile {args.hostfile} names {len(hosts)} hosts.")
    if not filters:
        return hosts[: args.num_nodes]
    return _filtered(hosts, filters[0], getattr(args, filters[0]), args.hostfile)


def _without_hostfile(args: argparse.Namespace, filters: list[str]) -> list[Host]:
    if args.num_nodes and args.num_nodes > 1:
        raise ConfigError(f"--num_nodes {args.num_nodes}: this machine is one host; name the hosts with --hostfile.")
    if filters:
        raise ConfigError(
            f"--{filters[0]} chooses among the hosts of a --hostfile; on this machine use --devices N, or "
            "CUDA_VISIBLE_DEVICES to say which."
        )
    return []


def _filtered(hosts: list[Host], kind: str, text: str, hostfile: Path) -> list[Host]:
    by_name, named, problems = {host.name: host for host in hosts}, dict[str, set[int]](), []

    for spec in text.split("@"):
        name, colon, slots = spec.partition(":")
        numbers = slots.split(",") if colon else []
        if name not in by_name:
            problems.append(f"--{kind} {text}: {name!r} is not a host of {hostfile}, which names {', '.join(by_name)}.")
        elif not all(number.isdecimal() and int(number) < by_name[name].slots for number in numbers):
            there = f"0 to {by_name[name].slots - 1}"
            problems.append(f"--{kind} {text}: expected HOST or HOST:SLOT,SLOT with slots of {there} on {name}.")
        else:
            named.setdefault(name, set()).update(map(int, numbers) if numbers else range(by_name[name].slots))

    if problems:
        raise HostfileError(problems)

    # From here on `named` holds the slots that stay.
    if kind == "exclude":
        named = {host.name: set(range(host.slots)) - named.get(host.name, set()) for host in hosts}
    left = [replace(host, slots=len(named.get(host.name, ()))) for host in hosts if named.get(host.name)]

    if not left:
        raise HostfileError(f"--{kind} {text} leaves no host of {hostfile}.")
    return left


def refuse_where_supervised(runner: Sequence[str], args: argparse.Namespace) -> None:
    """Raise ConfigError for flags of DeepSpeed's launcher that make no sense if torchrun starts the ranks."""
    names = [argument.partition("=")[0] for argument in runner if argument.startswith("-")]
    problems = [
        f"{name} is for DeepSpeed's launcher, which --restarts does not use: leave it out."
        for name in names
        if name not in SUPERVISED
    ]
    for name in ("include", "exclude"):
        if ":" in (getattr(args, name) or ""):
            problems.append(f"--{name} {getattr(args, name)}: with --restarts it names whole hosts, without slots.")
    if problems:
        raise ConfigError(problems)


def refuse_missing(programs: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> None:
    """Raise HostfileError if a program that starts hosts is missing; `programs`: names, and Debian packages."""
    for program, package in programs.items():
        if shutil.which(program, path=environ.get("PATH")) is None:
            raise HostfileError(f"there is no {program!r} on this machine, which starts the hosts: install {package}.")


def refuse_unreachable(hosts: Sequence[Host], ssh_port: int | None, environ: Mapping[str, str] = os.environ) -> None:
    """Raise HostfileError for every host that DeepSpeed's launcher would not reach.

    Args:
        hosts: the hosts to ask, all at once.
        ssh_port: the port of every host's ssh.
        environ: where programs are looked for.
    """
    refuse_missing(PROGRAMS, environ)
    asking.refuse_hosts(hosts, [*asking.SSH, *asking.port_option(ssh_port)], "true", environ=environ)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 1 to 65535")
    return int(text)
