"""The records of a run."""

import sys
from pathlib import Path

import pytest

from ds_slm.run.records import Records
from ds_slm.run.report import Report


@pytest.mark.parametrize(("first_step", "steps"), [(3, {2, 3}), (2, {2})])
def test_a_resumed_run_knows_what_was_recorded(first_step: int, steps: set[int], tmp_path: Path) -> None:
    """Oracle: the records of the launch before, up to the step where this one goes on; its own are not among them."""
    before = Report(sys.stdout, Records(tmp_path, print), total_steps=5)
    for step in (2, 3):
        before.record("benchmarks", step, {"piqa/acc": 50.0})
        assert not before.was_recorded("benchmarks", step)
    before.record("val", 1, {"loss": 2.0})
    before.close()

    after = Report(sys.stdout, Records(tmp_path, print, first_step), total_steps=5, first_step=first_step)
    assert {step for step in range(6) if after.was_recorded("benchmarks", step)} == steps
    assert after.was_recorded("val", 1) and not after.was_recorded("val", 2)
    after.close()
    assert not Report(None, None, total_steps=5, first_step=3).was_recorded("val", 1)
