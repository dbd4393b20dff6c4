"""Token shards: prepared, written, opened."""
