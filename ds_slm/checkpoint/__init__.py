"""A run's checkpoints: files on disk, saving in the background, resuming, and which one is the best."""
