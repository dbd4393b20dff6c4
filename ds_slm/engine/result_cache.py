"""Results of measurements on this machine, kept in the user's cache folder.

    key (everything the result depends on) --hash--> CACHE/ds_slm/NAME.json: hash --> result

A file that is damaged, or that cannot be read or written, costs a new measurement; the launch goes on.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_slm.files import sha256_of_json, write_json


class ResultCache:
    """Results by key, in one JSON file."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def path(self) -> Path | None:
        """The file; None if this user does not have a home folder."""
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:
            return None
        return folder / "ds_slm" / f"{self._name}.json"

    def load(self, key: Mapping[str, Any]) -> Any:
        """The result that was stored under an equal key; None if there is none."""
        return self._read().get(sha256_of_json(key))

    def store(self, key: Mapping[str, Any], result: Any) -> bool:
        """Keep a result, which JSON can hold. Returns whether it was written."""
        if self.path is None:
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._read(), sha256_of_json(key): result})
        except OSError:  # a home folder that cannot be written to
            return False
        return True

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_bytes()) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}
