"""Fixtures for every test."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that DS_SLM_TEST_DATA names; skips where it is unset. Only read it."""
    named = os.environ.get("DS_SLM_TEST_DATA")
    if not named:
        pytest.skip("DS_SLM_TEST_DATA is unset: it names a folder of real data that does not ship with the project")
    folder = Path(named)
    assert folder.is_dir(), f"DS_SLM_TEST_DATA = {named} is no folder"
    return folder
