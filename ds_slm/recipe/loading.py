"""A recipe's file: found in the library or by its path, read, checked, and written.

    name or path --recipe_path--> TOML --with its base--> tables --overrides--> Recipe --to_toml--> TOML

Unknown keys, wrong types and impossible combinations are reported all at once, each with the nearest valid name.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_slm.errors import RecipeError
from ds_slm.recipe import effects
from ds_slm.recipe.consistency import disagreements
from ds_slm.recipe.inheritance import inherited_places, tables_of, with_base
from ds_slm.recipe.overrides import apply_overrides, replace_unknown_keys
from ds_slm.recipe.problems import nearest, sentences
from ds_slm.recipe.schema import Recipe, section_in
from ds_slm.recipe.section import Section

LIBRARY = Path(__file__).parent / "library"
SFT_LIBRARY = Path(__file__).parents[2] / "sft" / "recipes"

RECIPE_FILE = "recipe.toml"
"""The recipe's file name in a run folder."""


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


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `parse` reads it back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


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


def _checked(tables: dict[str, Any], overrides: list[str], origin: str, recorded: bool) -> Recipe:
    problems = apply_overrides(tables, overrides)
    problems += replace_unknown_keys(tables, Recipe)
    sound = _sound_sections(tables)

    recipe = None
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        problems += sentences(error)
        if any(problem["loc"] for problem in error.errors()):  # a section is broken, so the others were not compared
            problems += disagreements(sound)
    if not recorded:
        problems += effects.mistakes(sound)

    if recipe is None or problems:
        raise RecipeError([f"recipe {origin!r} cannot be used:", *(f"{problem}." for problem in problems)])
    return recipe


def _sound_sections(tables: dict[str, Any]) -> dict[str, Section]:
    """The sections that are valid by themselves."""
    sound = {}
    for name, info in Recipe.model_fields.items():
        section = section_in(info.annotation)
        if section and isinstance(tables.get(name), dict):
            with suppress(ValidationError):
                sound[name] = section.model_validate(tables[name])
    return sound
