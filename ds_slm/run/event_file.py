"""A file of TensorBoard's events, written by the thread that records them.

    Event --TensorBoard's RecordWriter--> buffer --> events.out.tfevents.TIME.HOST.PID.N

torch's SummaryWriter gives each event to a thread, for which a tiny model's step would wait.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

FLUSH_EVERY_S = 5.0
"""Events stay in this process's memory for no longer than this, if others follow."""


class EventFile:
    """Appends events to its own file. Raises OSError if the disk refuses them."""

    def __init__(self, folder: Path, hidden_from_step: int) -> None:
        """Readers hide events in earlier files of the folder that are of this step or a later one."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # readers sort files by their names
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{nanoseconds:09d}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._flush_at_s = time.monotonic() + FLUSH_EVERY_S

        self.add(file_version="brain.Event:2")
        self.add(step=hidden_from_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, **fields: Any) -> None:
        """Append an event with these fields of TensorBoard's Event."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self.add_event(Event(**fields))

    def add_event(self, event: Any) -> None:
        """Append one of TensorBoard's events, with the current time."""
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() >= self._flush_at_s:
            self.flush()

    def flush(self) -> None:
        """Hand what was added to the operating system, so that it outlives this process."""
        self._records.flush()
        self._flush_at_s = time.monotonic() + FLUSH_EVERY_S

    def close(self) -> None:
        """Flush and close."""
        self._records.close()
