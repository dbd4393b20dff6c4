"""How ranks meet, and what hosts must agree on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_slm.errors import DataError, run_program
from ds_slm.recipe import ds_config, schema
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
    recipe = schema.load("demo")
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
