"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from ds_slm import files
from ds_slm.errors import run_program
from tests.support.faults import fail_at


def test_a_full_disk_leaves_no_rest_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk without room fails while a small file is replaced, and does not say which file it was.

    Oracle: the old file as it was, nothing beside it; exit code 2 and a sentence.
    """
    (tmp_path / "env.json").write_text("old")
    with fail_at("syncing"):
        assert run_program(lambda: files.replace_text(tmp_path / "env.json", "new")) == 2
    assert capsys.readouterr().err == "error: a disk: No space left on device.\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
