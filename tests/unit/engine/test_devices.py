"""How the ranks of a host share its cores."""

import os
from typing import Any

import pytest
import torch

from ds_slm.engine import devices

OFFLOADED, NOT_OFFLOADED = {"offload_optimizer": {"device": "cpu"}}, {"offload_optimizer": {"device": "none"}}
ALL, HALF = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]


class Ranks:
    """Three ranks on this host and one on another, each with the cores it may use."""

    rank, leaders_of_ranks = 0, (0, 0, 0, 3)

    def __init__(self, cores: list[list[int]]) -> None:
        self.cores = cores

    def gather(self, message: Any) -> list[Any]:
        assert message == [0, self.cores[0]]
        return [[leader, cores] for leader, cores in zip(self.leaders_of_ranks, self.cores, strict=True)]


@pytest.mark.parametrize(
    ("device", "zero", "cores", "threads"),
    [
        ("cpu", {}, [ALL] * 4, 2),
        ("cuda", OFFLOADED, [ALL] * 4, 2),
        ("cuda", NOT_OFFLOADED, [ALL] * 4, 8),
        ("cuda", {}, [ALL] * 4, 8),
        ("cpu", {}, [ALL, HALF, HALF, ALL], 8),
        ("cpu", {"offload_optimizer": None}, [HALF, HALF, [4, 5], HALF], 4),
    ],
)
def test_ranks_on_the_same_cores_share_them(
    device: str, zero: dict[str, Any], cores: list[list[int]], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: eight threads by hand: three ranks of this host on the same cores, two of them, or one alone."""
    chosen = [8]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is put back
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores[0]))
    monkeypatch.setattr(devices, "device_type", lambda: device)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    ranks: Any = Ranks(cores)
    assert devices.share_cores(ranks, zero) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    chosen[:] = [8]
    assert devices.share_cores(ranks, zero) == 8  # whoever sets the variable has chosen
