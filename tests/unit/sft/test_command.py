"""Launches as children: command lines, exit codes, signals, and the two scripts of sft/."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_slm.cli import flags
from ds_slm.cluster import launch, runner_flags
from ds_slm.distributed import local_ranks, world
from ds_slm.errors import ConfigError, HostfileError
from ds_slm.recipe import loading
from tests.support.assistants import ds_slm
from tests.support.runs import environment

ROOT = Path(__file__).resolve().parents[3]
TWO_NODE = ROOT / "hostfiles" / "two_node"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, ["deepspeed", "s.py", "--base", "x"]),
        ({"devices": 3}, ["deepspeed", "--num_accelerators", "3", "s.py", "--base", "x"]),
        ({"hostfile": TWO_NODE}, ["deepspeed", "--hostfile", str(TWO_NODE), "s.py", "--base", "x"]),
        ({"launcher": ["--quiet"]}, ["deepspeed", "--quiet", "s.py", "--base", "x"]),
    ],
)
def test_the_command_line(where: dict, expected: list[str]) -> None:
    """Oracle: what a user would type: DeepSpeed's flags before the script, the script's behind it."""
    assert launch.command(Path("s.py"), ["--base", "x"], **where) == expected


def test_command_lines_that_cannot_be_meant() -> None:
    """Oracle: the flag or file named."""
    with pytest.raises(ConfigError, match="--devices"):
        launch.command(Path("s.py"), [], TWO_NODE, 2)
    with pytest.raises(HostfileError, match="two_nodes is not a file"):
        launch.command(Path("s.py"), [], ROOT / "hostfiles" / "two_nodes")


def test_flags_are_told_apart_by_name() -> None:
    """Oracle: DeepSpeed's own command line; the order of each program's flags stays."""
    given = ["--set", "a.b=c", "--master_port", "29511", "--run-dir", "x", "--force_multi", "--node_rank=1", "--last"]
    assert launch.split(given, launch.RUNNER) == (
        ["--master_port", "29511", "--force_multi", "--node_rank=1"],
        ["--set", "a.b=c", "--run-dir", "x", "--last"],
    )
    assert launch.split(["--master_port"], launch.RUNNER) == (["--master_port"], [])


def test_the_environment() -> None:
    """Oracle: this interpreter's programs come first; a CPU is named only where there is no GPU, its cores shared."""
    on_gpu = launch.environment({"PATH": "/usr/bin", "HOME": "h"}, None)
    assert on_gpu == {"PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin", "HOME": "h"}
    cores = launch.own_cores()
    on_cpu = launch.environment({}, 2)
    assert (on_cpu["DS_ACCELERATOR"], on_cpu["OMP_NUM_THREADS"]) == ("cpu", str(max(cores // 2, 1)))
    assert launch.environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(0)", 0), ("sys.exit(2)", 2), ("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 1)],
)
def test_exit_codes_are_passed_on(ending: str, code: int) -> None:
    """Oracle: the child's own code; 1 where a signal killed it."""
    assert launch.run([sys.executable, "-c", f"import os, sys; {ending}"], os.environ) == code


def test_a_missing_launcher_is_said() -> None:
    """Oracle: a sentence that names it."""
    with pytest.raises(ConfigError, match="'deepspeed' on the PATH"):
        launch.run(["deepspeed"], {"PATH": "/nowhere"})


