"""Where a run runs: the hosts of a hostfile, and what DeepSpeed's launcher is given about them."""
