"""Rows that are left out of a run, by their global position: a step without some of its rows is shorter.

    --skip-rows, and what earlier launches left out --resolve--> ranges --> every checkpoint and env.json
    draw                                            --> the next step that has rows left

The positions of all other rows do not change. If all rows of a step are left out, the step is passed over, and the run
takes another step at its end instead.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ds_slm.data.order import RowId
from ds_slm.errors import RecipeError

Ranges = tuple[tuple[int, int], ...]
"""(first position, the position after the last) of each range, ascending; ranges neither overlap nor touch."""


class Positions(Protocol):
    """The part of a row source that is needed here."""

    def row_ids(self, position: int) -> list[RowId]:
        """Rows of the step that begins at a global position."""
        ...

    def next_position(self, position: int) -> int:
        """Where the next step begins."""
        ...


@dataclass(frozen=True)
class Skipping:
    """What a launch leaves out."""

    ranges: Ranges
    said: tuple[str, ...] = ()
    """Lines for the user."""


def merged(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The same positions as ascending ranges with gaps between them; empty ones are dropped."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((int(one[0]), int(one[1])) for one in ranges):
        if first >= end:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def end_of_range(ranges: Ranges, position: int) -> int:
    """The end of the range that holds a position; the position itself if none does."""
    index = bisect_right(ranges, position, key=lambda one: one[0]) - 1
    return max(ranges[index][1], position) if index >= 0 else position


def draw(rows: Positions, position: int, skipped: Ranges) -> tuple[int, dict[int, RowId]]:
    """Where the next step begins, and its rows by global position, without skipped ones; there is at least one."""
    while True:
        position = _behind_skipped_steps(rows, position, skipped)
        left = dict(enumerate(rows.row_ids(position), position))
        if skipped:
            left = {place: row for place, row in left.items() if end_of_range(skipped, place) == place}
        if left:
            return position, left
        position = rows.next_position(position)


def _behind_skipped_steps(rows: Positions, position: int, skipped: Ranges) -> int:
    """The position of the first step from here on that is not left out completely; does not draw rows."""
    end = end_of_range(skipped, position)
    while (after := rows.next_position(position)) <= end:
        position = after
        if position == end:
            end = end_of_range(skipped, position)
    return position


def resolve(asked: Sequence[range], recorded: Ranges, rows: Positions, position: int, steps_left: int) -> Skipping:
    """The rows that a launch leaves out: the recorded ones, and those that its flags add.

    Args:
        asked: `--skip-rows`; an empty range among them stands for `none`: recorded rows are taken again.
        recorded: the rows that earlier launches left out.
        rows: where rows come from.
        position: the position of the next row to draw.
        steps_left: the recipe's remaining steps.

    Raises:
        RecipeError: a range reaches beyond the last row of the run; names each.
    """
    forget = any(not one for one in asked)
    ranges, said, problems = () if forget else recorded, [], []

    ahead = [one for one in ranges if one[1] > position]
    if ahead:
        said.append(f"rows at {_told(ahead)} are left out, as before (--skip-rows none takes them again)")
    if forget and recorded:
        said.append(f"rows at {_told(recorded)} are no longer left out")

    new = sorted((one for one in asked if one), key=lambda one: one.stop)
    greatest = new[-1].stop if new else 0

    measured, limit = ranges, _end_of_run(rows, position, steps_left, ranges, greatest)
    for one in new:
        if one.stop > max(limit, position) and measured != ranges:  # other steps replace those that are passed over
            measured, limit = ranges, _end_of_run(rows, position, steps_left, ranges, greatest)
        if one.stop > max(limit, position):
            problems.append(
                f"--skip-rows {one.start}:{one.stop}: the run ends before position {limit}, so no row from there on is "
                f"drawn: expected A:B with B of at most {limit}."
            )
            continue

        ranges = merged([*ranges, (one.start, one.stop)])
        what = "lie behind the run already: they change nothing" if one.stop <= position else "are left out"
        said.append(f"rows at {_told([(one.start, one.stop)])} {what}")

    if problems:
        raise RecipeError(problems)
    return Skipping(ranges, tuple(said))


def _end_of_run(rows: Positions, position: int, steps_left: int, skipped: Ranges, greatest: int) -> int:
    """The position after the last row of the run, or one from `greatest` on; walks steps without drawing rows."""
    for _ in range(steps_left):
        if position >= greatest:
            break
        position = rows.next_position(_behind_skipped_steps(rows, position, skipped) if skipped else position)
    return position


def _told(ranges: Iterable[Sequence[int]]) -> str:
    return "positions " + ", ".join(f"{first} to {end - 1}" for first, end in ranges)
