"""`ds-slm train` and `ds-slm sft`: the program's flags from its one parser, checked here, then a launch as a child.

argv -> RECIPE, our own flags | DeepSpeed's flags | the program's flags -> checks -> deepspeed ... script ...
                                                              on this machine's CPU --> local_ranks ... script ...
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from ds_slm.cli import mistakes
from ds_slm.cli.flags import run_dir
from ds_slm.cluster import launch, limits, runner_flags
from ds_slm.cluster.hostfile import Host, is_this_machine
from ds_slm.distributed import local_ranks, world
from ds_slm.errors import EXIT_INTERRUPTED, EXIT_STOPPED, INTERRUPTED, ConfigError, TrainingError
from ds_slm.recipe import loading


@dataclass(frozen=True)
class CommandLine:
    """A verb's command line, read and checked as far as this machine can."""

    args: argparse.Namespace
    script: list[str]
    """The program's own flags, as they were typed."""
    runner: list[str]
    """DeepSpeed's flags, as they were typed."""

    @property
    def recipe(self) -> str:
        """The recipe's name or path."""
        return self.args.recipe_name


def read(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    add_own: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> CommandLine:
    """Read a verb's command line; flags may stand before and after RECIPE.

    Args:
        parser: the program's parser.
        arguments: everything that was typed after the verb.
        add_own: adds the verb's own flags, which the program does not see.

    Raises:
        ConfigError: a flag or a value is not known, or RECIPE is missing.
    """
    programs = _takes_value(parser)
    parser._option_string_actions["--recipe"].help = argparse.SUPPRESS
    parser.add_argument("recipe_name", metavar="RECIPE", help="name in the library, or path of a .toml file")
    where = parser.add_argument_group("where it runs")
    where.add_argument("-H", "--hostfile", type=Path, metavar="FILE", help="train on the hosts of this file")
    where.add_argument("--devices", type=limits.positive, metavar="N", help="train on N devices of this machine")
    limits.add_flags(parser)
    runner_flags.add_runner_flags(parser)
    add_own(parser)

    runner_flags.refuse_others(arguments)
    args = parser.parse_args(list(arguments))
    if "--recipe" in [argument.partition("=")[0] for argument in arguments]:
        raise ConfigError(f"the recipe is named twice, {args.recipe_name} and {args.recipe}: leave out --recipe.")

    # Find out which token belongs to whom: argparse has checked all tokens, but does not keep them.
    runner, rest = launch.split(arguments, launch.RUNNER)
    script, rest = launch.split(rest, programs)
    if glued := [token for token in launch.split(rest, _takes_value(parser))[1] if token.startswith("-")]:
        raise ConfigError(f"{glued[0]}: write the flag and its value apart.")

    # start() names the hostfile itself.
    _, runner = launch.split(runner, dict.fromkeys(("--hostfile", "-H"), True))
    return CommandLine(args, script, runner)


def _takes_value(parser: argparse.ArgumentParser) -> dict[str, bool]:
    """The names of a parser's flags -> whether they take a value."""
    return {name: action.nargs is None for name, action in parser._option_string_actions.items()}  # no public list


def start(script: Path, line: CommandLine) -> None:
    """Run a training program under DeepSpeed, and end with its exit code."""
    args = line.args
    if args.restarts:  # this process serves a store that logs to the terminal; torch reads this at its import
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ds_slm.run.folder import STOPPED

    run_folder = run_dir(args, loading.recipe_path(line.recipe).stem)

    # Mistakes in the recipe, the flags or the hosts are reported before anything starts.
    recipe = loading.load(line.recipe, args.set, run_folder)
    hosts = runner_flags.chosen_hosts(args)
    endured = limits.of_flags(args)
    mistakes.refuse_recipe(
        args, recipe, sum(host.slots for host in hosts) or args.devices or 1, script.parent.name == "sft"
    )
    if not hosts:  # other hosts may have other files
        mistakes.refuse_files(args, recipe, run_folder)
        if args.devices and (warning := mistakes.refuse_devices(args.devices, launch.cuda_devices())):
            print(f"warning: {warning}", file=sys.stderr)
    if endured.restarts:
        raise typer.Exit(supervised(script, line, hosts, run_folder, endured))
    runner = runner_flags.to_single_host(args, hosts, line.runner)
    runner_flags.refuse_unusable(args, hosts)
    port = None
    if args.master_port is None and not runner_flags.over_ssh(args, hosts):
        port = world.free_port()  # so that two launches on a machine do not meet
        runner += ["--master_port", str(port)]
    if not args.no_ssh_check and runner_flags.over_ssh(args, hosts):
        runner_flags.refuse_unreachable(hosts, args.ssh_port)

    # A machine without a GPU trains on its CPU, with one rank unless --devices says otherwise.
    cpu_ranks, devices = None, args.devices
    if not hosts and not launch.cuda_devices():
        cpu_ranks = devices = devices or 1

    quiet = [] if args.quiet or args.log_level else ["--quiet"]
    flags = ["--recipe", line.recipe, *line.script]
    if cpu_ranks and port and not line.runner:  # DeepSpeed's programs would have nothing to find out
        command = local_ranks.command(script, flags, cpu_ranks, port)
    else:
        command = launch.command(script, flags, args.hostfile, devices, [*quiet, *runner])

    # The file that says a signal ended the run counts only if this launch wrote it.
    sign = run_folder / STOPPED
    before = _content(sign)
    hold_back = bool(hosts) and not args.log_level  # over ssh DeepSpeed drops --quiet
    code = launch.run(command, launch.environment(os.environ, cpu_ranks), hold_back=hold_back)

    # The run folder knows more than the launcher's exit code.
    if code and _content(sign) not in (None, before):
        raise typer.Exit(EXIT_STOPPED)  # a launcher that got the signal itself ends with 1
    if code == EXIT_INTERRUPTED:
        print(INTERRUPTED, file=sys.stderr)
    if code == 0 and not hosts and args.max_steps is None and not (run_folder / "done.json").is_file():
        raise TrainingError(f"{run_folder} has no done.json: the launcher ended before the run did.")
    raise typer.Exit(code)


def supervised(script: Path, line: CommandLine, hosts: Sequence[Host], run_folder: Path, endured: limits.Limits) -> int:
    """Run a training program under a supervisor; returns its exit code."""
    args = line.args
    runner_flags.refuse_where_supervised(line.runner, args)
    if args.resume == "never":
        raise ConfigError(
            "--resume never would begin anew at every restart: leave it out, and name a new --run-dir to begin anew."
        )
    if (args.min_hosts or 1) > max(len(hosts), 1):
        raise ConfigError(f"--min-hosts {args.min_hosts}: the run has {max(len(hosts), 1)}.")
    from ds_slm.cluster import supervise

    others = [host for host in hosts if not is_this_machine(host.name)]
    if others and not args.no_ssh_check:
        supervise.refuse_unfit(others, args.ssh_port)

    # A machine without a GPU trains on its CPU, as without a supervisor.
    cuda = launch.cuda_devices()
    devices = args.devices or cuda or 1
    return supervise.run(
        supervise.Launch(
            command=[str(script), "--recipe", line.recipe, *line.script],
            run_dir=run_folder,
            hosts=hosts,
            devices=devices,
            limits=endured,
            min_hosts=args.min_hosts or 1,
            ssh_port=args.ssh_port,
            venv_script=args.venv_script,
            environ=launch.environment(os.environ, None if cuda or others else devices),
        )
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
