"""How ranks meet, and what hosts must agree on."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_slm.errors import DataError, run_program
from ds_slm.recipe import schema
from ds_slm.train import ds_config, session
from tests import runs

MEET = """
import sys, time
from datetime import timedelta
from ds_slm.train import engine
import deepspeed
import torch.distributed as dist
rank, late_s, patience_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
engine.PREPARING_TIMEOUT = timedelta(seconds=patience_s)
usual = deepspeed.init_distributed
deepspeed.init_distributed = lambda verbose: usual(timeout=timedelta(seconds=2), verbose=verbose)
if rank == 1:
    time.sleep(late_s)
from ds_slm.errors import run_program
def main():
    print(engine.connect().hosts)
    engine.disconnect()
sys.exit(run_program(main))
"""


def meet(late_s: float, patience_s: float, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks of which one is late; the usual timeout is two seconds."""
    port = str(runs.free_port())
    processes = []
    for rank in range(2):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        command = [sys.executable, "-c", MEET, str(rank), str(late_s), str(patience_s)]
        environment = runs.environment(MASTER_ADDR="127.0.0.1", PYTHONPATH=str(runs.ROOT), **world)
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def test_a_host_that_prepares_longer_is_waited_for(tmp_path: Path) -> None:
    """Oracle: a rank that comes after twice the usual timeout is met."""
    for done in meet(late_s=4, patience_s=60, folder=tmp_path):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("'") == 4


def test_ranks_that_never_come_are_said(tmp_path: Path) -> None:
    """Oracle: exit code 2 and the address, no traceback."""
    waiting, _ = meet(late_s=8, patience_s=3, folder=tmp_path)
    assert waiting.returncode == 2
    assert "the 2 ranks did not meet at 127.0.0.1:" in waiting.stderr and "Traceback" not in waiting.stderr


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    """Oracle: exit code 2, and DeepSpeed's flag for another port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = runs.environment(MASTER_ADDR="127.0.0.1", PYTHONPATH=str(runs.ROOT), **world)
        command = [sys.executable, "-c", MEET, "0", "0", "20"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "is in use" in done.stderr and "--master_port" in done.stderr


def test_an_interruption_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the shell's own code for it, and no traceback."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_program(interrupted) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from what was saved last.\n"


class Hosts:
    """A control of two hosts, of which the other says something else."""

    rank, hosts = 0, ("ours", "theirs")

    def __init__(self, **different: str) -> None:
        self.different = different

    def gather(self, message: Any) -> list[Any]:
        return [message, {**message, **self.different}]


@pytest.mark.parametrize("what", ["recipe", "data", "ds_config or batch", "base"])
def test_hosts_that_would_train_something_else(what: str) -> None:
    """Oracle: what differs, on which host, and the way out; nothing is said where all agree."""
    recipe = schema.load("demo")
    joined = ds_config.join(recipe, {"zero_optimization": {"stage": 1}}, 2, "cpu", None)
    nothing: Any = None
    task = session.Task(nothing, nothing, nothing, nothing, identity=lambda: {"base_sha256": "b" * 64})
    agreed: Any = Hosts()
    session._agree_on_inputs(agreed, {"data_sha256": "d" * 64}, recipe, joined, task)
    differing: Any = Hosts(**{what: "f" * 64})
    with pytest.raises(
        DataError, match=rf"the hosts differ in their {what} \(ours: .*, theirs: f{{16}}\): copy"
    ) as error:
        session._agree_on_inputs(differing, {"data_sha256": "d" * 64}, recipe, joined, task)
    assert len(error.value.problems) == 1
