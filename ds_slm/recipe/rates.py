"""How fast kinds of devices multiply, and which of them this machine's CPU is.

DEVICES       datasheets of GPUs; CPU cores as measured
/proc/cpuinfo --own_cpu--> the row of DEVICES that is this machine's, and what it rests on
"""

from dataclasses import dataclass
from pathlib import Path

AMX_MFU, AVX2_MFU, GPU_MFU = 0.3, 0.94, 0.15
"""Share of the peak that training is assumed to reach: on CPUs as measured, on a GPU as the published runs did (12 % on
a T4 at 10M parameters). The smaller the model and the larger the GPU, the less."""


@dataclass(frozen=True)
class Device:
    """A kind of device. Peaks are the datasheets', dense; that of a CPU core is a measured product."""

    name: str
    half_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes: int | None
    """None stands for the memory of this machine."""
    has_bf16: bool = True
    mfu: float = GPU_MFU


AMX_CORE = Device("CPU core (AMX)", 0.6e12, 0.065e12, None, mfu=AMX_MFU)
AVX2_CORE = Device("CPU core (AVX2)", 0.062e12, 0.0715e12, None, mfu=AVX2_MFU)
"""fp32: what two cores of a Zen 3 reached training slm-124m, halved (docs/benchmarks.md). Half precision is upcast and
rounded, which took 17.7 ms where fp32 took 15.3 ms (docs/log.md)."""

DEVICES = (
    AMX_CORE,
    AVX2_CORE,
    Device("NVIDIA T4", 65e12, 8.1e12, 16 * 10**9, has_bf16=False),
    Device("NVIDIA RTX 4090", 165.2e12, 82.6e12, 24 * 10**9),
    Device("NVIDIA A100", 312e12, 19.5e12, 80 * 10**9),
    Device("NVIDIA H100", 989.5e12, 67e12, 80 * 10**9),
    Device("NVIDIA H200", 989.5e12, 67e12, 141 * 10**9),
)


@dataclass(frozen=True)
class OwnCpu:
    """What is known of this machine's CPU."""

    device: Device | None
    """Its row of DEVICES; None where no rate is known."""
    basis: str
    """What that row rests on, in words."""


def own_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> OwnCpu:
    """Which row of DEVICES stands for a core of this machine, by the instructions its kernel lists."""
    try:
        flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:  # not Linux
        flags = set()
    if "amx_bf16" in flags:
        return OwnCpu(AMX_CORE, "it has AMX")
    if "avx512f" in flags:
        basis = "it has AVX-512, on which nothing was measured yet: it should do more than the AVX2 core of a Zen 3"
        return OwnCpu(AVX2_CORE, basis)
    if "avx2" in flags:
        basis = "it has AVX2; measured on two cores of a Zen 3 that trained slm-124m in fp32 (docs/benchmarks.md)"
        return OwnCpu(AVX2_CORE, basis)
    return OwnCpu(None, "it has neither AMX nor AVX2")
