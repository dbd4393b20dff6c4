"""Where a run runs: the hosts of a hostfile, and what DeepSpeed's launcher gets to know about them."""
