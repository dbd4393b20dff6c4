"""What may change in a recipe when its run is resumed.

recorded Recipe, present Recipe --changes--> {place: (old, new)} --refused_changes--> a problem for each that may not
"""

from typing import Any

from ds_slm.recipe.schema import Recipe

FREE_ON_RESUME = (
    "card",
    "run",
    "eval",
    "targets",
    "unstated",
    "train.steps",
    "train.gradient_checkpointing",
    "schedule.decay_start_step",
    "schedule.decay_steps",
    "schedule.decay_shape",
    "optimizer.name",
    "optimizer.embedding_bits",
)
"""Sections and fields that may change when a run is resumed."""

FREE_WITH_PERMISSION = ("optimizer.lr", "optimizer.min_lr")
"""Fields that may change with --allow-change."""


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every field that differs, as section.key -> (old value, new value)."""
    before, after = _flat(old), _flat(new)
    places = sorted(before.keys() | after.keys())
    return {place: (before.get(place), after.get(place)) for place in places if before.get(place) != after.get(place)}


def refused_changes(old: Recipe, new: Recipe, allow_change: bool) -> list[str]:
    """A problem for each difference that a resumed run may not have."""
    free = FREE_ON_RESUME + (FREE_WITH_PERMISSION if allow_change else ())
    return [
        f"{place} was {_told(was)} and is now {_told(now)}"
        + (" (--allow-change permits it)." if place in FREE_WITH_PERMISSION else ".")
        for place, (was, now) in changes(old, new).items()
        if place not in free and place.partition(".")[0] not in free
    ]


def _told(value: Any) -> str:
    """A value as a message shows it; for tables of a list only what is set."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = [{key: item for key, item in one.items() if item is not None} for one in value]
    return repr(value)


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Fields as section.key -> value; a section that is not a table as itself."""
    flat: dict[str, Any] = {}
    for section, value in recipe.model_dump(mode="json").items():
        table = value if isinstance(value, dict) and section != "unstated" else None
        flat |= {section: value} if table is None else {f"{section}.{key}": item for key, item in table.items()}
    return flat
