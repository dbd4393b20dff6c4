"""WHAT is trained: pure data. Imports neither torch nor deepspeed."""
