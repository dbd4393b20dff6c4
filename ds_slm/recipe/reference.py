"""Every key of a recipe, as Markdown: `python -m ds_slm.recipe.reference` prints the tables of docs/recipes.md.

sections.py, data_sections.py: fields, types, defaults and the strings below them --tables--> a table for each section
"""

import ast
import inspect
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.section import Section

WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", tuple: "two numbers"}


def tables() -> str:
    """A heading and a table for each section, in the order of the schema."""
    return "\n".join(line for name, section in _sections(Recipe) for line in _table(name, section))


def _sections(recipe: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """The heading of each section's table as TOML writes it, and the section; sections of a list follow their owner."""
    for name, field in recipe.model_fields.items():
        for section in _within(field.annotation):
            repeated = get_origin(field.annotation) is list
            yield f"[[{name}]]" if repeated else f"[{name}]", section
            for key, inner in section.model_fields.items():
                yield from ((f"[[{name}.{key}]]", one) for one in _within(inner.annotation))


def _within(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _within(part)]


def _table(heading: str, section: type[Section]) -> Iterator[str]:
    yield f"### `{heading}`"
    yield (section.__doc__ or "").strip().splitlines()[0]
    yield ""
    yield "| key | what it takes | default | meaning |"
    yield "|---|---|---|---|"
    meanings = _meanings(section)
    for key, field in section.model_fields.items():
        if not _within(field.annotation):
            cells = f"`{key}`", _kind(field.annotation), _default(field), meanings.get(key, "")
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
    yield ""


def _meanings(section: type[Section]) -> dict[str, str]:
    """The string below each field. pydantic could read them too, at every start of every program."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)

    meanings = {}
    for field, below in pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                meanings[name] = " ".join(text.split())
    return meanings


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return "table"
    return WORDS[origin or annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ([], {}, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


if __name__ == "__main__":
    print(tables())
