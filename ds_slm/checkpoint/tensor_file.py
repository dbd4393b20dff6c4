"""A safetensors file written from front to back, so that no tensor must be whole in memory.

    shapes --> header (8 bytes of length, JSON, spaces up to 8 bytes) --> values, tensor after tensor by name --> fsync

The bytes are those of `safetensors.torch.save_file` for the same fp32 tensors. Format:
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ds_slm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 4
"""Size of an fp32 value."""


def in_file_order(names: Iterable[str]) -> list[str]:
    """Names of tensors in the order in which their values follow each other."""
    return sorted(names)


class TensorFile:
    """A file of fp32 tensors that is being written."""

    def __init__(self, path: Path, shapes: Mapping[str, Iterable[int]]) -> None:
        """Open it and write its header.

        Args:
            path: the file, which must not exist.
            shapes: the shape of every tensor, by name.
        """
        self._path = path
        header: dict[str, Any] = {}
        end = 0
        for name in in_file_order(shapes):
            shape = list(shapes[name])
            begin, end = end, end + BYTES * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)

        self._expected = 8 + len(text) + end
        self._written = 0
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        self._hash.update(left)
        self._written += len(left)
        while left:
            left = left[self._file.write(left) or 0 :]

    def write(self, values: "Tensor") -> None:
        """Write the next values: a flat, contiguous fp32 tensor on the CPU, of any length."""
        if values.numel():  # an empty view cannot be cast
            self._write(values.numpy().data.cast("B"))

    def sync(self) -> dict[str, Any]:
        """Wait until all is on the disk; returns size and sha256. Raises CheckpointError if values are missing."""
        if self._written != self._expected:
            raise CheckpointError(f"{self._path}: {self._written} bytes were written, expected {self._expected}.")
        os.fsync(self._file.fileno())
        return {"bytes": self._written, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, whole or not."""
        self._file.close()
