"""Hostfiles, and what a rank finds out about the launcher above it.

Oracles: DeepSpeed's own hostfile reader and command line (its source, and once the real `deepspeed` command); for the
rest, processes whose command lines are those of a launch, made by a stand-in `deepspeed` package.
"""

import ast
import base64
import collections
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ds_slm.cluster import hostfile as hostfiles
from ds_slm.cluster.hostfile import Host, launcher_hostfile, parse_hostfile, refuse_missing_hostfile
from ds_slm.errors import HostfileError

ROOT = Path(__file__).resolve().parents[3]


def problems_of(path: Path) -> list[str]:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(path)
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- hostfiles


def test_the_shipped_hostfiles() -> None:
    """Oracle: the lines of both files, read by hand."""
    assert parse_hostfile(ROOT / "hostfiles" / "two_node") == [Host("node1", 1), Host("node2", 1)]
    assert parse_hostfile(ROOT / "hostfiles" / "localhost") == [Host("localhost", 1)]


@pytest.mark.parametrize("name", ["two_node", "localhost"])
def test_deepspeed_reads_the_shipped_hostfiles_alike(name: str) -> None:
    """Oracle: the hostfile reader in the installed launcher's source, run without importing DeepSpeed."""
    tree = ast.parse(runner_source())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_parse_hostfile")
    scope: dict = {"re": re, "collections": collections}
    exec(compile(ast.Module([function], []), "runner.py", "exec"), scope)
    path = ROOT / "hostfiles" / name
    theirs = scope["_parse_hostfile"](path.read_text().splitlines())
    assert theirs == {host.name: host.slots for host in parse_hostfile(path)}


def test_comments_blanks_and_order(tmp_path: Path) -> None:
    """Oracle: by hand: three hosts in the order of the file, without blank lines and whatever follows a #."""
    path = write(tmp_path / "h", "# b = first\n\n  b\tslots=2  \nuser@a.example slots=03 # why\n10.0.0.7 slots=1")
    assert parse_hostfile(path) == [Host("b", 2), Host("user@a.example", 3), Host("10.0.0.7", 1)]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    """Oracle: by hand: each of lines 2 to 7 has its own mistake; `good` has 1 slot and 4 more, so 5."""
    text = "good slots=1\nbare\nspaced slots = 2\ngood slots=4\nnone slots=0\nnode[1-2] slots=1\ntail slots=2x\n"
    problems = problems_of(write(tmp_path / "h", text))
    assert [re.search(r"line (\d+)", problem)[1] for problem in problems] == ["2", "3", "4", "5", "6", "7"]  # type: ignore[index]
    for got, problem in zip(
        ("`bare`", "`spaced slots = 2`", "`good` again", "`slots=0`", "`node[1-2]`", "`tail slots=2x`"),
        problems,
        strict=True,
    ):
        assert got in problem
        assert "expected" in problem
    assert "`host slots=N`" in problems[0]
    assert "write `spaced slots=2`" in problems[1]
    assert "write `good slots=5` on line 1 alone" in problems[2]


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("localhost:1", "localhost slots=1"),
        ("localhost:8", "localhost slots=8"),
        ("node1:22", "node1 slots=1"),
        ("node1:2222", "node1 slots=1"),
        ("node1:8 slots=2", "node1 slots=2"),
        ("node1", "node1 slots=1"),
        ("node1 4", "node1 slots=4"),
        ("node1 slots = 2", "node1 slots=2"),
        ("node1 slots: 2", "node1 slots=2"),
        ("node1 max_slots=2", "node1 slots=2"),
        ("node1 slots=2 gpu=a100", "node1 slots=2"),
        ("node1 slots=0", "node1 slots=1"),
        ("node1 slots=", "node1 slots=1"),
        ("root@node1:3", "root@node1 slots=3"),
        ("[fd00::1] slots=2", "fd00::1 slots=2"),
        ("[fd00::1]:22 slots=2", "fd00::1 slots=2"),
        ("fd00::1", "fd00::1 slots=1"),
        ("node[1-2] slots=1", "node1 slots=1"),
        ("-w slots=1", "node1 slots=1"),
        ("\ufeffnode1 slots=3", "node1 slots=3"),
    ],
)
def test_the_advice_is_a_line_that_is_accepted(tmp_path: Path, line: str, advice: str) -> None:
    """Oracle: what was meant, written by hand; the advice itself is read without a problem."""
    (problem,) = problems_of(write(tmp_path / "h", line))
    assert f"write `{advice}`" in problem
    assert len(parse_hostfile(write(tmp_path / "h", advice))) == 1


