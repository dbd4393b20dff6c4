"""Which row of the plan stands for this machine's CPU."""

from pathlib import Path

import pytest

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
