"""A table of figures: a column for each case, a row for each figure of it."""

from collections.abc import Mapping

from rich.table import Table


def by_case(title: str, corner: str, cases: Mapping[str, Mapping[str, float]], form: str) -> Table:
    """A table of some cases, which all have the same figures.

    Args:
        title: the title above the table.
        corner: the text above the names of the figures.
        cases: name -> figure -> value.
        form: the format of a value, as `format` takes it.
    """
    grid = Table(title=title)
    grid.add_column(corner)
    for case in cases:
        grid.add_column(case, justify="right")
    for figure in next(iter(cases.values())):
        grid.add_row(figure, *(format(figures[figure], form) for figures in cases.values()))
    return grid
