"""What the tests of supervised runs share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts
from tests.cluster.supervised import make_hosts
from tests.support import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and its text, which every host sees at the same path."""
    path = tmp_path_factory.mktemp("recipe")
    runs.write_recipe(path)
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts that train; commands are typed on the first one."""
    with make_hosts(tmp_path_factory.mktemp("two"), "node1", "node2") as hosts:
        yield hosts
