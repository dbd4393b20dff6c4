"""Tiny models as others publish them: made, and saved, by transformers."""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 64,
    "initializer_range": 0.2, "rope_theta": 2_500.0,
}  # fmt: skip
KINDS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False}),
}
"""Name -> model_type, and what of its configuration is not that of all."""


def save_model(folder: Path, kind: str, tokenizer_folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    """A fresh model that transformers saves, with its tokenizer; returns it.

    Args:
        folder: where it is saved.
        kind: one of KINDS.
        tokenizer_folder: its tokenizer.
        dtype: of the stored weights.
        changes: passed on to `save_pretrained`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model_type, fields = KINDS[kind]
    theta = SIZES["rope_theta"]
    config = AutoConfig.for_model(model_type, **SIZES, **fields, eos_token_id=0, bos_token_id=None)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder, **changes)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return model
