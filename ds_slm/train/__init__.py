"""One launch of a run, and its loop."""
