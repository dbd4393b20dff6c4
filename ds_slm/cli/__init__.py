"""What a user types: the commands of `ds-slm`, and every flag. Only the programs import it, for their flags."""
