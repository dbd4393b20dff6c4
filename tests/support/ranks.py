"""Ranks as threads of one process: what they say to each other, without a process group.

Each has a control of its own (`distributed.ranks.Control`'s methods), and is a host of its own where a test says so.
"""

import json
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

PATIENCE_S = 60.0
"""A rank that waits for longer has been left alone: the test fails."""


class _Line:
    """One group of ranks."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.slots: list[Any] = [None] * count
        self.queues = {(a, b): queue.Queue() for a in range(count) for b in range(count)}


class ThreadControl:
    """What one rank knows of the others."""

    def __init__(self, rank: int, hosts: list[str], lines: list[_Line]) -> None:
        self.rank, self.world_size, self.hosts = rank, len(hosts), hosts
        self.leaders = [other for other, host in enumerate(hosts) if host not in hosts[:other]]
        self._lines = lines

    @property
    def leads_host(self) -> bool:
        return self.rank in self.leaders

    def background(self) -> "ThreadControl":
        return ThreadControl(self.rank, self.hosts, self._lines[1:])

    def gather(self, message: Any) -> list[Any]:
        line = self._lines[0]
        line.slots[self.rank] = json.dumps(message)
        line.barrier.wait(PATIENCE_S)
        everything = [json.loads(text) for text in line.slots]
        line.barrier.wait(PATIENCE_S)
        return everything

    def broadcast(self, message: Any, source: int) -> Any:
        return self.gather(message if self.rank == source else None)[source]

    def broadcast_tensor(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        return tensor.copy_(torch.tensor(self.broadcast(tensor.tolist(), source), dtype=tensor.dtype))

    def barrier(self) -> None:
        self._lines[0].barrier.wait(PATIENCE_S)

    def send(self, tensor: torch.Tensor, receiver: int) -> None:
        self._lines[0].queues[self.rank, receiver].put(tensor.clone())

    def receive(self, buffer: torch.Tensor, sender: int) -> torch.Tensor:
        buffer.copy_(self._lines[0].queues[sender, self.rank].get(timeout=PATIENCE_S))
        return buffer


def run(hosts: list[str], function: Callable[[Any], Result]) -> list[Result]:
    """The results of all ranks, one on each of the hosts named; raises what one of them raised."""
    lines = [_Line(len(hosts)) for _ in range(2)]
    results: list[Any] = [None] * len(hosts)
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            results[number] = function(ThreadControl(number, hosts, lines))
        except BaseException as error:
            errors.append(error)
            for line in lines:
                line.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((one for one in errors if not isinstance(one, threading.BrokenBarrierError)), errors[0])
    return results
