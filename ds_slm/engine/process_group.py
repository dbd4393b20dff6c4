"""The process group of all ranks: joined under DeepSpeed once ranks have met, and left if all ranks leave together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ds_slm.distributed import rendezvous
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.store import first_line, taken
from ds_slm.engine.deepspeed_workarounds import without_inference_kernel
from ds_slm.engine.devices import device_type
from ds_slm.errors import RAISED_ON_ALL_RANKS, DeviceError, MeetingError


def connect() -> Control:
    """Join the process group of all ranks, once they have met. DeepSpeed chooses the backend: gloo or nccl.

    Raises:
        DeviceError: a device is missing, or the other hosts cannot reach this one.
    """
    import deepspeed

    without_inference_kernel()

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
    """The process group, left if all ranks leave together. After any other error it stays until the process ends."""
    control = connect()
    try:
        yield control
    except RAISED_ON_ALL_RANKS:
        disconnect(control)
        raise
    disconnect(control)


def disconnect(control: Control) -> None:
    """Leave the process group. Collective: all ranks must leave, because another may be inside a collective."""
    rendezvous.current().close()
    control.barrier()
    dist.destroy_process_group()
