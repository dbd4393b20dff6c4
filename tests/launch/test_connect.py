"""How ranks meet, and what hosts must agree on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_slm.errors import DataError, run_program
from ds_slm.recipe import ds_config, loading
from ds_slm.train import agreement
from tests.support import runs

MEET = """
import sys
import torch
import torch.distributed as dist
from ds_slm.distributed import rendezvous
from ds_slm.engine import process_group
def main():
    rendezvous.current().arrive(None)
    with process_group.connected() as control:
        if control.rank == 1:
            raise ZeroDivisionError("on rank 1 alone")
        dist.all_reduce(torch.ones(1), group=control.group)  # never answered
sys.exit(rendezvous.run_rank(main))
"""


def test_a_crash_on_one_rank_ends_those_inside_a_collective(tmp_path: Path) -> None:
    """Two ranks without a launcher. Oracle: both end with code 1 and at once; the traceback is told once."""
    port, processes = str(runs.free_port()), []
    for rank in range(2):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        environment = runs.environment(MASTER_ADDR="127.0.0.1", PYTHONPATH=str(runs.ROOT), **world)
        command, pipe = [sys.executable, "-c", MEET], subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stdout=pipe, stderr=pipe))
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert "ZeroDivisionError: on rank 1 alone" in outputs[1] and "Traceback" in outputs[1]
    assert "Traceback" not in outputs[0]


WATCH = """
import os, sys, threading
def watch(event, details):
    if event == "os.putenv" and threading.active_count() > 1 and os.fsdecode(details[0]) not in os.environ:
        with open({file!r}, "a") as file:
            print(os.fsdecode(details[0]), file=file)
sys.addaudithook(watch)
"""


def test_the_environment_grows_before_there_is_a_second_thread(tmp_path: Path) -> None:
    """A whole launch on two ranks, watched by Python's audit. Oracle: no name is new once a thread may read them.

    Where the environment grows while a thread looks up rank 0's name, that rank now and then ends by SIGSEGV.
    """
    added = tmp_path / "added"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(file=str(added)))
    runs.write_corpus(tmp_path / "corpus.jsonl")
    recipe = runs.write_recipe(tmp_path, text=runs.TINY.replace("steps = 20", "steps = 2"))

    command = runs.deepspeed_command(2, "--recipe", recipe, "--run-dir", tmp_path / "run", "--data-root", tmp_path)
    done = runs.run(command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not added.exists(), added.read_text()
    assert "libgomp" not in done.stdout + done.stderr


def test_an_interruption_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the shell's own code for it, and no traceback."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_program(interrupted) == 130
    assert (
        capsys.readouterr().err == "interrupted: the same command goes on from what was saved last, if anything was.\n"
    )


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
    recipe = loading.load("demo")
    engine_config = ds_config.join(recipe, {"zero_optimization": {"stage": 1}}, 2, "cpu", None)
    base = {"base_sha256": "b" * 64}
    agreed: Any = Hosts()
    agreement.agree_on_inputs(agreed, {"data_sha256": "d" * 64}, recipe, engine_config, base)
    differing: Any = Hosts(**{what: "f" * 64})
    with pytest.raises(
        DataError, match=rf"the hosts differ in their {what} \(ours: .*, theirs: f{{16}}\): copy"
    ) as error:
        agreement.agree_on_inputs(differing, {"data_sha256": "d" * 64}, recipe, engine_config, base)
    assert len(error.value.problems) == 1
