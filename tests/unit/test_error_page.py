"""docs/errors.md quotes the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOINED = re.compile(r'"\s*\n\s*f?"')
"""Where a string goes on in the next line."""


def sources() -> str:
    """All text of the packages, with the strings of several lines joined."""
    files = [path for folder in ("ds_slm", "sft") for path in (ROOT / folder).rglob("*.py")]
    return JOINED.sub("", "\n".join(path.read_text(encoding="utf-8") for path in sorted(files)))


def quoted_errors() -> list[str]:
    """What stands in backticks in the first column of the tables of docs/errors.md, but for commands and exit codes."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    firsts = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ") and "|" in line[2:]]
    return [quote for cell in firsts for quote in re.findall(r"`(.+?)`", cell)]


@pytest.mark.parametrize("quote", quoted_errors())
def test_errors_are_quoted_as_they_are(quote: str) -> None:
    """Each part of a quotation, between its dots, stands in a string of the code."""
    parts = [part.strip() for part in quote.split("...") if part.strip()]
    assert parts
    for part in parts:
        assert part in sources(), part
