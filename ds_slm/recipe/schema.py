"""A recipe: everything that changes the result of a run, read from TOML.

    name or path --> TOML --> overrides (section.key=value) --> Recipe --> identity_sha256

Unknown keys, wrong types and impossible combinations are reported all at once, each with the nearest valid name.
A recipe never holds the number of devices, the micro-batch or the ZeRO stage: those change speed, not the result.
The typed sections are in sections.py and data_sections.py, and can be imported from here as well.
"""

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ValidationError, ValidationInfo, model_validator

from ds_slm.errors import RecipeError
from ds_slm.files import sha256_of_json
from ds_slm.recipe import effects
from ds_slm.recipe.consistency import disagreements
from ds_slm.recipe.data_sections import Data, Source, Tokenizer
from ds_slm.recipe.inheritance import inherited_places, tables_of, with_base
from ds_slm.recipe.problems import closest, nearest, sentences
from ds_slm.recipe.section import Section
from ds_slm.recipe.sections import Card, Eval, Model, Optimizer, Run, Schedule, Sft, Target, Train

__all__ = [
    "Card",
    "Data",
    "Eval",
    "Model",
    "Optimizer",
    "Recipe",
    "Run",
    "Schedule",
    "Section",
    "Sft",
    "Source",
    "Target",
    "Tokenizer",
    "Train",
    "changes",
    "field_names",
    "inherited",
    "inherited_toml",
    "library_names",
    "load",
    "load_recorded",
    "parse",
    "recipe_path",
    "refused_changes",
    "to_toml",
]

LIBRARY = Path(__file__).parent / "library"
SFT_LIBRARY = Path(__file__).parents[2] / "sft" / "recipes"

RECIPE_FILE = "recipe.toml"
"""The recipe's file name in a run folder."""

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

RECORDED = "recorded"
"""Marks, in pydantic's context, a recipe that a run has recorded: its mistakes are printed, not refused."""

IDENTITY = ("model", "tokenizer", "data", "optimizer", "schedule", "train", "sft")
"""Sections that change the result."""


def changes_result(place: str) -> bool:
    """Whether a `section.key` belongs to a section that changes the result."""
    return place.partition(".")[0] in IDENTITY


class Recipe(Section):
    """A whole recipe. `load` reads one; it has then passed every check that needs no device."""

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
    def _agrees(self, info: ValidationInfo) -> Self:
        sections = {name: getattr(self, name) for name in Recipe.model_fields}
        problems = disagreements(sections)
        if not (info.context or {}).get(RECORDED):
            problems += effects.mistakes(sections)
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


def library_names() -> list[str]:
    """Names of the recipes that ship with the project, the demo first, fine-tuning recipes last."""
    tuned = {path.stem for path in SFT_LIBRARY.glob("*.toml")}
    names = {path.stem for path in LIBRARY.glob("*.toml")} | tuned
    return sorted(names, key=lambda name: (name in tuned, not name.startswith("demo"), name))


def recipe_path(name_or_path: str, folder: Path = Path()) -> Path:
    """The recipe's file; a path is relative to `folder`. Raises RecipeError if there is none."""
    for path in (LIBRARY / f"{name_or_path}.toml", SFT_LIBRARY / f"{name_or_path}.toml", folder / name_or_path):
        if path.suffix == ".toml" and path.is_file():
            return path
    if (folder / f"{name_or_path}.toml").is_file():
        raise RecipeError(f"recipe {name_or_path!r}: no such recipe, but a file {name_or_path}.toml: name that one.")
    raise RecipeError(
        f"recipe {name_or_path!r}: no such recipe and no such .toml file{nearest(name_or_path, library_names())} "
        f"(the library has {', '.join(library_names())})."
    )


def load(name_or_path: str, overrides: list[str] | None = None, run: Path | None = None) -> Recipe:
    """Read a recipe by library name or path and apply `section.key=value` overrides.

    Args:
        name_or_path: the recipe's name in the library, or its path.
        overrides: `section.key=value`, each key once.
        run: a run folder. If it already holds a run, settings that can only be a mistake are not refused: the run may
            have begun with them, and may not change them.

    Raises:
        RecipeError: with every problem of the file and the overrides.
    """
    tables, _ = with_base(recipe_path(name_or_path), name_or_path, recipe_path)
    recorded = run is not None and (run / RECIPE_FILE).is_file()
    return _checked(tables, overrides or [], name_or_path, recorded)


def inherited(name_or_path: str) -> list[str]:
    """`section.key = value` for all that a recipe takes from its base. Raises RecipeError if one cannot be read."""
    return list(inherited_places(with_base(recipe_path(name_or_path), name_or_path, recipe_path)[1]))


def inherited_toml(name_or_path: str) -> str:
    """The same as TOML, in sections. Raises RecipeError if a recipe cannot be read."""
    import tomli_w

    return tomli_w.dumps(with_base(recipe_path(name_or_path), name_or_path, recipe_path)[1])


