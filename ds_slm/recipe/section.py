"""What every section of a recipe is: immutable, without unknown keys, and hashed as version 0.1 hashed it.

A new field has a default with which a recipe means what it meant before, and is marked:

    dropout: Annotated[float, NEWER] = 0.0

Recipes, prepared data and runs of earlier versions then keep their hashes: see `Section.dump_for_hash`.
CONTRIBUTING.md says which other files a new field or kind needs.
"""

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

WHOLE_NUMBERS = range(-(1 << 63), 1 << 63)
"""The whole numbers that TOML, and every library that gets one, can hold."""
NEWER = "newer than version 0.1"
"""Marks a field that version 0.1 did not have."""
HASHED = {"hashed": True}
"""Context of a dump that is hashed, or compared with an earlier dump."""


def raise_together(problems: list[str]) -> None:
    """For a validator: raise ValueError with every problem, a line each, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


class Section(BaseModel):
    """A table of the recipe: immutable, no unknown keys, no conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, int) and number not in WHOLE_NUMBERS for number in numbers):
            raise ValueError("got a whole number of more than 64 bits; expected a smaller one")
        return value

    def dump_for_hash(self, include: set[str] | None = None, exclude: set[str] | None = None) -> dict[str, Any]:
        """Plain data that are hashed, or compared with what an earlier version has written.

        Names are as in version 0.1, and a field that is NEWER is left out while it holds its default. So a new field
        changes only the hashes of recipes that set it.
        """
        return self.model_dump(mode="json", include=include, exclude=exclude, context=HASHED)

    @model_serializer(mode="wrap")
    def _leave_out_newer_defaults(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        kept = dump(self)
        if info.context == HASHED:
            for name in newer_fields(type(self)):
                if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                    kept.pop(name, None)
        return kept


def newer_fields(section: type[Section]) -> set[str]:
    """Names of the fields that are marked NEWER."""
    return {name for name, field in section.model_fields.items() if NEWER in field.metadata}
