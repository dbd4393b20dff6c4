"""Supervised fine-tuning on conversations: its additions to ds_slm.train."""
