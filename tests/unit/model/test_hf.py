"""An exported configuration says all of the shape that changes what the model computes."""

from typing import Any

import pytest

from ds_slm.errors import CheckpointError
from ds_slm.model import hf
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Model

SHAPE = loading.load("demo").model
OTHER_VALUES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 5000,
    "max_position_embeddings": 512,
    "rope_theta": 2_500.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "qk_norm": True,
    "exclusive_attention": True,
    "init_std": 0.02,
}
"""Another value than the demo's for each field that a configuration carries. A new one belongs here..."""
INITIAL = ("embedding_init_std", "scaled_residual_init")
"""... or here, where it changes the first weights alone: nobody needs it to use a model."""


def test_every_field_is_looked_at() -> None:
    """Oracle: the fields of a shape, and the demo's values."""
    assert {*OTHER_VALUES, *INITIAL} == set(Model.model_fields)
    assert not [name for name, value in OTHER_VALUES.items() if getattr(SHAPE, name) == value]


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_an_export_tells_the_field_or_is_refused(field: str) -> None:
    """Oracle: the shape that was exported; else another program would compute something else from the same weights."""
    shape = SHAPE.model_copy(update={field: OTHER_VALUES[field]})
    try:
        config = hf.hf_config(shape, eos_id=0, dtype="float32")
    except CheckpointError as refused:
        assert field in str(refused)
    else:
        assert hf.shape_from_hf(config) == shape
