"""What a model's figures are made of: continuations of contexts, scored by their log-probabilities."""
