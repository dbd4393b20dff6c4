"""The curves of a run as small pictures beside the card: loss, learning rate, gradient norm.

RunFacts --draw--> {file name: PNG}        the same run and matplotlib --> the same bytes

matplotlib is imported only where a picture is drawn.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_slm.publish.card.facts import RunFacts
from ds_slm.publish.curves import scale_by_logarithm, series, settings, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DOTS_PER_INCH = 7.0, 3.0, 110
LINE, MEAN, HELD_OUT = "#b9c6d8", "#1f4e8c", "#c8501e"
SMOOTHED_OVER = 50
"""Number of parts of a run: a point of the smooth curve is the mean of about one part."""


@dataclass(frozen=True)
class Picture:
    """One picture: the field of the records of training steps that it shows."""

    file: str
    field: str
    label: str
    title: str
    log: bool = False
    with_held_out: bool = False


PICTURES = (
    Picture("loss.png", "loss", "loss, nats a token", "Training and held-out loss", with_held_out=True),
    Picture("learning-rate.png", "lr", "learning rate", "Learning rate"),
    Picture("gradient-norm.png", "grad_norm", "gradient norm", "Gradient norm before clipping", log=True),
)


def figures(facts: RunFacts) -> list[str]:
    """A line of Markdown for each picture that `draw` makes."""
    return [f"![{one.title} after each step]({one.file})" for one in PICTURES if len(_points(facts, one)) > 1]


def draw(facts: RunFacts) -> dict[str, bytes]:
    """The pictures by file name; fields that fewer than two records hold have none."""
    return {one.file: _png(facts, one) for one in PICTURES if len(_points(facts, one)) > 1}


def _points(facts: RunFacts, picture: Picture) -> list[tuple[int, float]]:
    return series(facts.records.get("train", ()), picture.field)


def _png(facts: RunFacts, picture: Picture) -> bytes:
    """A picture, drawn without a screen, without a clock, and without a user's settings of matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(rc=settings()):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _fill(axes, facts, picture)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _fill(axes: "Axes", facts: RunFacts, picture: Picture) -> None:
    points = _points(facts, picture)
    steps, values = zip(*points, strict=True)
    if picture.field == "lr":
        axes.plot(steps, values, color=MEAN, linewidth=1.6)
    else:
        axes.plot(steps, values, color=LINE, linewidth=0.8, label="each step")
        width = len(points) // SMOOTHED_OVER
        if width > 1:
            axes.plot(steps, smooth(values, width), color=MEAN, linewidth=1.6, label=f"mean of {width} steps")

    held_out = series(facts.records.get("val", ()), picture.field) if picture.with_held_out else []
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color=HELD_OUT, marker="o", markersize=4, linewidth=1.2, label="held out"
        )

    if picture.log and min(values) > 0:
        scale_by_logarithm(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(picture.label)
    if picture.field != "lr":
        axes.legend(frameon=False)
