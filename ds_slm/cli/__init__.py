"""What a user types: the verbs of `ds-slm`, and every flag. Only the programs import it, for their flags."""
