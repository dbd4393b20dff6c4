"""The shape of code: what is counted, by hand, on files that are made up."""

import sys
from pathlib import Path

import pytest

from tests.support import shape

FILES = {
    "ds_slm/errors.py": "class Problem(Exception):\n    pass\n",
    "ds_slm/data/rows.py": "# a comment\nimport json\n\nfrom ds_slm import errors  # another\n",
    "ds_slm/data/sources/hub.py": "def f(a, b, c, d, e, *, g, h):\n    from ds_slm.recipe.schema import load\n",
    "ds_slm/recipe/schema.py": "def load(self, a, b, c, d, e, f):\n" + "    a = b\n" * 15,
    "sft/train.py": "import sft.encode\n",
    "sft/encode.py": "from ds_slm.data import rows\ndef f():\n" + "    a = b\n" * 10 + "\n" + "    a = b\n" * 10,
    "tests/unit/test_rows.py": "def test_wall():\n" + "    a = b\n" * 15,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_code_lines_are_counted(tmp_path: Path) -> None:
    """Oracle: a file whose lines are counted by hand."""
    path = tmp_path / "some.py"
    path.write_text(
        '"""Two\nlines."""\n\nx = """three\nlines\nof text"""  # one\n# none\ndef f():\n    """None."""\n    return x\n'
    )
    assert shape.code_lines(path) == 5


def test_comment_lines_are_counted(tmp_path: Path) -> None:
    """Oracle: a file whose comments are counted by hand; a comment behind code is none of them."""
    path = tmp_path / "some.py"
    path.write_text('# one\n\ndef f():  # none\n    # two\n    return """\n# text\n"""\n')
    assert shape.comment_lines(path) == 2


def test_functions_are_measured(folder: Path) -> None:
    """Oracle: parameters and lines, counted by hand."""
    load = next(shape.functions(folder / "ds_slm/recipe/schema.py"))
    assert (load.name, load.parameters, load.code_lines) == ("load", 6, 15)
    assert load.is_wall and not load.is_wide
    parted = next(shape.functions(folder / "sft/encode.py"))
    assert (parted.code_lines, len(parted.lines), parted.is_wall) == (20, 21, False)


def test_imports_are_drawn(folder: Path) -> None:
    """Oracle: the imports of the files above, by package."""
    assert shape.importers(folder) == {
        "data": {"errors", "recipe"}, "errors": set(), "recipe": set(), "sft": {"data"}, "sft.train": {"sft"},
    }  # fmt: skip


def test_the_table_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the rows of the files above, counted by hand."""
    monkeypatch.setattr(sys, "argv", ["shape", str(folder)])
    shape.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["data", "2", "4", "20.0%", "rows.py 2", "1", "0"],
        ["errors", "1", "2", "0.0%", "errors.py 2", "0", "0"],
        ["recipe", "1", "16", "0.0%", "schema.py 16", "0", "1"],
        ["sft", "1", "22", "0.0%", "encode.py 22", "0", "0"],
        ["sft.train", "1", "1", "0.0%", "train.py 1", "0", "0"],
        ["tests/unit", "1", "16", "0.0%", "test_rows.py 16", "0", "1"],
        ["all", "7", "61", "1.6%", "encode.py 22", "1", "2"],
    ]
    assert "wide: ds_slm/data/sources/hub.py: f takes 7 parameters" in lines
    assert "wall: ds_slm/recipe/schema.py: load has 15 code lines" in lines
    assert "data         -> errors, recipe" in lines
