"""Tokens per second, MFU and peak memory.

MFU = FLOPs the model needs per token * tokens per second / peak FLOP/s of all devices. The peak is the datasheet's on a
known GPU and a measured matrix product on a CPU; an unknown GPU has no MFU rather than a guessed one.
"""

import platform
import resource
import time
from pathlib import Path

import torch

from ds_slm.recipe.budget import DEVICES


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device for matrix products; None where it is not known."""
    if device.type == "cuda":
        name, half = torch.cuda.get_device_name(device), dtype != torch.float32
        known = [one for one in DEVICES if one.name.split()[-1] in name]
        return (known[0].half_flops_per_s if half else known[0].fp32_flops_per_s) if known else None
    from ds_slm.model.decoder import product

    size = 768
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    durations_s = []
    with torch.no_grad():
        for _ in range(4):
            start_s = time.perf_counter()
            product(left, right)
            durations_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(durations_s)


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine()) + " (cpu)"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: the device's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes() -> int:
    """What this process holds in main memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class StepClock:
    """Durations of steps, without what happens between them (evaluation, saving)."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.start_s
