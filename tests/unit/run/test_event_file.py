"""Event files: their records, and what is on the disk when."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ds_slm.run import event_file
from ds_slm.run.event_file import EventFile


@pytest.fixture
def made(tmp_path: Path) -> Iterator[EventFile]:
    """A file of its own, closed in the end."""
    one = EventFile(tmp_path, hidden_from_step=3)
    yield one
    one.close()


def test_what_was_flushed_outlives_the_process(made: EventFile, tmp_path: Path) -> None:
    """Oracle: another reader of the file, before it is closed."""
    made.add(step=3)
    made.flush()
    [path] = tmp_path.iterdir()
    assert [event.step for event in EventFileLoader(str(path)).Load()] == [0, 3, 3]


def test_events_are_flushed_now_and_then(made: EventFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the size of the file, under a clock that has gone on for longer than events may wait."""
    [path] = tmp_path.iterdir()
    made.add(step=3)
    assert path.stat().st_size == 0
    monkeypatch.setattr(event_file.time, "monotonic", lambda: float("inf"))
    made.add(step=4)
    assert [event.step for event in EventFileLoader(str(path)).Load()] == [0, 3, 3, 4]


def test_files_of_one_folder_are_read_in_their_order(tmp_path: Path) -> None:
    """Oracle: readers sort by name: of files that one process opens one after another the later ones come later."""
    opened = []
    for step in range(5):
        EventFile(tmp_path, step).close()
        opened += [path for path in tmp_path.iterdir() if path not in opened]
    assert opened == sorted(tmp_path.iterdir())
