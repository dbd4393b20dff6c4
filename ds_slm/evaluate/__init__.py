"""A model's figures: continuations of contexts, scored by their log-probabilities."""
