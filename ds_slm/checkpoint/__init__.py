"""A run's checkpoints: what is on disk, saving behind training, resuming, which one is the best."""
