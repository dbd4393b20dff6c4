"""Supervised fine-tuning on conversations: what it adds to ds_slm.train."""
