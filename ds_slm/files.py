"""Files that are there whole, or not at all: durable writes and atomic replacement. Every room may use this one.

content --> .NAME.tmp-HOST-PID --> fsync --> rename over NAME --> fsync of the folder
"""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp-{writer_name()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
    except OSError:  # a disk that is full
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one atomic step."""
    replace_text(path, json.dumps(content, indent=1, sort_keys=True))  # no line end: cut by one byte it is no JSON


def fsync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writer_name() -> str:
    """Tells writers of several hosts apart where they share a disk."""
    return f"{socket.gethostname()}-{os.getpid()}"
