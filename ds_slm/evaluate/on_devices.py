"""A model on several devices of this machine, for `ds-slm eval --devices N`.

    this process: rank 0, with the harness, the files and the first device
      |--pipe--> rank 1 (`rank_process`): the same model on the next device --> `on_ranks.serve`
      |--pipe--> rank 2 ...

Only rank 0 talks to each of the others, so no process group is needed: a pipe closes when either end dies. A rank that
fails says why before it ends; then the remaining ranks are ended. Without a GPU, ranks divide the threads.

Known gap: there is no time limit for a rank that neither answers nor dies.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_slm.errors import DeviceError
from ds_slm.evaluate.on_ranks import RanksScorer
from ds_slm.evaluate.opening import Opened, open_scorer

PROGRAM = "ds_slm.evaluate.rank_process"
"""The program that every rank except 0 runs."""
GOES_ON, FAILED = b"+", b"-"
"""First byte of a message: what the other end waits for follows, or JSON sentences on why this rank ends."""
TO_END_S = 10.0
"""A process whose pipe is closed has ended by then."""


class PipeRanks:
    """One rank's end of the pipes: rank 0 has a pipe to each of the others, each of them has one to rank 0."""

    def __init__(self, rank: int, world_size: int, pipes: Mapping[int, Connection]) -> None:
        self.rank, self.world_size, self._pipes = rank, world_size, pipes
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        """The other ranks, on rank 0."""

    def broadcast(self, message: Any, source: int) -> Any:
        """Rank 0's JSON message on every rank."""
        if self.rank != source:
            return json.loads(self._receive(source))
        for rank in self._pipes:
            self._send(json.dumps(message).encode(), rank)
        return message

    def send(self, tensor: Tensor, receiver: int) -> None:
        """Send a contiguous CPU tensor to one rank."""
        self._send(tensor.numpy().tobytes(), receiver)

    def receive(self, buffer: Tensor, sender: int) -> Tensor:
        """Fill a contiguous CPU tensor with the tensor that one rank sends; returns it.

        Raises:
            DeviceError: on rank 0, if the sender failed or died.
            EOFError: on any other rank, if rank 0 has ended.
        """
        received = torch.frombuffer(bytearray(self._receive(sender)), dtype=buffer.dtype)
        return buffer.copy_(received.view_as(buffer))

    def fail(self, problems: Sequence[str]) -> None:
        """Tell rank 0 why this rank ends."""
        self._pipes[0].send_bytes(FAILED + json.dumps(problems).encode())

    def _send(self, content: bytes, receiver: int) -> None:
        with suppress(ConnectionError):  # it has ended: `_receive` says why
            self._pipes[receiver].send_bytes(GOES_ON + content)

    def _receive(self, sender: int) -> bytes:
        try:
            message = self._pipes[sender].recv_bytes()
        except (EOFError, ConnectionError) as error:
            if self.rank == 0:
                raise DeviceError(self._death_of(sender)) from error
            raise EOFError from error
        if message[:1] == FAILED:
            raise DeviceError([f"rank {sender} of {self.world_size}: {one}" for one in json.loads(message[1:])])
        return message[1:]

    def _death_of(self, rank: int) -> str:
        """The message about a rank that ended without a message."""
        process = self.processes[rank]
        with suppress(subprocess.TimeoutExpired):
            process.wait(TO_END_S)
        code = process.returncode or 0
        how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        return (
            f"rank {rank} of {self.world_size} died ({how}): memory may be too small for {self.world_size} copies of "
            "the model; score on fewer --devices."
        )


@contextmanager
def opened_on(devices: int, paths: Sequence[Path]) -> Iterator[list[Opened]]:
    """Open models, each on `devices` devices: GPUs, or processes on the CPU if there is no GPU.

    Within the context, scoring raises DeviceError if a rank fails or dies.

    Args:
        devices: the number of devices; one needs no other process.
        paths: as `open_scorer` takes them.

    Raises:
        UserError: as `open_scorer`; DeviceError if there are fewer GPUs.
    """
    refuse_missing_devices(devices)
    models = [open_scorer(path) for path in paths]
    if devices == 1:
        yield models
        return

    with ExitStack() as stack:
        threads = stack.enter_context(_shared_threads(devices))
        ranks = [stack.enter_context(_started(model, devices, threads)) for model in models]
        yield [replace(model, scorer=RanksScorer(model.scorer, one)) for model, one in zip(models, ranks, strict=True)]


def refuse_missing_devices(devices: int) -> None:
    """Raise DeviceError if this machine has GPUs, but fewer than `devices`."""
    there = torch.cuda.device_count()
    if 0 < there < devices:
        raise DeviceError(f"--devices {devices}: this machine shows {there} CUDA devices; name as many, or fewer.")


@contextmanager
def _shared_threads(devices: int) -> Iterator[int]:
    """The threads of each rank, set for this one: ranks on a CPU divide them, unless OMP_NUM_THREADS decides."""
    before = torch.get_num_threads()
    shares = not os.environ.get("OMP_NUM_THREADS") and not torch.cuda.is_available()
    threads = max(before // devices, 1) if shares else before

    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


@contextmanager
def _started(opened: Opened, devices: int, threads: int) -> Iterator[PipeRanks]:
    """Rank 0's pipes to the others: processes that begin to open the model now, and end with the context."""
    pipes: dict[int, Connection] = {}
    ranks = PipeRanks(0, devices, pipes)
    model = [str(opened.facts["path"]), str(opened.facts["sha256"])]

    # Each gets its end of a pipe, and its own session, because Ctrl-C is for rank 0, which ends the others.
    try:
        for rank in range(1, devices):
            pipes[rank], theirs = multiprocessing.Pipe()
            with theirs:
                numbers = [str(number) for number in (theirs.fileno(), rank, devices, threads)]
                ranks.processes[rank] = subprocess.Popen(
                    [sys.executable, "-P", "-m", PROGRAM, *numbers, *model],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
        yield ranks

    # The processes hold nothing that must be saved.
    finally:
        for process in ranks.processes.values():
            process.kill()
            process.wait()
