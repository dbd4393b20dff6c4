"""What a user types: the verbs of `ds-slm`, one thin function each. May import every other room; none imports this."""
