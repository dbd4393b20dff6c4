"""Messages between ranks, except gradients: small ones and whole tensors, over a gloo group on the CPU.

Messages are JSON, so nothing that arrives is ever unpickled. Every function here is collective (all ranks call
it) unless it says otherwise.
"""

import json
import os
import socket
import uuid
from copy import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_slm.distributed.problems import raise_on_all
from ds_slm.distributed.world import host_id
from ds_slm.errors import CheckpointError

BACKGROUND_TIMEOUT = timedelta(hours=6)
"""Limit for one message of a save: a writer's disk may delay it for longer than gloo's 30 minutes. A dead rank is
noticed earlier: its connections close, and the launcher ends the others. This is for a host that lost its power."""


class Control:
    """A gloo group over all ranks, and who lives where."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo")
        self.hosts: list[str] = self.gather(socket.gethostname())
        """Host name of each rank."""
        machines = self.gather(host_id())
        self.leaders = [rank for rank, machine in enumerate(machines) if machine not in machines[:rank]]
        """The first rank of each host, in the order of ranks; only it touches that host's run folder."""
        self.leaders_of_ranks = [machines.index(machine) for machine in machines]
        """The leader of each rank's host."""
        self.ranks_on_host = machines.count(machines[self.rank])

    def background(self) -> "Control":
        """The same ranks over another group, for a thread that sends messages beside this one. Collective."""
        other = copy(self)
        other.group = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT)
        return other

    @property
    def leads_host(self) -> bool:
        """Whether this rank is the leader of its host."""
        return self.rank in self.leaders

    def writers(self, folder: Path) -> list[int]:
        """The leaders that each have a separate `folder`: if hosts share a disk, one of them writes for all.

        Raises:
            CheckpointError: on every rank, if a host cannot write there.
        """
        launch = self.broadcast(uuid.uuid4().hex[:8], 0)  # tells its marks from those a killed launch left
        mark = folder / f".host-{self.rank}-{launch}"

        # Every leader leaves its mark; on a shared disk it then sees the others' marks, too.
        problems: list[str] = []
        if self.leads_host:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
            except OSError as error:
                problems.append(f"{error.filename or folder}: {error.strerror or error}.")
        raise_on_all(self, problems, CheckpointError)

        # All have answered, so all marks are there. The lowest rank of each disk writes for it.
        seen = [rank for rank in self.leaders if (folder / f".host-{rank}-{launch}").exists()]
        first_seen = self.gather(seen[0] if seen else -1)

        if self.leads_host:
            mark.unlink(missing_ok=True)
        return [rank for rank in self.leaders if first_seen[rank] == rank]

    def gather(self, message: Any) -> list[Any]:
        """Every rank's JSON message, in the order of ranks, on every rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([text.numel()]), group=self.group)
        longest = int(max(lengths))
        padded = torch.nn.functional.pad(text, (0, longest - text.numel()))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(one[: int(length)].tolist())) for one, length in zip(texts, lengths, strict=True)]

    def broadcast(self, message: Any, source: int) -> Any:
        """The source rank's JSON message on every rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = torch.tensor([text.numel()])
        dist.broadcast(length, source, group=self.group)
        if self.rank != source:
            text = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, source, group=self.group)
        return json.loads(bytes(text.tolist()))

    def broadcast_tensor(self, tensor: Tensor, source: int) -> Tensor:
        """Fill a CPU tensor with the source rank's values, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, source, group=self.group)
        return tensor

    def send(self, tensor: Tensor, receiver: int) -> None:
        """Send a contiguous CPU tensor to one rank, which calls `receive`. Not collective."""
        dist.send(tensor, receiver, group=self.group)

    def receive(self, buffer: Tensor, sender: int) -> Tensor:
        """Fill a contiguous CPU tensor with the tensor that one rank sends; returns it. Not collective."""
        dist.recv(buffer, sender, group=self.group)
        return buffer

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)
