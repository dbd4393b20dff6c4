"""Rows that are left out: which, up to where, and for how long a run remembers them."""

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.checkpoint import resume
from ds_slm.cli import flags
from ds_slm.data import skipping
from ds_slm.data.order import RowId, next_step_position
from ds_slm.errors import RecipeError
from ds_slm.recipe import loading
from ds_slm.run import folder, skipped_rows
from ds_slm.run.launches import Launch
from tests.support import ranks


class Steps:
    """A source of rows with so many a step, in epochs; row n lies at position n."""

    def __init__(self, rows_per_step: int = 7, last_batch: Any = "wrap", epoch_rows: int = 40) -> None:
        self.arguments = rows_per_step, last_batch, epoch_rows

    def row_ids(self, position: int) -> list[RowId]:
        rows, last_batch, epoch = self.arguments
        count = min(rows, epoch - position % epoch) if last_batch == "keep" else rows
        return [RowId(0, 0, place) for place in range(position, position + count)]

    def next_position(self, position: int) -> int:
        return next_step_position(position, *self.arguments)


def test_ranges_are_merged() -> None:
    """Oracle: sets of positions, for ranges drawn from a seed: reversed order, overlaps, neighbours, empty ones."""
    rng = random.Random(1)
    for _ in range(200):
        ranges = [(first, first + rng.randrange(6)) for first in (rng.randrange(40) for _ in range(rng.randrange(8)))]
        found = skipping.merged(ranges)
        positions = {place for first, end in ranges for place in range(first, end)}
        assert {place for first, end in found for place in range(first, end)} == positions
        assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
        for place in range(50):
            assert (skipping.end_of_range(found, place) > place) == (place in positions)


@pytest.mark.parametrize("last_batch", ["wrap", "keep", "drop"])
def test_every_step_is_the_one_without_its_rows(last_batch: str) -> None:
    """Oracle: step by step, row by row: what the order gives, without the skipped ones; steps without rows are none."""
    rng, rows = random.Random(2), Steps(7, last_batch)
    for _ in range(60):
        ranges = skipping.merged(
            (first, first + rng.randrange(1, 30)) for first in (rng.randrange(150) for _ in range(rng.randrange(5)))
        )
        skipped = {place for first, end in ranges for place in range(first, end)}
        ours = theirs = 0
        for _ in range(12):
            begin, drawn = skipping.draw(rows, ours, ranges)
            while not (expected := [row.row for row in rows.row_ids(theirs) if row.row not in skipped]):
                theirs = rows.next_position(theirs)
            assert (begin, [row.row for row in drawn.values()]) == (theirs, expected)
            ours, theirs = rows.next_position(begin), rows.next_position(theirs)


def test_rows_beyond_the_run_are_refused_at_once() -> None:
    """Oracle: 20 steps of 7 rows end before position 140; all that reach beyond are named, within a second."""
    begin = time.monotonic()
    with pytest.raises(RecipeError) as refused:
        skipping.resolve([range(10**15), range(139, 141), range(5, 7), range(10**12, 10**12 + 1)], (), Steps(), 0, 20)
    named = [one.partition(":")[0] for one in refused.value.problems]
    assert named == ["--skip-rows 139", f"--skip-rows {10**12}", "--skip-rows 0"]
    assert all("the run ends before position 140," in one for one in refused.value.problems)
    assert time.monotonic() - begin < 1


def test_a_great_range_within_a_long_run_is_passed_quickly() -> None:
    """Oracle: by hand: half of a run of 200,000 steps of 512 rows; no row of it is drawn on the way."""

    class Counting(Steps):
        drawn = 0

        def row_ids(self, position: int) -> list[RowId]:
            self.drawn += 1
            return super().row_ids(position)

    rows = Counting(512)
    half = 100_000 * 512
    found = skipping.resolve([range(3, half)], (), rows, 0, 200_000)
    assert found.ranges == ((3, half),)
    begin, drawn = skipping.draw(rows, 512, found.ranges)
    assert begin == half and len(drawn) == 512 and rows.drawn == 1


def test_a_run_without_an_end_is_walked_as_far_as_asked() -> None:
    """Oracle: the steps that are looked at: those up to the last position asked for, whatever the run's length."""

    class Counting(Steps):
        looked_at = 0

        def next_position(self, position: int) -> int:
            self.looked_at += 1
            assert self.looked_at < 100
            return super().next_position(position)

    for asked in (range(5), range(60, 70)):
        found = skipping.resolve([asked], ((14, 21),), Counting(), 0, 10**12)
        assert found.ranges == skipping.merged([(14, 21), (asked.start, asked.stop)])


