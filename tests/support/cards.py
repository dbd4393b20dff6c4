"""Model cards, read as text."""

import re


def section(card: str, title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", card, flags=re.M)[[*re.findall(r"^## (.+)$", card, re.M)].index(title) + 1]


def rows_of(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of all tables of a text."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("| "): [cell.strip("| ") for cell in row[1:]] for row in cells}
