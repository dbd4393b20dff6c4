"""`base = "NAME"` at the head of a recipe: what the file does not say is taken from another recipe.

    child's tables --over--> base's tables, which may have a base themselves --> tables without `base`

A key of the child replaces the base's, and a list (the sources) is replaced as a whole. A section of another `kind`,
such as a cosine schedule over a WSD one, is also replaced as a whole: keys of one kind mean nothing to the other.
Sections about one published model (`OWN`) are never inherited.
"""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_slm.errors import RecipeError

Tables = dict[str, Any]
OWN = ("card", "targets", "unstated")


def read_tables(path: Path, name: str) -> Tables:
    """The tables of a recipe's file, called `name` in errors. Raises RecipeError if it is not TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name!r} cannot be read: {error}.") from error
    return tables_of(text, name)


def tables_of(text: str, name: str) -> Tables:
    """The tables of a recipe's text. Raises RecipeError if it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name!r} is not TOML: {error}.") from error


def with_base(path: Path, name: str, find: Callable[[str, Path], Path]) -> tuple[Tables, Tables]:
    """A recipe's tables and, within them, those that were inherited; neither holds `base`.

    Args:
        path: the recipe's file.
        name: the user's name for it.
        find: gives the base's file, from the base's name and the folder of the recipe that names it.

    Raises:
        RecipeError: a file cannot be read, a base is not a name, or recipes are each other's base.
    """
    chain = [(name, read_tables(path, name))]
    seen = [path.resolve()]
    while "base" in chain[-1][1]:
        child, tables = chain[-1]
        base = tables.pop("base")
        if not isinstance(base, str):
            raise RecipeError(f"recipe {child!r}: base = {base!r}: expected the name of a recipe, or a path to one.")
        try:
            path = find(base, path.parent)
        except RecipeError as error:
            problems = [problem.removeprefix(f"recipe {base!r}: ") for problem in error.problems]
            raise RecipeError([f"recipe {child!r}: base = {base!r}: {problem}" for problem in problems]) from error
        if path.resolve() in seen:
            raise RecipeError(f"recipe {child!r}: base = {base!r}: a recipe cannot be its own base.")
        seen.append(path.resolve())
        chain.append((base, read_tables(path, base)))

    whole: Tables = {}
    for _, tables in reversed(chain[1:]):
        whole = _over({key: value for key, value in whole.items() if key not in OWN}, tables)
    whole = {key: value for key, value in whole.items() if key not in OWN}
    return _over(whole, chain[0][1]), _left(whole, chain[0][1])


def inherited_places(inherited: Tables, prefix: str = "") -> Iterator[str]:
    """`section.key=value` for everything that was inherited; a list, or a table of names, counts as one value."""
    for key, value in inherited.items():
        if isinstance(value, dict) and not prefix:
            yield from inherited_places(value, f"{key}.")
        else:
            yield f"{prefix}{key} = {_shown(value)}"


def _over(base: Tables, child: Tables) -> Tables:
    """The base's tables, overridden by the child's."""
    merged = dict(base)
    for key, value in child.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _is_other_kind(below, value):
            value = _over(below, value)
        merged[key] = value
    return merged


def _left(base: Tables, child: Tables) -> Tables:
    """The part of the base's tables that the child does not replace."""
    left = {}
    for key, value in base.items():
        if key not in child:
            left[key] = value
        elif isinstance(value, dict) and isinstance(child[key], dict) and not _is_other_kind(value, child[key]):
            left[key] = _left(value, child[key])
    return left


def _is_other_kind(base: Tables, child: Tables) -> bool:
    return "kind" in child and child["kind"] != base.get("kind")


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} of them"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_shown(one)}" for key, one in value.items()) + " }"
    return str(value).lower() if isinstance(value, bool) else repr(value)
