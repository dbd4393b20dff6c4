"""Markdown as the hub renders it: tables whose cells hold any text, and numbers for people."""

import re
from collections.abc import Sequence

SIZES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table without its empty columns; columns whose numbers are in `right` are aligned to the right."""
    rule = ["---:" if number in right else "---" for number in range(len(header))]
    kept = [number for number in range(len(header)) if any(row[number] for row in rows)]
    lines = ([cell(row[number]) for number in kept] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text on one line, with its bars escaped once, so that they do not divide the table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def plain(text: str) -> str:
    """Text on one line that is not markup: a recipe may hold anything."""
    return re.sub(r"[<>`|\\*_\[\]#]", lambda sign: f"\\{sign[0]}", " ".join(text.split()))


def code(text: str) -> str:
    """A name within a sentence, on one line; a name that holds backticks is given as plain text."""
    return plain(text) if "`" in text else f"`{' '.join(text.split())}`"


def code_block(text: str, language: str) -> str:
    """A block of code, whatever backticks it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def number(value: float) -> str:
    """A setting or a loss: 0.0003, 1e-08, 10,000, 2.7394."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"


def percent(share: float) -> str:
    """0.283 -> 28.3%; 1 -> 100%."""
    return f"{100 * share:.3g}%"


def in_words(count: float) -> str:
    """1821888 -> 1.8 million; 4096 -> 4,096."""
    for size, word in SIZES:
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def times(count: int, what: str) -> str:
    """1 host, 2 hosts."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
