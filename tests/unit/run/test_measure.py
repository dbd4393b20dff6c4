"""What is measured of a device: its peak, by its name."""

import pytest
import torch

from ds_slm.run import measure


@pytest.mark.parametrize(
    ("name", "bf16_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA T400", None),
        ("NVIDIA H1000", None),
    ],
)
def test_a_gpus_peak_is_its_own_datasheets(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16_tflops: float | None
) -> None:
    """Oracle: NVIDIA's datasheets; a GPU whose name only begins alike has no known peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = measure.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == (bf16_tflops and pytest.approx(bf16_tflops * 1e12))
