"""Printing for every verb: one JSON object on stdout, or text; and progress."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from ds_slm import __version__


def report_to(as_json: bool) -> Callable[[str], None]:
    """Where progress is printed: stdout belongs to the JSON object if one is printed."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def print_either(content: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the object with --json, else a text whose {names} are filled from it."""
    if as_json:
        print_json(content)
    else:
        print(text.format(**content))


def print_json(content: Any) -> None:
    """Print the one object on stdout."""
    print(json.dumps(content, indent=2, default=str))


def print_version(asked: bool) -> None:
    """Print the version for `--version`, and end."""
    if asked:
        print(f"ds-slm {__version__}")
        raise typer.Exit
