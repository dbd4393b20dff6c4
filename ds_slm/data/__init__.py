"""FROM text TO rows: tokenizers, document sources, token shards, the order of rows, and the rows of a step."""
