"""Which rank a process is: variables of a launch, of none, and of an earlier one."""

import re

import pytest

from ds_slm.distributed import world as worlds
from ds_slm.errors import DeviceError

LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_a_launched_rank() -> None:
    """Oracle: the variables, read by hand."""
    environ = dict(LAUNCHED)
    assert worlds.read(environ) == worlds.World(3, 4, 1, "node1", 29500, 2)
    assert environ == LAUNCHED


@pytest.mark.parametrize(
    "leftover",
    [
        {},
        {"WORLD_SIZE": "2"},
        {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"},
        {"MASTER_PORT": "none"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
        {"LOCAL_RANK": "1", "LOCAL_SIZE": "x"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"},
    ],
)
def test_without_a_rank_a_process_is_one_device(leftover: dict[str, str]) -> None:
    """Oracle: all five variables that torch and DeepSpeed look for are there, and nothing they would misread."""
    environ = dict(leftover)
    world = worlds.read(environ)
    assert (world.rank, world.size, world.local_rank, world.address) == (0, 1, 0, "127.0.0.1")
    assert [environ[name] for name in worlds.LAUNCH_VARIABLES] == ["0", "1", "0", "127.0.0.1", str(world.port)]
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in environ and "TORCHELASTIC_USE_AGENT_STORE" not in environ
    assert environ.get("LOCAL_SIZE") is None
    assert worlds.read(environ).size == 1, "asked again"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "x"}, "RANK='x', expected a whole number"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "4"}, "RANK=4, expected less than WORLD_SIZE=4"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK=5, expected at most RANK=3"),
        ({"LOCAL_RANK": "\u00b2"}, "LOCAL_RANK='\u00b2'"),
        ({"LOCAL_SIZE": "many"}, "LOCAL_SIZE='many'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999, expected a port of at most 65535"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(change: dict[str, str | None], told: str) -> None:
    """Oracle: the variable, what it should be, and the way out."""
    environ = {name: value for name, value in {**LAUNCHED, **change}.items() if value is not None}
    with pytest.raises(DeviceError) as refused:
        worlds.read(environ)
    assert any(problem.startswith(told) for problem in refused.value.problems), refused.value.problems
    assert "launch with `deepspeed`" in refused.value.problems[-1]


def test_all_nonsense_is_told_at_once() -> None:
    """Oracle: by hand: of a launch's five variables one is wrong and four are missing; last comes the way out."""
    with pytest.raises(DeviceError) as refused:
        worlds.read({"RANK": "x"})
    *problems, way_out = refused.value.problems
    assert sorted(re.split("[= ]", one)[0] for one in problems) == sorted(LAUNCHED.keys() - {"LOCAL_SIZE"})
    assert "launch with `deepspeed`" in way_out


def test_ignored_variables_are_said() -> None:
    """Oracle: nothing is silent, and nothing is said where there is nothing to say."""
    note = worlds.ignored({"WORLD_SIZE": "2", "SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "4"})
    assert note is not None and note.startswith("note: WORLD_SIZE=2, OMPI_COMM_WORLD_SIZE=4: ignored")
    assert worlds.ignored({"SLURM_NTASKS": "1"}) is None
    assert worlds.ignored(LAUNCHED) is None
