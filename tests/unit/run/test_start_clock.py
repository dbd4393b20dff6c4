"""What a launch's seconds until its first forward were for."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ds_slm.distributed import local_ranks
from ds_slm.run import start_clock
from ds_slm.run.start_clock import StartClock

RUNNER = ["/venv/bin/python", "/venv/bin/deepspeed", "--num_accelerators", "2", "pretrain.py"]
LAUNCH = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30", "pretrain.py"]
OWN = local_ranks.command(Path("pretrain.py"), [], 2, 4711)


def process(began_s: float, *parents: tuple[list[str], float]) -> Any:
    """A rank's process under others, the innermost first."""
    above = [SimpleNamespace(cmdline=lambda c=command: c, create_time=lambda s=s: s) for command, s in parents]
    return SimpleNamespace(create_time=lambda: began_s, parents=lambda: above)


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ([(LAUNCH, 102.0), (RUNNER, 100.0), (["bash"], 7.0)], 4.0),
        ([(LAUNCH, 102.0), (["sshd: node2"], 7.0)], 2.0),
        ([(LAUNCH, 102.0), (["/venv/bin/python", "/venv/bin/ds-slm", "train", "demo"], 101.0)], 3.0),
        ([(LAUNCH, 102.0), (["/venv/bin/python", "/venv/bin/ds-slm", "verify", "runs/demo"], 50.0)], 2.0),
        ([(["python", "-m", "pytest"], 7.0), (RUNNER, 1.0)], 0.0),
        ([], 0.0),
    ],
)
def test_the_launchers_time_begins_with_the_outermost(
    monkeypatch: pytest.MonkeyPatch, parents: list[tuple[list[str], float]], expected: float
) -> None:
    """Oracle: times by hand; what typed the command, or runs this test, is not a launcher."""
    monkeypatch.setattr(start_clock.psutil, "Process", lambda: process(104.0, *parents))
    assert StartClock().parts_s == {"launcher": pytest.approx(expected)}


def test_a_parent_that_cannot_be_asked_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the launcher below it."""
    rank = process(104.0, (LAUNCH, 102.0), (RUNNER, 100.0))

    def gone() -> list[str]:
        raise psutil.NoSuchProcess(1)

    rank.parents()[1].cmdline = gone
    monkeypatch.setattr(start_clock.psutil, "Process", lambda: rank)
    assert StartClock().parts_s == {"launcher": pytest.approx(2.0)}


def test_every_second_is_for_something() -> None:
    """Oracle: the parts add up to the kernel's own account of this process's life; a part that comes twice is one."""
    clock = StartClock()
    for what in ("imports", "data", "imports"):
        clock.lap(what)
    assert list(clock.parts_s) == ["launcher", "imports", "data"]

    own, since_boot = Path("/proc/self/stat"), Path("/proc/uptime")
    if not own.exists():
        pytest.skip("no /proc")
    began_s = int(own.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    lived_s = float(since_boot.read_text().split()[0]) - began_s
    assert sum(clock.parts_s.values()) - clock.parts_s["launcher"] == pytest.approx(lived_s, abs=0.5)


def test_the_line_tells_the_pause_of_compiling_beforehand() -> None:
    """Oracle: the words, and the sum of the parts."""
    clock = StartClock()
    clock.parts_s = {"launcher": 1.25, "imports": 2.0}
    assert clock.told(compiled=False) == "3.2 s to the first forward: launcher 1.2, imports 2.0"
    assert clock.told(compiled=True).startswith(clock.told(compiled=False) + "; it compiles the blocks")
