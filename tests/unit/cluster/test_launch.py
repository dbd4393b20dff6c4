"""The command line of a launch on this machine alone."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import launch as launcher
from deepspeed.launcher import runner

from ds_slm.cluster import launch


def read_by_launcher(command: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What DeepSpeed's second program understands."""
    module = command.index(launcher.__name__)
    assert command[:module] == [sys.executable, "-u", "-m"]
    monkeypatch.setattr(sys, "argv", command[module:])
    return vars(launcher.parse_args())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_launch_on_this_cpu_is_what_deepspeed_makes_of_it(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: DeepSpeed's own first program: its second one understands the same of the command line it is given."""
    started: list[list[str]] = []

    def start(command: list[str], env: Any) -> None:
        started.append(command)
        raise InterruptedError

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(runner, "set_log_level_from_string", lambda level: None)
    script, flags = tmp_path / "train.py", ["--recipe", "demo", "--set", "train.steps=3"]

    typed = launch.command(script, flags, devices=ranks, launcher=["--quiet", "--master_port", "4711"])
    with pytest.raises(InterruptedError):
        runner.main(typed[1:])
    ours = launch.local_command(script, flags, ranks, port=4711)
    assert read_by_launcher(ours, monkeypatch) == read_by_launcher(started[0], monkeypatch)