def load_recorded(run: Path) -> Recipe:
    """The recipe that a run folder has recorded.

    Raises:
        RecipeError: it is damaged; with the way out.
    """
    path = run / RECIPE_FILE
    try:
        return parse(path.read_text(encoding="utf-8"), origin=str(path), recorded=True)
    except (RecipeError, UnicodeDecodeError) as error:
        problems = error.problems if isinstance(error, RecipeError) else [f"{path} is not UTF-8 ({error})."]
        way_out = "Restore it, or launch its training once more: that writes it anew, and leaves all checkpoints alone."
        raise RecipeError([*problems, way_out]) from error


def parse(text: str, overrides: list[str] | None = None, origin: str = "recipe", recorded: bool = False) -> Recipe:
    """A recipe from TOML text without a base. One `recorded` by a run is not refused for settings without effect.

    Raises:
        RecipeError: with every problem found.
    """
    return _checked(tables_of(text, origin), overrides or [], origin, recorded)


def _checked(tables: dict[str, Any], overrides: list[str], origin: str, recorded: bool) -> Recipe:
    problems = _given_twice(overrides)
    problems += [problem for override in overrides if (problem := _apply_override(tables, override))]
    problems += _settle_unknown_keys(tables, Recipe)
    recipe = None
    try:
        recipe = Recipe.model_validate(tables, context={RECORDED: recorded})
    except ValidationError as error:
        problems += sentences(error)
        if any(problem["loc"] for problem in error.errors()):  # a section is broken, so the others were not compared
            sound = _sound_sections(tables)
            problems += disagreements(sound) + ([] if recorded else effects.mistakes(sound))
    if recipe is None or problems:
        raise RecipeError([f"recipe {origin!r} cannot be used:", *(f"{problem}." for problem in problems)])
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `parse` reads it back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every field that differs, as section.key -> (old value, new value)."""
    before, after = _flat(old), _flat(new)
    places = sorted(before.keys() | after.keys())
    return {place: (before.get(place), after.get(place)) for place in places if before.get(place) != after.get(place)}


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recorded recipe with other values at some places of `changes`; None removes the value at a place.

    Raises:
        RecipeError: together they are not a valid recipe.
    """
    tables = recipe.model_dump(mode="json", exclude_none=True)
    for place, value in values.items():
        section, _, key = place.partition(".")
        table, name = (tables.setdefault(section, {}), key) if key else (tables, section)
        table.pop(name, None)
        if value is not None:
            table[name] = value
    return _checked(tables, [], "recipe", recorded=True)


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


@cache
def field_names() -> tuple[str, ...]:
    """Every section and section.key a recipe can hold; keys of [[data.source]] as data.source.key."""
    return tuple(_names(Recipe))


def _names(section: type[Section], prefix: str = "") -> list[str]:
    names = []
    for key, info in section.model_fields.items():
        names.append(prefix + key)
        child = _section_in(info.annotation)
        names += _names(child, f"{prefix}{key}.") if child else []
    return names


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section that a field's type is, or is a list of, or may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((child for part in get_args(annotation) if (child := _section_in(part))), None)


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Fields as section.key -> value; a section that is not a table as itself."""
    flat: dict[str, Any] = {}
    for section, value in recipe.model_dump(mode="json").items():
        table = value if isinstance(value, dict) and section != "unstated" else None
        flat |= {section: value} if table is None else {f"{section}.{key}": item for key, item in table.items()}
    return flat


def _without_indices(place: str) -> str:
    return ".".join(part for part in place.split(".") if not part.isdigit())


def _given_twice(overrides: list[str]) -> list[str]:
    """A problem for each override that a later one undoes: the same key with another value, or a table over it."""
    pairs = [tuple(part.strip() for part in override.partition("=")[::2]) for override in overrides]
    return [
        f"--set {place}: given twice, as {value} and as {later_place}={later}: leave one out"
        for number, (place, value) in enumerate(pairs)
        for later_place, later in pairs[number + 1 :]
        if (place == later_place and value != later) or place.startswith(f"{later_place}.")
    ]


def _apply_override(tables: dict[str, Any], override: str) -> str | None:
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


def _settle_unknown_keys(table: Any, section: type[Section], place: str = "") -> list[str]:
    """Remove unknown keys from the raw tables; returns a problem for each.

    A key that looks like a misspelling of a missing key takes its place, so that the rest is checked as it was meant.
    """
    if isinstance(table, list):
        return [
            problem for i, item in enumerate(table) for problem in _settle_unknown_keys(item, section, f"{place}{i}.")
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
        child = _section_in(info.annotation)
        if child and key in table:
            problems += _settle_unknown_keys(table[key], child, f"{place}{key}.")
    return problems


def _sound_sections(tables: dict[str, Any]) -> dict[str, Section]:
    """The sections that are valid by themselves."""
    sound = {}
    for name, info in Recipe.model_fields.items():
        section = _section_in(info.annotation)
        if section and isinstance(tables.get(name), dict):
            with suppress(ValidationError):
                sound[name] = section.model_validate(tables[name])
    return sound
