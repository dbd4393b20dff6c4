"""Where a run runs: the hosts of a hostfile, and what DeepSpeed's launcher was told about them."""
