"""HOW it is trained: the only rooms that know DeepSpeed."""
