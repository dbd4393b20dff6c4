"""A file of TensorBoard's events, written by the thread that records them.

    Event --TFRecord--> length, its checksum, the event, its checksum --buffer--> events.out.tfevents.TIME.HOST.PID.N

torch's SummaryWriter hands each event to a thread, which computes the checksum byte by byte in Python: of a tiny
model's step that was a fifth of what is not DeepSpeed's.

Format: tensorflow/core/lib/io/record_writer.h. CRC-32C of a block is, but for its first four bytes, linear in the
block: the exclusive or of what each byte gives at its place.
"""

import os
import socket
import struct
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_EVERY_S = 5.0
"""Events lie in this process's memory for no longer, as long as others follow."""
BLOCK = 512
"""Bytes whose checksum is computed at once."""
_ALL_ONES, _POLYNOMIAL, _MASK_DELTA = 0xFFFFFFFF, 0x82F63B78, 0xA282EAD8


class EventFile:
    """Appends events to a file of its own. An OSError is raised where the disk refuses them."""

    def __init__(self, folder: Path, hidden_from_step: int) -> None:
        """Readers hide the events that earlier files of the folder hold of this step and later ones."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # readers sort files by their names
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{nanoseconds:09d}"
        self._file = (folder / name).open("xb")
        self._flush_at_s = time.monotonic() + FLUSH_EVERY_S

        self.add(file_version="brain.Event:2")
        self.add(step=hidden_from_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, **fields: Any) -> None:
        """Append an event with these fields of TensorBoard's Event."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self.add_event(Event(**fields))

    def add_event(self, event: Any) -> None:
        """Append an event of TensorBoard's, of this very time."""
        event.wall_time = time.time()
        self._file.write(record_of(event.SerializeToString()))
        if time.monotonic() >= self._flush_at_s:
            self.flush()

    def flush(self) -> None:
        """Hand what was added to the system: it outlives this process."""
        self._file.flush()
        self._flush_at_s = time.monotonic() + FLUSH_EVERY_S

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def record_of(event: bytes) -> bytes:
    """The bytes of a file's record."""
    length = struct.pack("<Q", len(event))
    return b"".join((length, _masked_checksum(length), event, _masked_checksum(event)))


def _masked_checksum(data: bytes) -> bytes:
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & _ALL_ONES)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), of RFC 3720, appendix B.4."""
    tables, places = _tables()
    register = _ALL_ONES

    for begin in range(0, len(data), BLOCK):
        block = np.frombuffer(data[begin : begin + BLOCK], np.uint8).astype(np.intp)
        for place, byte in enumerate(register.to_bytes(4, "little")[: len(block)]):
            block[place] ^= byte
        register >>= 8 * len(block)  # of four bytes or more nothing is left
        register ^= int(np.bitwise_xor.reduce(tables[places[-len(block) :] + block]))
    return register ^ _ALL_ONES


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """What a byte gives at each distance from the end of a block, uint32 [BLOCK * 256]; where each place's begin."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(_POLYNOMIAL)

    tables = [table]
    for _ in range(BLOCK - 1):
        tables.append(tables[-1] >> 8 ^ table[tables[-1] & 0xFF])
    return np.concatenate(tables), np.arange(BLOCK)[::-1] * 256
