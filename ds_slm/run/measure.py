"""Tokens per second, MFU and peak memory.

MFU = FLOPs the model needs per token * tokens per second / peak FLOP/s of all devices. The peak is the datasheet's on a
known GPU and a measured matrix product on a CPU; for an unknown GPU no MFU is given, because it would be a guess.
"""

import contextlib
import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch

from ds_slm.recipe.rates import DEVICES


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device for matrix products; None if it is not known."""
    if device.type == "cuda":
        name, half = torch.cuda.get_device_name(device), dtype != torch.float32
        words = re.split(r"[\s-]", name)  # NVIDIA A100-SXM4-80GB is an A100, a T400 no T4
        known = [one for one in DEVICES if one.name.split()[-1] in words]
        return (known[0].half_flops_per_s if half else known[0].fp32_flops_per_s) if known else None
    from ds_slm.model.kernels import product

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
    """The device's name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine()) + " (cpu)"


def hardware(device: torch.device) -> list[Any]:
    """What a device's speed and memory depend on: its name, memory in bytes, instructions and cores."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return [gpu.name, gpu.total_memory, gpu.major, gpu.minor]
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [device_name(device), memory_bytes, torch.backends.cpu.get_cpu_capability(), os.cpu_count()]


def available_gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process holds or can still allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def release_memory(device: torch.device) -> None:
    """Give memory that is not in use back to the device, and start `peak_memory_bytes` again."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # an error that the GPU cannot recover from: the run will raise it
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # some containers forbid it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process since `release_memory`: of the device on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes() -> int:
    """Bytes of main memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class StepClock:
    """Durations of steps, without what happens between them (evaluation, saving)."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.start_s
