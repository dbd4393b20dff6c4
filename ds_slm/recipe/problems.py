"""From a wrong name or pydantic's errors to sentences a user can act on."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

CLOSE = 0.65
"""The least similarity at which a valid name is suggested."""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most similar to a wrong one; None if none is close.

    In a dotted name the last part counts three times the rest, so a key in the wrong section is found again.
    """
    scored = [(_likeness(name, candidate), candidate) for candidate in valid]
    score, best = max(scored, default=(0.0, ""))
    return best if score >= CLOSE else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; the nearest is X' for the closest valid name, or nothing."""
    best = closest(name, valid)
    return f"; the nearest is {best!r}" if best else ""


def sentences(error: ValidationError) -> list[str]:
    """One sentence, without a full stop, for every problem pydantic found."""
    found = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            found.append(f"{place}: missing; add it")
        elif problem["type"] == "value_error":
            lines = problem["msg"].removeprefix("Value error, ").splitlines()
            found += [f"{place}: {line}" if place else line for line in lines]
        else:
            got = repr(problem["input"])
            got = got if len(got) <= 80 else f"{got[:77]}..."
            found.append(f"{place}: got {got}; {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return found


def _likeness(one: str, two: str) -> float:
    (table_one, _, key_one), (table_two, _, key_two) = one.rpartition("."), two.rpartition(".")
    return 0.75 * _ratio(key_one, key_two) + 0.25 * _ratio(table_one, table_two)


def _ratio(one: str, two: str) -> float:
    return difflib.SequenceMatcher(None, one, two).ratio()
