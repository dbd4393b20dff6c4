"""Supervised launches on this machine, as `ds-slm train RECIPE --devices 2 --restarts K` starts them.

The tests go on with one run, in their order. Oracle of every row: the ledger, a pure function of the position.
"""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import runs

PATIENCE_S = 120.0


class Supervised:
    """A supervised launch, and its processes."""

    def __init__(self, folder: Path, *flags: str, restarts: int = 2) -> None:
        self.run = folder / "run"
        self._output = folder / "output"
        command = [str(runs.BIN / "ds-slm"), "train", "tiny.toml", "--devices", "2", "--restarts", str(restarts)]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--run-dir", "run", "--set", "train.steps=100000", *flags],
                cwd=folder,
                env=runs.environment(),
                stdout=output,
                stderr=output,
            )
        self._tree = psutil.Process(self.process.pid)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The processes of the training program, but for the agent that names it, too."""
        found = []
        for one in self._tree.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                words = one.cmdline()
                if "pretrain.py" in " ".join(words) and "run" not in words[2]:
                    found.append(one)
        return found

    def await_step(self, after: int = 0) -> int:
        """Wait until a later step than this one is recorded."""
        self.wait_for(lambda: newest_step(self.run) > after)
        return newest_step(self.run)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline_s, self.output
            time.sleep(0.05)

    def end(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            for one in [*self._tree.children(recursive=True), self._tree]:
                one.kill()
        self.process.wait()


def newest_step(run: Path) -> int:
    return runs.records(run)[-1]["step"] if (run / "metrics.jsonl").is_file() else 0


def saved_step(run: Path) -> int:
    return json.loads((run / "saved.json").read_text())["step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("supervised")
    runs.write_recipe(path)
    return path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def make(*flags: str, **others: int) -> Supervised:
        started.append(Supervised(folder, *flags, **others))
        return started[-1]

    yield make
    for one in started:
        one.end()


def test_a_killed_rank_costs_the_steps_after_the_newest_checkpoint(start: Callable[..., Supervised]) -> None:
    """SIGKILL to a rank, then SIGTERM to the supervisor: 75, the last step saved, and no process left."""
    launch = start()
    launch.wait_for(lambda: (launch.run / "saved.json").is_file() and saved_step(launch.run) >= 10)
    killed_at, began_s = newest_step(launch.run), time.monotonic()
    launch.ranks()[0].kill()
    launch.await_step(killed_at + 10)
    print(f"10 steps further {time.monotonic() - began_s:.1f} s after a rank was killed at step {killed_at}")
    resumed = re.search(r"resumed at step (\d+)0\b", launch.output)  # it saves every ten steps
    assert resumed and "restart 1 of 2" in launch.output and 10 <= int(resumed[1]) * 10 <= killed_at + 1

    everyone = psutil.Process(launch.process.pid).children(recursive=True)
    launch.process.terminate()
    assert launch.process.wait(PATIENCE_S) == 75, launch.output
    assert not any(one.is_running() for one in everyone)
    last = newest_step(launch.run)
    assert json.loads((launch.run / "stopped.json").read_text())["step"] == saved_step(launch.run) == last
    assert launch.output.count("stopped by a signal") == 1


def test_when_the_supervisor_is_killed_all_ends_and_nothing_is_lost(start: Callable[..., Supervised]) -> None:
    """A second supervisor of the same folder is refused before: it names the first one."""
    launch = start()
    launch.await_step(newest_step(launch.run))
    second = start()
    assert second.process.wait(PATIENCE_S) == 2
    assert f"process {launch.process.pid}" in second.output and "Traceback" not in second.output

    everyone = psutil.Process(launch.process.pid).children(recursive=True)
    launch.process.kill()
    began_s = time.monotonic()
    psutil.wait_procs(everyone, timeout=PATIENCE_S)
    print(f"all ended {time.monotonic() - began_s:.1f} s after the supervisor was killed")
    assert not any(one.is_running() for one in everyone)
    assert saved_step(launch.run) == newest_step(launch.run)


def test_a_mistake_ends_at_once_in_its_own_words(start: Callable[..., Supervised]) -> None:
    """Another seed than that of the run in the folder: no restart helps."""
    launch = start("--set", "train.seed=6")
    assert launch.process.wait(PATIENCE_S) == 2, launch.output
    assert launch.output.count("train.seed") == 1 and "restart" not in launch.output
    assert "Traceback" not in launch.output


def test_the_ledger_of_the_run_is_that_of_one_that_never_ended(start: Callable[..., Supervised], folder: Path) -> None:
    """Oracle: one rank, in one launch. Ctrl-C ends the run, too."""
    launch = start()
    last = launch.await_step(newest_step(launch.run))
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(PATIENCE_S) == 75, launch.output

    flags = ["--recipe", "tiny.toml", "--set", "train.steps=100000", "--run-dir", "whole", "--max-steps", str(last)]
    done = runs.run(runs.deepspeed_command(1, *flags), folder)
    assert done.returncode == 0, done.stderr
    ledgers = {one["step"]: one["ledger"] for one in runs.records(folder / "whole")}
    assert [one["ledger"] for one in runs.records(launch.run)][:last] == [ledgers[step] for step in sorted(ledgers)]
