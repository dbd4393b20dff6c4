"""Fixtures of what leaves the project."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def export(ds_slm: Any, tmp_path: Path) -> Any:
    """`ds-slm export`, and the card it wrote."""

    def run(run_folder: Path, *flags: str) -> str:
        out = tmp_path / "exports" / f"{run_folder.name}-out"
        done = ds_slm("export", run_folder, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        return (out / "README.md").read_text(encoding="utf-8")

    return run
