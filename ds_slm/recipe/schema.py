"""A recipe: everything that changes the result of a run, as one typed object.

    sections --> Recipe --> identity_sha256

A recipe never holds the number of devices, the micro-batch or the ZeRO stage: those change speed, not the result.
The sections are in sections.py and data_sections.py; loading.py reads a recipe from TOML.
"""

from functools import cache
from typing import Any, Self, get_args

from pydantic import model_validator

from ds_slm.files import sha256_of_json
from ds_slm.recipe.consistency import disagreements
from ds_slm.recipe.data_sections import Data, Tokenizer
from ds_slm.recipe.problems import nearest
from ds_slm.recipe.section import Section
from ds_slm.recipe.sections import Card, Eval, Model, Optimizer, Run, Schedule, Sft, Target, Train

IDENTITY = ("model", "tokenizer", "data", "optimizer", "schedule", "train", "sft")
"""Sections that change the result."""


def changes_result(place: str) -> bool:
    """Whether a `section.key` belongs to a section that changes the result."""
    return place.partition(".")[0] in IDENTITY


class Recipe(Section):
    """A whole recipe, whose sections agree. `loading.load` reads one, and refuses settings without effect as well."""

    card: Card
    model: Model
    tokenizer: Tokenizer
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    run: Run = Run()
    eval: Eval = Eval()
    sft: Sft | None = None
    targets: list[Target] = []
    unstated: dict[str, str] = {}
    """section.field -> our choice and its reason, for what the card does not say."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        problems = disagreements({name: getattr(self, name) for name in Recipe.model_fields})
        for table, places in {"card.sources": self.card.sources, "unstated": self.unstated}.items():
            problems += [
                f"{table}: {place!r} names no field of the recipe{nearest(place, field_names())}"
                for place in places
                if place not in field_names()
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step over all devices."""
        return self.train.global_batch_tokens // self.data.seq_len

    def identity(self) -> dict[str, Any]:
        """The part of the recipe that changes the result, as plain data."""
        kept = self.dump_for_hash(include=set(IDENTITY))
        del kept["train"]["gradient_checkpointing"]
        return kept

    def identity_sha256(self) -> str:
        """Hash of `identity`: two runs with equal hashes train the same model on the same rows."""
        return sha256_of_json(self.identity())


@cache
def field_names() -> tuple[str, ...]:
    """Every section and section.key a recipe can hold; keys of [[data.source]] as data.source.key."""
    return tuple(_names(Recipe))


def _names(section: type[Section], prefix: str = "") -> list[str]:
    names = []
    for key, info in section.model_fields.items():
        names.append(prefix + key)
        child = section_in(info.annotation)
        names += _names(child, f"{prefix}{key}.") if child else []
    return names


def section_in(annotation: Any) -> type[Section] | None:
    """The Section that a field's type is, or is a list of, or may be; None if it is none of these."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((child for part in get_args(annotation) if (child := section_in(part))), None)
