"""How fast kinds of devices multiply, and which of them this machine's CPU is.

DEVICES       datasheets of GPUs; CPU cores as measured
/proc/cpuinfo --own_cpu--> this machine's row of DEVICES, the basis for it, and this machine's memory
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_slm.errors import ConfigError

AMX_MFU, AVX2_MFU, GPU_MFU = 0.4, 0.94, 0.15
"""Share of the peak that training is assumed to reach: measured on CPUs; on a GPU as in the published runs (12 % on a
T4 at 10M parameters). It is lower for smaller models and larger GPUs."""


@dataclass(frozen=True)
class Device:
    """A kind of device. Peaks are the datasheets' dense ones; the peak of a CPU core is a measured product."""

    name: str
    half_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes: int | None
    """Memory of the device; None for a CPU core, which uses its host's."""
    precisions: tuple[str, ...] = ("bf16", "fp16", "fp32")
    """Precisions in which it trains."""
    mfu: float = GPU_MFU

    @property
    def device_type(self) -> str:
        """Torch's name for the type of device."""
        return "cpu" if self.memory_bytes is None else "cuda"


AMX_CORE = Device("CPU core (AMX)", 0.6e12, 0.065e12, None, ("bf16", "fp32"), AMX_MFU)
AVX2_CORE = Device("CPU core (AVX2)", 0.062e12, 0.0715e12, None, ("bf16", "fp32"), AVX2_MFU)
"""fp32: half of what two cores of a Zen 3 reached when they trained slm-124m (docs/benchmarks.md). Half precision is
upcast and rounded, which took 17.7 ms where fp32 took 15.3 ms (docs/log.md)."""

DEVICES = (
    AMX_CORE,
    AVX2_CORE,
    Device("NVIDIA T4", 65e12, 8.1e12, 16 * 10**9, ("fp16", "fp32")),
    Device("NVIDIA RTX 4090", 165.2e12, 82.6e12, 24 * 10**9),
    Device("NVIDIA A100", 312e12, 19.5e12, 80 * 10**9),
    Device("NVIDIA H100", 989.5e12, 67e12, 80 * 10**9),
    Device("NVIDIA H200", 989.5e12, 67e12, 141 * 10**9),
)


HALF_PRODUCTS = {
    "bf16": {"avx512bw", "avx512vl", "avx512dq"},
    "fp16": {"avx512bw", "avx512vl", "avx512dq", "avx512_fp16"},
}
"""Half precision -> the CPU flags with which torch takes oneDNN's products."""


PRODUCTS_VARIABLE = "DS_SLM_HALF_PRODUCTS"
"""Environment variable: how a CPU multiplies half-precision tensors, `native` or `upcast`. If unset, the faster one.
Both forms run on every CPU, so the arithmetic of another kind of CPU can be tried; without the instructions `native`
takes torch's reference loops."""


def chosen_products() -> Literal["native", "upcast"] | None:
    """How the environment says a CPU multiplies half precision; None if the CPU decides.

    Raises:
        ConfigError: it is neither `native` nor `upcast`.
    """
    chosen = os.environ.get(PRODUCTS_VARIABLE) or None
    if chosen not in (None, "native", "upcast"):
        raise ConfigError(f"{PRODUCTS_VARIABLE}={chosen}: expected native, upcast, or unset.")
    return chosen


@dataclass(frozen=True)
class CoreSpeed:
    """Seconds that one core of this machine took for a recipe (ds_slm.engine.core_speed measures them)."""

    micro_batch_s: float
    """Seconds of forward and backward of one micro-batch."""
    update_s_per_value: float
    """Seconds of the optimiser's step for each value of its share."""
    compiled: bool = False
    """Whether blocks were compiled."""


@dataclass(frozen=True)
class OwnCpu:
    """What is known of this machine's CPU."""

    device: Device | None
    """Its row of DEVICES; None if no rate is known."""
    basis: str
    """The reason for choosing that row, in words."""
    memory_bytes: int | None = None
    """Memory of this machine, or of the container that this process is in."""
    half_products: frozenset[str] = frozenset()
    """Half precisions that it multiplies; others are upcast (ds_slm.model.kernels)."""
    speed: CoreSpeed | None = None
    """The measured speed of a core; None if it was not measured."""


def own_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> OwnCpu:
    """Which row of DEVICES stands for a core of this machine, by the instructions its kernel lists."""
    try:
        flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:  # not Linux
        flags = set()
    device, basis = _row(flags)
    by_flags = {name for name, needed in HALF_PRODUCTS.items() if needed <= flags}
    half_products = frozenset({"native": HALF_PRODUCTS, "upcast": (), None: by_flags}[chosen_products()])
    return OwnCpu(device, basis, own_memory_bytes(), half_products)


def _row(flags: set[str]) -> tuple[Device | None, str]:
    if "amx_bf16" in flags:
        return AMX_CORE, "it has AMX"
    if "avx512f" in flags:
        basis = "it has AVX-512, on which nothing was measured yet: it should do more than the AVX2 core of a Zen 3"
        return AVX2_CORE, basis
    if "avx2" in flags:
        return (
            AVX2_CORE,
            "it has AVX2; measured on two cores of a Zen 3 that trained slm-124m in fp32 (docs/benchmarks.md)",
        )
    return None, "it has neither AMX nor AVX2"


def own_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Memory of this machine, or the limit of its container; None if neither is known."""
    found = []
    with contextlib.suppress(ValueError, OSError):  # not every system counts its pages
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):  # "max": no limit; or no such file
        found.append(int(cgroup.read_text()))
    return min(found, default=None)
