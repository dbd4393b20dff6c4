"""The benchmark of packed rows: what it times, and that it runs."""

import subprocess
import sys

import numpy as np

from benchmarks import packed
from ds_slm.recipe import loading
from tests.support import runs


def test_rows_hold_documents_of_the_given_lengths() -> None:
    """Oracle: the lengths asked for; only the last document of a row may be cut, or be padding."""
    recipe = loading.load("slm-10m")
    rows = packed.packed_rows(recipe, 3, (100, 600))
    assert rows.document_ids is not None and rows.document_ids.shape == (3, recipe.data.seq_len)
    for row in rows.document_ids:
        lengths = np.diff(np.flatnonzero(np.diff(row, prepend=-2, append=-2)))
        assert ((lengths[:-1] >= 100) & (lengths[:-1] <= 600)).all() and lengths.sum() == len(row)


def test_sides_take_turns() -> None:
    """Oracle: the order of the calls, without the first round's results."""
    calls: list[str] = []
    found = packed.measure_sides(lambda side: calls.append(side) or float(len(calls)), 2)
    assert calls == [*packed.SIDES, *packed.SIDES[::-1], *packed.SIDES]
    assert found == {"plain rows": [6.0, 7.0], "packed": [5.0, 8.0], "packed, mask": [4.0, 9.0]}


def test_it_runs() -> None:
    """Oracle: a line for each side, and a gradient that is the mask's: else it exits with 2."""
    command = [sys.executable, "benchmarks/packed.py", "--recipe", "demo", "--rows", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--lengths", "20", "90"], cwd=runs.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(f"\n{side}" in done.stdout for side in packed.SIDES)
