"""Curves of several runs in one chart, as SVG within a page.

    [(run, records by kind)] --charts--> for each chart and axis: SVG        the same runs --> the same text

matplotlib is imported only where a picture is drawn.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Run = tuple[str, Mapping[str, Sequence[Record]]]
"""A run's name, and its records by kind."""

AXES = {"step": "steps", "tokens": "tokens", "hours": "hours of training steps"}
COLOURS = ("#1f4e8c", "#c8501e", "#2e7d4f", "#7b3fa0", "#b08900", "#008b8b", "#a03050", "#555555")
"""Colours of the runs, in order; with more runs they begin again from the first."""
LONGEST_LINE = 400
"""The most points of a line: more are not visible, and make a page large."""
WIDTH, HEIGHT = 7.6, 3.2


@dataclass(frozen=True)
class Chart:
    """The field of the records of training steps that is drawn, and what is drawn beside it."""

    title: str
    field: str
    smoothed: bool = True
    held_out: bool = False
    log: bool = False


CHARTS = (
    Chart("Training and held-out loss, nats a token", "loss", held_out=True),
    Chart("Learning rate", "lr", smoothed=False),
    Chart("Gradient norm before clipping", "grad_norm", log=True),
    Chart("Tokens per second", "tokens_per_s"),
)


def charts(runs: Sequence[Run]) -> list[tuple[str, dict[str, str]]]:
    """Every chart's title, and its SVG for each axis; without fields that no run records."""
    return [
        (chart.title, {axis: _svg(chart, axis, runs) for axis in AXES})
        for chart in CHARTS
        if any(series(records.get("train", ()), chart.field) for _, records in runs)
    ]


def elapsed_s(train: Sequence[Record]) -> list[float]:
    """Seconds of training steps up to each record; unrecorded steps count like the next recorded one."""
    steps = [record["step"] for record in train]
    taken = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    return list(accumulate((record.get("step_s") or 0.0) * count for record, count in zip(train, taken, strict=True)))


def settings() -> dict[Any, Any]:
    """matplotlib's default settings with ours, whatever a user's are."""
    import matplotlib

    kept = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    return kept | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                   "grid.color": "#e8e8e8", "axes.axisbelow": True}  # fmt: skip


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of about `width` values around each."""
    before, after = width // 2, width - width // 2
    return [statistics.fmean(values[max(place - before, 0) : place + after]) for place in range(len(values))]


def scale_by_logarithm(axes: "Axes") -> None:
    """Make the axis logarithmic, with labels like 0.5 and 2, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(chart: Chart, axis: str, runs: Sequence[Run]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes ids unique within the page.
    rc: dict[Any, Any] = settings() | {"svg.fonttype": "none", "svg.hashsalt": f"{chart.field} {axis}"}
    with matplotlib.rc_context(rc=rc):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for place, (_, records) in enumerate(runs):
            _draw(axes, chart, axis, records, place)
        axes.set_xlabel(AXES[axis])
        if chart.log:
            scale_by_logarithm(axes)

        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})  # pyright: ignore[reportArgumentType]
    text = file.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _draw(axes: "Axes", chart: Chart, axis: str, records: Mapping[str, Sequence[Record]], place: int) -> None:
    """Draw the lines of the run at a place among all."""
    colour = COLOURS[place % len(COLOURS)]
    train = records.get("train", ())
    places = _places(train, axis)
    points = [(places(step), value) for step, value in series(train, chart.field)]
    if not points:
        return

    # A long run is drawn as means of its neighbouring steps.
    xs, ys = (list(column) for column in zip(*points, strict=True))
    stride = math.ceil(len(points) / LONGEST_LINE)
    if chart.smoothed and stride > 1:
        ys = smooth(ys, stride)
    axes.plot(xs[::stride], ys[::stride], color=colour, linewidth=1.3, gid=f"train-{chart.field}-{axis}-{place}")

    held_out = [(places(step), value) for step, value in series(records.get("val", ()), "loss")]
    if chart.held_out and held_out:
        columns = zip(*held_out, strict=True)
        axes.plot(
            *columns,
            color=colour,
            marker="o",
            markersize=6,
            markeredgecolor="white",
            linewidth=0,
            gid=f"val-{chart.field}-{axis}-{place}",
        )


def _places(train: Sequence[Record], axis: str) -> Callable[[int], float]:
    """A step's place on an axis: on a line between two recorded steps, and after the last one at the mean rate."""
    if axis == "step":
        return float
    steps = [0, *(record["step"] for record in train)]
    if axis == "hours":
        places = [0.0, *(seconds / 3600 for seconds in elapsed_s(train))]
    else:
        places = [0.0, *(float(record.get(axis) or 0) for record in train)]
    rate = places[-1] / max(steps[-1], 1)
    return lambda step: float(np.interp(step, steps, places)) if step <= steps[-1] else step * rate


def series(records: Sequence[Record], field: str) -> list[tuple[int, float]]:
    """Step and value of the records that hold a finite number in a field."""
    return [(record["step"], float(record[field])) for record in records if is_number(record.get(field))]


def is_number(value: Any) -> bool:
    """Whether this can be shown as a figure."""
    return isinstance(value, int | float) and math.isfinite(value)
