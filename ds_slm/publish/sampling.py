"""How the next token is drawn, as plain data: for `generate`, and for a conversation, where people change it."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ds_slm.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits. By default all of them count, unchanged."""

    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids already present."""
    seed: int = 0


UNFILTERED = Sampling()
GREEDY = Sampling(temperature=0)

EXPECTED = {
    "temperature": (lambda value: value == 0 or 1e-3 <= value <= 1e3, "0, or 0.001 to 1000"),
    "top_k": (lambda value: 0 <= value < 2**31, "0 or more, and less than 2**31"),
    "top_p": (lambda value: 0 < value <= 1, "more than 0, and 1 at most"),
    "repetition_penalty": (lambda value: 1e-2 <= value <= 1e2, "0.01 to 100"),
    "seed": (lambda value: 0 <= value < 2**63, "0 or more, and less than 2**63"),
    "max_new_tokens": (lambda value: 1 <= value < 2**31, "1 or more, and less than 2**31"),
}
"""Setting -> a check of its value, and the allowed values in words. Within them, fp32 logits stay finite."""


@dataclass(frozen=True)
class Settings(Sampling):
    """How an assistant answers. Raises ConfigError with every value that is not allowed."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    """The longest answer."""

    def __post_init__(self) -> None:
        values = [(name, getattr(self, name), *EXPECTED[name]) for name in self.names()]
        if problems := [
            f"{name} is {value}: expected {what}." for name, value, is_right, what in values if not is_right(value)
        ]:
            raise ConfigError(problems)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the settings."""
        return [field.name for field in fields(cls)]

    def changed(self, pair: str) -> "Settings":
        """The same with one other setting, KEY=VALUE. Raises ConfigError if the key or value is not allowed."""
        # Not above: pydantic comes with it, and every --help reads this file.
        from ds_slm.recipe.problems import nearest

        key, equals, text = (part.strip() for part in pair.partition("="))
        name = key.replace("-", "_")
        if name not in self.names() or not equals:
            raise ConfigError(
                f"{pair!r}: expected KEY=VALUE, with one of {', '.join(self.names())}{nearest(name, self.names())}."
            )

        kind = type(getattr(self, name))
        try:
            value: Any = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name} is {text!r}: expected {what}, {EXPECTED[name][1]}.") from error
        return replace(self, **{name: value})
