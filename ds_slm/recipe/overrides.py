"""`--set section.key=value`, and keys that no section has: both change a recipe's raw tables before they are checked.

tables --apply_overrides--> tables --replace_unknown_keys--> tables with known keys only, and a problem for each
"""

import tomllib
from typing import Any

from ds_slm.recipe.problems import closest, nearest
from ds_slm.recipe.schema import field_names, section_in
from ds_slm.recipe.section import Section


def apply_overrides(tables: dict[str, Any], overrides: list[str]) -> list[str]:
    """Write each `section.key=value` into a recipe's tables; returns a problem for each that cannot be meant."""
    problems = _given_twice(overrides)
    return problems + [problem for override in overrides if (problem := _apply(tables, override))]


def replace_unknown_keys(table: Any, section: type[Section], place: str = "") -> list[str]:
    """Remove unknown keys from the raw tables; returns a problem for each.

    A key that looks like a misspelling of a missing key takes its place, so that the rest is checked as it was meant.
    """
    if isinstance(table, list):
        return [
            problem for i, item in enumerate(table) for problem in replace_unknown_keys(item, section, f"{place}{i}.")
        ]
    if not isinstance(table, dict):
        return []  # pydantic says it better

    problems = []
    for key in [key for key in table if key not in section.model_fields]:
        known = _without_indices(place + key)
        meant = closest(known, field_names()) or ""
        problems.append(f"{place}{key}: unknown key{nearest(known, field_names())}")

        value = table.pop(key)
        meant_table, _, meant_key = meant.rpartition(".")
        if meant and meant_table == known.rpartition(".")[0]:
            both = isinstance(value, dict) and isinstance(table.get(meant_key), dict)
            table[meant_key] = value | table[meant_key] if both else table.get(meant_key, value)

    for key, info in section.model_fields.items():
        child = section_in(info.annotation)
        if child and key in table:
            problems += replace_unknown_keys(table[key], child, f"{place}{key}.")
    return problems


def _apply(tables: dict[str, Any], override: str) -> str | None:
    """Write one `section.key=value` into the tables; returns the problem, if there is one."""
    place, equals, literal = (part.strip() for part in override.partition("="))
    if not equals or "." not in place:
        return f"--set {override!r}: expected section.key=value, for instance train.steps=100"

    try:
        override.encode()
    except UnicodeEncodeError:
        return f"--set {override!r}: it is no UTF-8, as a recipe must be"

    *path, key = place.split(".")
    known = _without_indices(place)
    if known not in field_names() and not known.startswith(("tokenizer.special_tokens.", "card.sources.", "unstated.")):
        return f"--set {place}: no such field{nearest(known, field_names())}"

    # A number names an entry of a list.
    table: Any = tables
    for part in path:
        if isinstance(table, dict):
            table = table.setdefault(part, {})
        elif isinstance(table, list) and part.isdigit() and int(part) < len(table):
            table = table[int(part)]
        else:
            table = None
    if not isinstance(table, dict):
        return f"--set {place}: the recipe has no table {'.'.join(path)}; entries of a list count from 0"

    try:
        table[key] = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = literal  # a bare word is a string: --set train.precision=fp32
    return None


def _given_twice(overrides: list[str]) -> list[str]:
    """A problem for each override that a later one undoes: the same key with another value, or a table over it."""
    pairs = [tuple(part.strip() for part in override.partition("=")[::2]) for override in overrides]
    return [
        f"--set {place}: given twice, as {value} and as {later_place}={later}: leave one out"
        for number, (place, value) in enumerate(pairs)
        for later_place, later in pairs[number + 1 :]
        if (place == later_place and value != later) or place.startswith(f"{later_place}.")
    ]


def _without_indices(place: str) -> str:
    return ".".join(part for part in place.split(".") if not part.isdigit())