def test_hosts_of_an_address(tmp_path: Path) -> None:
    """IPv6 is an address, not a host with a port; case makes no other host."""
    path = write(tmp_path / "h", "fd00::1 slots=2\nroot@fd00::2 slots=1\n")
    assert parse_hostfile(path) == [Host("fd00::1", 2), Host("root@fd00::2", 1)]
    (problem,) = problems_of(write(tmp_path / "h", "node1 slots=1\nNode1 slots=2\n"))
    assert "`Node1` again" in problem


@pytest.mark.parametrize("text", ["", "\n\n", "# node1 slots=1\n"])
def test_a_hostfile_without_hosts(tmp_path: Path, text: str) -> None:
    """Oracle: by hand: no line, blank lines, and a host in a comment name nobody; told is what a line looks like."""
    (problem,) = problems_of(write(tmp_path / "h", text))
    assert "names no host" in problem
    assert "`host slots=N`" in problem


def test_a_missing_hostfile_names_the_nearest(tmp_path: Path) -> None:
    """Oracle: by hand: `two_node` is the only file beside `two_nodes`, which is not there."""
    write(tmp_path / "two_node", "a slots=1\n")
    (problem,) = problems_of(tmp_path / "two_nodes")
    assert f"{tmp_path / 'two_nodes'} is not a file" in problem
    assert f"Did you mean {tmp_path / 'two_node'}?" in problem
    assert "leave out --hostfile" in problem


def test_a_folder_is_no_hostfile(tmp_path: Path) -> None:
    """Oracle: by hand: the path of a folder, which is there and has no lines."""
    (problem,) = problems_of(tmp_path)
    assert "is not a file" in problem


# ---- the runner's command line


def runner_source() -> str:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "launcher" / "runner.py").read_text()


def test_the_options_are_those_of_the_installed_runner() -> None:
    """Oracle: the `add_argument` calls in the installed launcher's source."""
    values, flags = set(), set()
    for call in ast.walk(ast.parse(runner_source())):
        if not (
            isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        ):
            continue
        names = tuple(argument.value for argument in call.args if isinstance(argument, ast.Constant))
        if names[0].startswith("-"):
            action = [word.value.value for word in call.keywords if word.arg == "action"]  # type: ignore[attr-defined]
            (flags if action == ["store_true"] else values).add(names)
    assert values == set(hostfiles.RUNNER_VALUE_OPTIONS)
    assert flags == set(hostfiles.RUNNER_FLAGS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--hostfile h train.py", "h"),
        ("--hostfile=h train.py", "h"),
        ("-H h train.py", "h"),
        ("-Hh train.py", "h"),
        ("-qH h train.py", "h"),
        ("--host h train.py", "h"),
        ("--num_gpus 2 -i node1@node2 --hostfile h --no_ssh train.py --lr 1", "h"),
        ("--hostfile first --hostfile last train.py", "last"),
        ("train.py --hostfile h", None),
        ("train.py -H h", None),
        ("--num_nodes 2 train.py --hostfile=h", None),
        ("--master_addr -H train.py", None),
        ("--launcher_args --hostfile=h train.py", None),
        ("--module pkg.train --hostfile h", None),
        ("", None),
    ],
)
def test_the_runners_own_hostfile_is_told_from_the_scripts(arguments: str, expected: str | None) -> None:
    """Oracle: argparse, as DeepSpeed uses it."""
    options = hostfiles._runner_options(arguments.split())
    assert (options.hostfile if options else None) == expected


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        ("/v/bin/python3 /v/bin/deepspeed --hostfile h t.py", "/v/bin/deepspeed"),
        ("/v/bin/python3 -u -X dev -W ignore /v/bin/ds --hostfile h t.py", "/v/bin/ds"),
        ("python -um deepspeed.launcher.runner t.py", "deepspeed.launcher.runner"),
        ("python -m deepspeed.launcher.runner t.py", "deepspeed.launcher.runner"),
        ("deepspeed --hostfile h t.py", "deepspeed"),
        ("/bin/sh -c deepspeed --hostfile h t.py", ""),
        ("python train.py deepspeed --hostfile h", "train.py"),
        ("", ""),
    ],
)
def test_the_program_of_a_command_line(argv: str, program: str) -> None:
    """Oracle: `python --help`, by hand: -X and -W take a value, -m names a module; `sh -c` names no program."""
    assert hostfiles._program(argv.split())[0] == program


