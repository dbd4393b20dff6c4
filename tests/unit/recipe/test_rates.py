"""Which row of the plan stands for this machine's CPU."""

from pathlib import Path

import psutil
import pytest
import torch

from ds_slm.recipe import rates


@pytest.mark.parametrize(
    ("flags", "device", "basis"),
    [
        ("fpu avx2 avx512f amx_bf16", rates.AMX_CORE, "AMX"),
        ("fpu avx2 avx512f avx512_bf16", rates.AVX2_CORE, "nothing was measured"),
        ("fpu avx avx2 fma", rates.AVX2_CORE, "two cores of a Zen 3"),
        ("fpu sse2", None, "neither"),
    ],
)
def test_a_cpu_is_known_by_its_flags(flags: str, device: rates.Device | None, basis: str, tmp_path: Path) -> None:
    """Oracle: the kernel's names of the instructions; each answer says what it rests on."""
    (tmp_path / "cpuinfo").write_text(f"model name : a CPU\nflags : {flags}\n")
    own = rates.own_cpu(tmp_path / "cpuinfo")
    assert own.device is device and basis in own.basis


def test_a_machine_without_cpuinfo_has_no_rate(tmp_path: Path) -> None:
    """Oracle: no file, no claim."""
    assert rates.own_cpu(tmp_path / "missing").device is None


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    """Oracle: the limit where there is one; this machine's pages, as psutil counts them, where there is none."""
    limit = tmp_path / "memory.max"
    machine = psutil.virtual_memory().total
    assert rates.own_memory_bytes(limit) == machine
    for text, expected in (("max\n", machine), ("1000000\n", 1_000_000)):
        limit.write_text(text)
        assert rates.own_memory_bytes(limit) == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_products_are_those_that_torch_takes(precision: str) -> None:
    """Oracle: oneDNN's own answer on this machine."""
    check = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")
    assert (precision in rates.own_cpu().half_products) == check()
