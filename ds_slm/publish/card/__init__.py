"""The model card of an exported checkpoint: its head, its text, its pictures."""