def test_a_step_passed_over_makes_room_for_another() -> None:
    """Oracle: the run that leaves out its last step, 133 to 139, draws 140 to 146: these may be left out, too."""
    first = skipping.resolve([range(133, 140)], (), Steps(), 0, 20)
    again = skipping.resolve([range(140, 147)], first.ranges, Steps(), 126, 2)
    assert again.ranges == ((133, 147),)
    assert "positions 133 to 139 are left out, as before" in again.said[0]
    with pytest.raises(RecipeError, match="ends before position 147"):
        skipping.resolve([range(140, 148)], first.ranges, Steps(), 126, 2)


def test_what_lies_behind_or_is_forgotten_is_said() -> None:
    """Oracle: rows that were drawn long ago; and `none`, which takes again what is recorded."""
    found = skipping.resolve([range(7)], ((20, 22),), Steps(), 70, 10)
    assert found.ranges == ((0, 7), (20, 22)) and found.said == (
        "rows at positions 0 to 6 lie behind the run already: they change nothing",
    )
    found = skipping.resolve([range(0), range(80, 81)], ((90, 92),), Steps(), 70, 10)
    assert found.ranges == ((80, 81),)
    assert found.said == (
        "rows at positions 90 to 91 are no longer left out",
        "rows at positions 80 to 80 are left out",
    )


def test_what_was_left_out_is_remembered(tmp_path: Path) -> None:
    """Oracle: the newest launch's env.json, on whichever host; without one the checkpoint; an older version's both."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    content = {"skipped_rows": [[7, 14]]}

    def recorded(control: Any) -> skipping.Ranges:
        return skipped_rows.recorded(control, tmp_path / control.hosts[control.rank], content)

    def found() -> skipping.Ranges:
        first, second = ranks.run(["a", "b"], recorded)
        assert first == second
        return first

    assert found() == ((7, 14),)
    (tmp_path / "a" / "env.json").write_text(json.dumps({"generation": 3, "skipped_rows": [[14, 16]]}))
    assert found() == ((7, 16),)
    (tmp_path / "b" / "env.json").write_text(json.dumps({**Launch(4, "x").facts(), "skipped_rows": [[1, 2]]}))
    assert found() == ((1, 2),)
    (tmp_path / "b" / "env.json").write_text(json.dumps({**Launch(4, "x").facts(), "skipped_rows": []}))
    assert found() == ()
    for path in (tmp_path / "a", tmp_path / "b"):
        (path / "env.json").write_text("")
    assert found() == ((7, 14),)


def test_skipped_rows_come_back_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pairs as they were, so that nothing seems to have changed; none in a checkpoint of an older version."""
    engine: Any = SimpleNamespace(deepspeed=None, control=None, loss_scaler=None, topology={})
    monkeypatch.setattr(resume.partitions, "scatter", lambda *_: None)
    monkeypatch.setattr(resume.masters, "check", lambda *_: None)
    old = {"topology": {"other": 1}, "optimizer_steps": {}, "loss_scaler": None, "step": 4}
    for stored, expected in (({}, ()), ({"skipped_rows": [[7, 14], [20, 22]]}, ((7, 14), (20, 22)))):
        found = resume.ResumePoint(0, None, {**old, **stored})
        assert resume.load(engine, found) == resume.State(step=4, skipped_rows=expected)


def test_a_change_says_what_this_launch_added(tmp_path: Path) -> None:
    """Oracle: the flags of the launch, not what it goes on with."""
    facts = {"generation": 2, "skipped_rows": [[7, 14], [28, 35]], "skip_rows": [[28, 35]]}
    (tmp_path / "tokenizer").mkdir()
    recipe = loading.load("demo")
    folder.describe(tmp_path / "run", recipe, {}, facts, tmp_path / "tokenizer")
    folder.describe(tmp_path / "run", recipe, {}, {**facts, "skip_rows": []}, tmp_path / "tokenizer")
    lines = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"generation": 2, "step": 0, "skipped_rows": [[28, 35]]}]


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "-1:5", "a:b", "1:2:3", "", "NONE"])
def test_a_flag_that_names_no_range_is_refused(text: str) -> None:
    """Oracle: reversed, empty, negative, no numbers."""
    with pytest.raises(argparse.ArgumentTypeError, match="no range of positions"):
        flags._rows(text)
    assert flags._rows("5:7") == range(5, 7) and not flags._rows("none")