# ---- processes


@pytest.fixture
def chain(tmp_path: Path):
    """Run a script below processes whose command lines are those of `deepspeed`'s runner and launcher."""
    package = tmp_path / "stand_in" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        write(folder / "__init__.py", "")
    for module in ("runner", "launch"):
        write(
            package / f"{module}.py",
            "import json, os, subprocess, sys\n"
            f"command = json.loads(os.environ['{module.upper()}_STARTS'])\n"
            "sys.exit(subprocess.run(command).returncode)\n",
        )
    write(tmp_path / "deepspeed", "import runpy\nrunpy.run_module('deepspeed.launcher.runner')\n")

    def run(
        script: str, runner_arguments: list[str], hosts: list[str] | None = None, module: bool = False
    ) -> subprocess.CompletedProcess[str]:
        code = "from ds_slm.errors import run_program\nfrom ds_slm.cluster.hostfile import *\n" + script
        world = base64.urlsafe_b64encode(json.dumps({host: [0] for host in hosts or ["localhost"]}).encode()).decode()
        rank = [sys.executable, "-c", code, "--hostfile", "of_the_script"]
        launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "train.py"]
        runner = ["-m", "deepspeed.launcher.runner"] if module else [str(tmp_path / "deepspeed")]
        path = os.pathsep.join([str(tmp_path / "stand_in"), str(ROOT)])
        return subprocess.run(
            [sys.executable, *runner, *runner_arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "RUNNER_STARTS": json.dumps(launch),
                "LAUNCH_STARTS": json.dumps(rank),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("module", [False, True])
def test_the_hostfile_of_the_runner_above(chain, tmp_path: Path, module: bool) -> None:
    """Oracle: the runner's own -H, from the folder where it runs; not the script's --hostfile, nor the rank's."""
    done = chain("print(launcher_hostfile())", ["-H", "sub/h", "train.py", "--hostfile", "x"], module=module)
    assert done.stdout.strip() == str(tmp_path / "sub" / "h")


def test_a_runner_without_a_hostfile(chain) -> None:
    """Oracle: by hand: the only --hostfile is the script's, so there is none, and nothing to refuse."""
    done = chain("print(launcher_hostfile()); refuse_missing_hostfile()", ["train.py", "--hostfile", "x"])
    assert (done.stdout.strip(), done.returncode) == ("None", 0)


def test_no_runner_above() -> None:
    """As under plain `python`, and in a rank that another host started over ssh."""
    assert launcher_hostfile() is None
    refuse_missing_hostfile()


REFUSE = "import sys; sys.exit(run_program(refuse_missing_hostfile))"


def test_a_missing_hostfile_is_refused(chain, tmp_path: Path) -> None:
    """Oracle: exit code 2 of a user's mistake, and the path from the runner's folder, without a traceback."""
    done = chain(REFUSE, ["--hostfile", "absent", "train.py"])
    assert done.returncode == 2
    assert f"{tmp_path / 'absent'} is not a file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("left", "arguments", "refused"),
    [
        (["elsewhere.invalid"], [], True),
        (["192.0.2.77"], [], True),
        (["192.0.2.77"], ["--no_ssh", "--node_rank", "0"], False),
        (["elsewhere.invalid", "other.invalid"], ["--no_ssh", "--node_rank", "0"], False),
        (["localhost"], [], False),
        (["127.0.0.1"], [], False),
        ([socket.gethostname()], [], False),
    ],
)
def test_a_single_remote_host_is_refused(
    chain, tmp_path: Path, left: list[str], arguments: list[str], refused: bool
) -> None:
    """DeepSpeed starts a single host's ranks on the machine where it was typed."""
    write(tmp_path / "h", "".join(f"{host} slots=1\n" for host in left))
    done = chain(REFUSE, ["--hostfile", "h", *arguments, "train.py"], hosts=left)
    assert done.returncode == (2 if refused else 0), done.stderr
    assert ("--force_multi" in done.stderr) == refused


def test_neither_torch_nor_deepspeed_is_imported() -> None:
    """Oracle: sys.modules of a new Python that imports this module alone."""
    code = "import sys, ds_slm.cluster.hostfile; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
