"""Event files: their checksum, their records, and what is on the disk when."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from ds_slm.run import event_file
from ds_slm.run.event_file import EventFile, crc32c


@pytest.fixture
def made(tmp_path: Path) -> Iterator[EventFile]:
    """A file of its own, closed in the end."""
    one = EventFile(tmp_path, hidden_from_step=3)
    yield one
    one.close()


@pytest.mark.parametrize(
    ("data", "expected"),
    [(bytes(32), 0x8A9136AA), (bytes([255] * 32), 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_the_checksum_is_that_of_the_standard(data: bytes, expected: int) -> None:
    """Oracle: the examples of RFC 3720, appendix B.4."""
    assert crc32c(data) == expected


@given(st.binary(max_size=3 * event_file.BLOCK))
def test_the_checksum_is_that_of_tensorboard(data: bytes) -> None:
    """Oracle: TensorBoard's own, byte by byte; blocks of any length, also rests of less than four bytes."""
    assert crc32c(data) == pywrap_tensorflow.crc32c(data)


@pytest.mark.parametrize("rest", range(6))
def test_a_block_may_end_anywhere(rest: int) -> None:
    """Oracle: TensorBoard's own checksum, around the border of a block."""
    data = bytes(range(1, 256)) * 5
    assert crc32c(data[: event_file.BLOCK + rest]) == pywrap_tensorflow.crc32c(data[: event_file.BLOCK + rest])


def test_what_was_flushed_outlives_the_process(made: EventFile, tmp_path: Path) -> None:
    """Oracle: another reader of the file, before it is closed; the last record is whole, with its length."""
    made.add(step=3)
    made.flush()
    [path] = tmp_path.iterdir()
    assert [event.step for event in EventFileLoader(str(path)).Load()] == [0, 3, 3]

    last = event_file.record_of(b"event")
    assert struct.unpack("<Q", last[:8]) == (5,) and last[12:17] == b"event" and len(last) == 21


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
