"""Signs of life: what a rank writes is what its agent reads."""

import os
from pathlib import Path

import pytest

from ds_slm import pulse


def test_an_agent_reads_what_a_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rank's own process id and numbers."""
    monkeypatch.setenv(pulse.FOLDER, str(tmp_path))
    assert pulse.stamp(tmp_path, os.getpid()) is None
    pulse.beat()
    first = pulse.stamp(tmp_path, os.getpid())
    assert (first is not None, pulse.newest_step(tmp_path)) == (True, 0)
    pulse.beat(24)
    (tmp_path / "1.pulse").write_text("23")  # another rank's
    (tmp_path / "2.pulse").write_text("")  # one that was killed while it wrote
    assert pulse.newest_step(tmp_path) == 24 and pulse.stamp(tmp_path, os.getpid()) != first
    assert pulse.final_code(tmp_path) is None and not pulse.was_stopped(tmp_path)
    pulse.final(2)
    pulse.stopped()
    assert pulse.final_code(tmp_path) == 2 and pulse.was_stopped(tmp_path)
    pulse.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_nobody_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the working folder is still empty after each kind of sign."""
    monkeypatch.delenv(pulse.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    pulse.beat(1)
    pulse.final(2)
    pulse.stopped()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: no error, and no folder in its place."""
    monkeypatch.setenv(pulse.FOLDER, str(tmp_path / "gone"))
    pulse.beat(1)
    assert not list(tmp_path.iterdir())
