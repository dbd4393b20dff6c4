"""ds_slm: train small language models with DeepSpeed, from raw text to a published model card."""

__version__ = "0.1.0"
