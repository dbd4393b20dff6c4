"""The tables of every key: what docs/recipes.md holds is what the schema says."""

from pathlib import Path

from ds_slm.recipe import reference
from ds_slm.recipe.schema import field_names

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_holds_the_tables_of_today() -> None:
    """`python -m ds_slm.recipe.reference` prints what stands at the page's end."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.partition("## Every key\n")[2].partition("\n\n")[2].strip() == reference.tables().strip()


def test_every_key_has_a_meaning() -> None:
    """Oracle: the schema's own list of keys; each stands in a row with four cells, none of a meaning empty."""
    rows = [line for line in reference.tables().splitlines() if line.startswith("| `")]
    cells = [line.replace("\\|", "/").strip("|").split("|") for line in rows]
    assert all(len(row) == 4 and row[3].strip() for row in cells)

    tables = {"data.source", "targets", "card", "model", "unstated"}
    keys = [name for name in field_names() if "." in name and name not in tables]
    assert len(rows) == len(keys)
