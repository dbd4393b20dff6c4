"""llama.cpp for tests."""

from pathlib import Path

import pytest

from benchmarks import llama_server


class LlamaCpp(llama_server.LlamaCpp):
    """A GGUF file, loaded by llama.cpp in this process."""

    def __init__(self, path: Path, context: int) -> None:
        """Loads a file; `context` is the number of tokens it may hold. Skips the test where xllamacpp is missing."""
        pytest.importorskip("xllamacpp")
        super().__init__(path, context)
