"""The operations whose fastest correct form depends on the device."""

from pathlib import Path

import pytest
import torch

from ds_slm.model import kernels
from ds_slm.recipe import ds_config, loading
from ds_slm.recipe.schema import Recipe
from tests.support import runs


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loading.load(str(runs.write_recipe(tmp_path)))


@pytest.mark.parametrize("deterministic", [True, False])
def test_sums_are_fp32_and_in_a_fixed_order_where_asked(recipe: Recipe, deterministic: bool) -> None:
    """Oracle: torch's own switches, all of which a GPU's products or attention read; and what a run says of itself."""
    ds_file = {"zero_optimization": {"stage": 1}, "deterministic": deterministic}
    engine_config = ds_config.join(recipe, ds_file, 1, "cuda", None)
    assert engine_config.deterministic is deterministic and "deterministic" not in engine_config.deepspeed
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    try:
        kernels.fix_sums(engine_config.deterministic)
        assert not products.allow_bf16_reduced_precision_reduction and not products.allow_fp16_accumulation
        assert not products.allow_fp16_reduced_precision_reduction and not products.allow_tf32
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        said = kernels.effective_kernels("cuda", torch.bfloat16)["sums"]
        assert said == ("fp32, in a fixed order (deterministic)" if deterministic else "fp32, in any order")
    finally:
        kernels.fix_sums(deterministic=False)
