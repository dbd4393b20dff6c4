"""A rank's device: the kind that DeepSpeed found, the precisions it has, and how ranks share a host's cores."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ds_slm.distributed import network
from ds_slm.distributed.ranks import Control
from ds_slm.errors import DeviceError
from ds_slm.model import kernels
from ds_slm.recipe.budget import offloads_optimizer


def device_type() -> str:
    """'cpu', or the accelerator DeepSpeed found."""
    return accelerator().device_name()


def current_device() -> torch.device:
    """This rank's device, once it is connected."""
    kind = device_type()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def accelerator() -> Any:
    """DeepSpeed's accelerator."""
    network.choose_accelerator(torch.version)
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def refuse_missing_precision(precision: str) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        DeviceError: the device cannot compute in the recipe's precision.
        ConfigError: the environment variable that chooses the products has an unknown value.
    """
    kernels.chosen_products()
    device = accelerator()
    supported = {
        "fp32": True,
        "fp16": bool(device.is_fp16_supported()),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if device.device_name() == "cuda" else True,
    }
    if not supported[precision]:
        others = " or ".join(f"--set train.precision={name}" for name, there in supported.items() if there)
        raise DeviceError(
            f"train.precision = {precision!r}: this device ({device.device_name()}) lacks it; use {others}."
        )


def share_cores(control: Control, zero: Mapping[str, Any]) -> int:
    """Divide a host's cores among the ranks that compute on them; returns the threads of this rank. Collective.

    Otherwise each rank would start one thread for every core. Ranks compute on cores on hosts without a GPU, and if the
    optimiser is offloaded. OMP_NUM_THREADS decides if it is set: by the user, or by `ds-slm train`, which divides cores
    in the same way before any library is loaded.

    Args:
        control: the ranks' connection.
        zero: DeepSpeed's zero_optimization section.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    machine = control.leaders_of_ranks[control.rank]
    everyone = control.gather([machine, cores])
    if not os.environ.get("OMP_NUM_THREADS"):
        if device_type() == "cpu" or offloads_optimizer(zero):
            torch.set_num_threads(max(torch.get_num_threads() // everyone.count([machine, cores]), 1))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for bitsandbytes' own OpenMP, loaded later
    return torch.get_num_threads()
