"""The process group of all ranks, which have met: joined under DeepSpeed, and left where all ranks leave alike."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ds_slm.distributed import rendezvous
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.store import first_line, taken
from ds_slm.engine.devices import device_type
from ds_slm.errors import RAISED_ON_ALL_RANKS, DeviceError, MeetingError


def connect() -> Control:
    """Join the process group of all ranks, which have met. The backend is DeepSpeed's choice: gloo or nccl.

    Raises:
        DeviceError: a device that is not there, or a host that the others cannot reach.
    """
    import deepspeed

    # A shared-memory all-reduce for CPU inference, compiled with g++ at every first start (minutes on a small machine;
    # a process killed meanwhile leaves a lock that hangs the next). Training never calls it.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

    if device_type() == "cuda":
        local_rank = rendezvous.current().world.local_rank
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} CUDA devices: give it fewer "
                "slots in the hostfile, or widen CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)

    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        world = rendezvous.current().world
        if world.size == 1:
            raise MeetingError(taken(world)) from error
        raise MeetingError(f"the ranks cannot connect to each other: {first_line(error)}.") from error

    return Control()


@contextmanager
def connected() -> Iterator[Control]:
    """The process group, left where all ranks leave alike. After any other error it stays: the process ends with it."""
    control = connect()
    try:
        yield control
    except RAISED_ON_ALL_RANKS:
        disconnect(control)
        raise
    disconnect(control)


def disconnect(control: Control) -> None:
    """Leave the process group. Collective: only if all ranks leave alike, or another may be inside a collective."""
    rendezvous.current().close()
    control.barrier()
    dist.destroy_process_group()