@pytest.mark.timeout(60)
def test_sigterm_ends_the_launcher_below_the_runner(tmp_path: Path) -> None:
    """Oracle: a runner without a handler and a launcher with one: both end, and the pipe they share is closed."""
    launcher = (
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print('ready', flush=True)\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "print('ranks ended', flush=True)\n"
        "sys.exit(1)\n"
    )
    (tmp_path / "launcher.py").write_text(launcher)
    runner = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, {str(tmp_path / 'launcher.py')!r}]))"
    program = (
        f"import os, sys; from ds_slm.cluster import launch; "
        f"sys.exit(launch.run([sys.executable, '-c', {runner!r}], os.environ))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "ranks ended\n"
    assert process.returncode == 130


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Command lines that would have been run, in a folder with a base `x`, on a machine without a GPU."""
    commands: list[list[str]] = []

    def run(command: list[str], environ: dict[str, str], hold_back: bool) -> int:
        assert hold_back == ("--hostfile" in command)
        commands.append([environ.get("DS_ACCELERATOR", "-"), *command])
        return int(os.environ.get("CODE", "0"))

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(runner_flags, "refuse_unreachable", lambda hosts, ssh_port: None)
    monkeypatch.setattr(world, "free_port", lambda: 5)
    monkeypatch.setattr(launch, "cuda_devices", lambda: int("GPU" in os.environ))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    return commands


FINE_TUNE = [str(ROOT / "sft" / "train.py"), "--recipe", "demo-instruct", "--base", "x"]
FREE = ["--master_port", "5"]
ON_ONE_CPU = ["cpu", *local_ranks.command(Path("script"), [], ranks=1, port=5)[:-1]]
PRETRAIN = [str(ROOT / "ds_slm" / "pretrain.py"), "--recipe", "demo"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["sft", "demo-instruct", "--base", "x"],
            [*ON_ONE_CPU, *FINE_TUNE],
        ),
        (
            ["sft", "demo-instruct", "--devices", "2", "--base", "x", "--set", "train.seed=2", "--master_port", "9"],
            [
                "cpu",
                "deepspeed",
                "--num_accelerators",
                "2",
                "--quiet",
                "--master_port",
                "9",
                *FINE_TUNE,
                "--set",
                "train.seed=2",
            ],
        ),
        (
            ["sft", "demo-instruct", "--base", "x", "--hostfile", TWO_NODE],
            ["-", "deepspeed", "--hostfile", str(TWO_NODE), "--quiet", *FINE_TUNE],
        ),
        (
            ["train", "--max-steps", "1", "demo", "--allow-change"],
            [
                *ON_ONE_CPU,
                *PRETRAIN,
                "--max-steps",
                "1",
                "--allow-change",
            ],
        ),
        (
            ["train", "--run-dir=r", "-q", "--devices=2", "demo"],
            ["cpu", "deepspeed", "--num_accelerators", "2", "-q", *FREE, *PRETRAIN, "--run-dir=r"],
        ),
        (
            ["train", "demo", "--hostfile", TWO_NODE, "--include", "node1:0@node2", "--ssh_port", "22"],
            [
                "-",
                "deepspeed",
                "--hostfile",
                str(TWO_NODE),
                "--quiet",
                "--include",
                "node1:0@node2",
                "--ssh_port",
                "22",
                *PRETRAIN,
            ],
        ),
        (["train", "demo"], [*ON_ONE_CPU, *PRETRAIN]),
        (
            ["train", "demo", "--run-dir", "r"],
            [*ON_ONE_CPU, *PRETRAIN, "--run-dir", "r"],
        ),
    ],
)
def test_the_verbs_launch(
    launched: list[list[str]], arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the command line and accelerator; every flag that the verb does not know reaches the program."""
    ds_slm(*arguments, "--max-steps", "1", monkeypatch=monkeypatch)
    assert launched == [[*expected, "--max-steps", "1"]]


def test_a_gpu_is_left_to_deepspeed(launched: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: neither accelerator nor a number of devices is set."""
    monkeypatch.setenv("GPU", "1")
    assert ds_slm("train", "demo", "--max-steps", "1", monkeypatch=monkeypatch) == 0
    assert launched == [["-", "deepspeed", "--quiet", *FREE, *PRETRAIN, "--max-steps", "1"]]


def test_success_is_done_json(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the launcher ends with 0 when a signal killed it; only done.json tells that from success."""
    assert ds_slm("train", "demo", "--run-dir", "r", monkeypatch=monkeypatch) == 1
    assert "r has no done.json" in capsys.readouterr().err
    Path("r").mkdir()
    (Path("r") / "recipe.toml").write_text(loading.to_toml(loading.load("demo")))
    (Path("r") / "done.json").write_text(json.dumps({"step": 1}))
    assert ds_slm("train", "demo", "--run-dir", "r", monkeypatch=monkeypatch) == 0
    monkeypatch.setenv("CODE", "2")
    assert ds_slm("train", "demo", "--run-dir", "r", monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "demo", "--stpes", "3"], "--stpes"),
        (["train", "demo", "--set", "train.stpes=3"], "train.steps"),
        (["train", "slm-10n"], "slm-10m"),
        (["train", "demo", "--devices", "2", "--hostfile", TWO_NODE], "--devices"),
        (["train", "demo", "--hostfile", "absent"], "absent"),
        (["sft", "demo-instruct"], "--base"),
        (["train", "--max-steps", "1"], "RECIPE"),
        (["train", "demo", "slm-10m"], "slm-10m is not known"),
        (["train", "demo", "--recipe", "slm-10m"], "leave out --recipe"),
        (["train", "demo", "--max-stpes", "1"], "did you mean --max-steps?"),
        (["train", "demo", "--max-steps", "none"], "argument --max-steps: 'none'"),
        (["train", "demo", "--master_port", "99999"], "--master_port: '99999' is not a port"),
        (["train", "demo", "--master_port", "0"], "--master_port"),
        (["train", "demo", "--ssh_port", "x"], "--ssh_port"),
        (["train", "demo", "--num_nodes", "2"], "name the hosts with --hostfile"),
        (["train", "demo", "--num_nodes", "0"], "--num_nodes"),
        (["train", "demo", "--num_gpus", "2"], "--devices N"),
        (["train", "demo", "--include", "localhost:0"], "--devices N"),
        (["train", "demo", "--exclude", "localhost:0"], "--devices N"),
        (["train", "demo", "--include", "a", "--exclude", "b"], "give one of them"),
        (["train", "demo", "--hostfile", TWO_NODE, "--include", "node3"], "'node3' is not a host"),
        (["train", "demo", "--hostfile", TWO_NODE, "--include", "node1:1"], "slots of 0 to 0 on node1"),
        (["train", "demo", "--hostfile", TWO_NODE, "--include", "node1:x"], "expected HOST or HOST:SLOT"),
        (["train", "demo", "--hostfile", TWO_NODE, "--exclude", "node1@node2"], "leaves no host"),
        (["train", "demo", "--hostfile", TWO_NODE, "--num_nodes", "3"], "names 2 hosts"),
        (["train", "demo", "--launcher", "openmpi"], "pdsh over ssh"),
        (["train", "demo", "--module"], "leave it out"),
        (["train", "demo", "--no_ssh", "--node_rank", "1"], "on each host instead"),
        (["train", "demo", "-ilocalhost:0"], "-ilocalhost:0"),
    ],
)
def test_mistakes_launch_nothing(
    launched: list[list[str]],
    arguments: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2, the part at fault on stderr, no command line."""
    assert ds_slm(*arguments, monkeypatch=monkeypatch) == 2
    assert part in capsys.readouterr().err
    assert not launched


def test_help_lists_the_flags_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the program's own parser, DeepSpeed's flags that are passed on, and the verb's."""
    assert ds_slm("sft", "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    programs = {name for name in flags.of_fine_tuning()._option_string_actions if name.startswith("--")}
    for flag in (programs - {"--local_rank", "--recipe"}) | {"--hostfile", "--devices", "--preview", "--master_port"}:
        assert flag in shown
    assert "RECIPE" in shown


SCRIPTS = [ROOT / "sft" / name for name in ("launch_local.sh", "launch_two_node.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    """Oracle: bash's parser, the file mode, strict mode."""
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


DEFAULTS = ["--recipe", "axiom-380m-instruct", "--base", "runs/axiom-380m"]
CASES = {
    "defaults": ([], {}, DEFAULTS),
    "arguments": (["b ase", "r"], {}, ["--recipe", "r", "--base", "b ase"]),
    "environment": ([], {"BASE": "b", "RECIPE": "r"}, ["--recipe", "r", "--base", "b"]),
    "arguments first": (["b"], {"BASE": "c", "RECIPE": "r"}, ["--recipe", "r", "--base", "b"]),
    "flags": (["b", "r", "--set", "a.b=c d"], {}, ["--recipe", "r", "--base", "b", "--set", "a.b=c d"]),
    "flags alone": (["--max-steps", "2"], {}, [*DEFAULTS, "--max-steps", "2"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", ["cpu", "gpu", "two_node"])
def test_scripts_launch(case: str, place: str, tmp_path: Path) -> None:
    """Oracle: what a stand-in for `deepspeed` was given, where it ran, and its exit code; without and with a GPU."""
    arguments, given, expected = CASES[case]
    stand_ins = {
        "deepspeed": 'printf "%s\\0" "$PWD" "${DS_ACCELERATOR:--}" "$@" > "$RECORD"; exit 7',
        "python": f"echo {place != 'cpu'}",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("BASE", "RECIPE", "DS_ACCELERATOR")}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environ = {**kept, **given, "PATH": path, "RECORD": str(tmp_path / "record")}
    script = SCRIPTS[place == "two_node"]
    done = subprocess.run([str(script), *arguments], cwd=tmp_path, env=environ, check=False)
    launcher = {"cpu": ["--num_accelerators", "2"], "gpu": [], "two_node": ["--hostfile", "hostfiles/two_node"]}[place]
    accelerator = "cpu" if place == "cpu" else "-"
    recorded = (tmp_path / "record").read_text().split("\0")[:-1]
    assert recorded == [str(ROOT), accelerator, *launcher, "sft/train.py", *expected]
    assert done.returncode == 7


def test_a_python_without_torch_launches_nothing(tmp_path: Path) -> None:
    """Oracle: exit code 2 and the way out; no fine-tuning on the CPU of a machine whose environment is not active."""
    for name, body in {"deepspeed": 'touch "$RECORD"', "python": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "RECORD": str(tmp_path / "record")}
    done = subprocess.run([str(SCRIPTS[0])], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "activate" in done.stderr
    assert not (tmp_path / "record").exists()
