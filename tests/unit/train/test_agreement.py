"""What the hosts of a launch have in common."""

from ds_slm.train import agreement


def test_hosts_that_multiply_in_different_ways_are_told() -> None:
    """Oracle: by hand: a host with bf16 instructions beside one without; and two of one kind."""
    [told] = agreement.mixed_products(["new", "new", "old"], ["cpu bfloat16", "cpu bfloat16", "cpu fp32, upcast"])
    assert "(new: cpu bfloat16; old: cpu fp32, upcast)" in told
    assert agreement.mixed_products(["one", "two"], ["cpu bfloat16", "cpu bfloat16"]) == []
