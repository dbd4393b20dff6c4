"""The benchmark of attention's backward pass: a row for each shape, or why there is none."""

import sys

import pytest
import torch

from benchmarks import cpu_attention as bench
from ds_slm.errors import DeviceError
from ds_slm.model import cpu_attention


def run(monkeypatch: pytest.MonkeyPatch) -> int:
    """Its command, with one small shape."""
    arguments = ["gpt-s-1.4m", "--rows", "1", "--tokens", "48", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["cpu_attention.py", *arguments])
    return bench.main()


def test_both_passes_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: float64, whose distance stands in the row."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no AVX-512 bf16")
    assert run(monkeypatch) == 0
    cells = next(line for line in capsys.readouterr().out.splitlines() if "gpt-s" in line).split("│")
    torchs, ours = map(float, cells[-2].split(","))
    assert 0 < ours < 4e-3 and ours < 1.2 * torchs


def test_nothing_is_told_of_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the reason is that of the build."""
    monkeypatch.setattr(cpu_attention, "build", lambda: "this CPU has no AVX-512 bf16")
    with pytest.raises(DeviceError, match="nothing to measure: this CPU has no AVX-512 bf16"):
        run(monkeypatch)
