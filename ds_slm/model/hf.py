"""The decoder's shape in the Hugging Face format, there and back. Parameter names need no mapping: they are the same.

    Model --hf_config--> config.json --shape_from_hf--> Model

A plain decoder is a Llama, one with QK-norm a Qwen3; exclusive attention has a modeling file of its own, found through
`auto_map` and loaded with trust_remote_code=True. transformers 5 reads `rope_parameters` and `dtype`; `rope_theta` and
`torch_dtype` beside them say the same to transformers 4.

Known gaps: initialisation is not part of a configuration beyond `initializer_range`; no RoPE scaling, biases or sliding
windows; transformers refuses a Llama whose hidden size is not a multiple of its heads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_slm.errors import CheckpointError
from ds_slm.recipe.problems import sentences
from ds_slm.recipe.sections import Model

MODELING_FILE = Path(__file__).with_name("modeling_exclusive.py")
"""Shipped with models of exclusive attention."""

SAME_NAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
"""Fields with the same name and meaning on both sides."""

MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "ds_slm_exclusive": "ExclusiveForCausalLM"}
"""model_type -> architecture."""

CANNOT_BE = "config.json describes a model this decoder cannot be:"
QWEN3_HEAD_DIM, QWEN3_KV_HEADS = 128, 32
"""What transformers takes if a Qwen3's configuration does not name them."""


def hf_config(
    shape: Model, *, eos_id: int | None, pad_id: int | None = None, bos_id: int | None = None, dtype: str
) -> dict[str, Any]:
    """The content of config.json; `dtype` is a torch dtype's name, as in 'float32'."""
    model_type = "ds_slm_exclusive" if shape.exclusive_attention else "qwen3" if shape.qk_norm else "llama"
    config: dict[str, Any] = {name: getattr(shape, name) for name in SAME_NAME}
    config |= {
        "architectures": [MODEL_TYPES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "initializer_range": shape.init_std,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }

    if model_type == "qwen3":
        config |= {"use_sliding_window": False, "sliding_window": None}
    else:
        config["mlp_bias"] = False

    if model_type == "ds_slm_exclusive":
        module = MODELING_FILE.stem
        config["qk_norm"] = shape.qk_norm
        config["auto_map"] = {
            "AutoConfig": f"{module}.ExclusiveConfig",
            "AutoModel": f"{module}.ExclusiveModel",
            "AutoModelForCausalLM": f"{module}.ExclusiveForCausalLM",
        }

    return config


def generation_config(*, eos_id: int | None, pad_id: int | None = None, bos_id: int | None = None) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def shape_from_hf(config: Mapping[str, Any]) -> Model:
    """The shape of a Llama, a Qwen3 or one of our own from the content of its config.json.

    Raises:
        CheckpointError: with everything in it that this decoder does not support.
    """
    model_type, hidden_size = config.get("model_type"), config.get("hidden_size")
    heads = config.get("num_attention_heads") or 1
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers' own order
    rope = dict(found) if isinstance(found, Mapping) else {"rope_type": found}
    layers = config.get("layer_types")

    # This decoder supports one value of each of these keys.
    wanted = {
        "hidden_act": ("silu", config.get("hidden_act", "silu")),
        "attention_bias": (False, bool(config.get("attention_bias"))),
        "mlp_bias": (False, bool(config.get("mlp_bias"))),
        "sliding_window": (None, config.get("sliding_window") if config.get("use_sliding_window") else None),
        "layer_types": (
            ["full_attention"],
            sorted(map(str, {*layers})) if isinstance(layers, list) and layers else ["full_attention"],
        ),
        "rope_type": ("default", rope.get("rope_type", rope.get("type", "default"))),
        "partial_rotary_factor": (1.0, rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))),
        "quantization_config": (None, config.get("quantization_config")),
    }
    problems = [f"{name} is {got!r}, expected {want!r}." for name, (want, got) in wanted.items() if got != want]
    if model_type not in MODEL_TYPES:
        problems.insert(0, f"model_type is {model_type!r}, expected one of {', '.join(MODEL_TYPES)}.")

    # Configurations may leave these out; the values here are transformers' defaults.
    share = hidden_size // heads if isinstance(hidden_size, int) and isinstance(heads, int) else None
    is_left_out = "num_key_value_heads" not in config  # null means something else
    derived = {
        "head_dim": QWEN3_HEAD_DIM if model_type == "qwen3" else share,
        "num_key_value_heads": QWEN3_KV_HEADS if model_type == "qwen3" and is_left_out else heads,
        "tie_word_embeddings": False,
    }
    fields: dict[str, Any] = {
        name: config[name] if config.get(name) is not None else derived.get(name) for name in SAME_NAME
    }
    problems += [f"{name} is missing." for name, value in fields.items() if value is None]
    fields |= {
        "rope_theta": _first(rope.get("rope_theta"), config.get("rope_theta"), 10_000.0),
        "init_std": _first(config.get("initializer_range"), 0.02),
        "qk_norm": model_type == "qwen3" or bool(config.get("qk_norm")),
        "exclusive_attention": model_type == "ds_slm_exclusive",
    }
    if any(value is None for value in fields.values()):
        raise CheckpointError([CANNOT_BE, *problems])
    try:
        shape = Model.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError([CANNOT_BE, *problems, *(f"{one}." for one in sentences(error))]) from error
    if problems:
        raise CheckpointError([CANNOT_BE, *problems])
    return shape
