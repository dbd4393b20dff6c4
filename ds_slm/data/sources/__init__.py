"""Text: where a source is, and its documents from a position on."""
