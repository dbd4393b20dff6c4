"""The pictures beside a model card."""

import io

import pytest
from PIL import Image

from ds_slm.publish import curves
from ds_slm.publish.card import plots
from ds_slm.publish.card.facts import RunFacts, read_facts
from tests.support.told_runs import recipe_of, write_run


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    run = write_run(tmp_path_factory.mktemp("plots") / "run", recipe_of())
    return read_facts(run, recipe_of(), run / "checkpoints" / "step-00000012")


def test_three_small_pictures_are_drawn(facts: RunFacts) -> None:
    """Oracle: PNGs that Pillow reads, of a size that a page can show, each of them named by a line of the card."""
    drawn = plots.draw(facts)
    assert list(drawn) == ["loss.png", "learning-rate.png", "gradient-norm.png"]
    for content in drawn.values():
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "PNG" and picture.size == (770, 330) and len(content) < 100_000
        assert not picture.info.get("Software") and not picture.info.get("Creation Time")
        assert len(set(picture.convert("L").tobytes())) > 10  # it is not blank
    assert [line.rpartition("(")[2].rstrip(")") for line in plots.figures(facts)] == list(drawn)


def test_somebodys_settings_change_nothing(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same bytes with other colours, sizes and a backend for a screen that is not there."""
    import matplotlib

    before = plots.draw(facts)
    monkeypatch.setenv("DISPLAY", "")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 30}):
        assert plots.draw(facts) == before


def test_a_run_without_records_has_no_pictures(facts: RunFacts) -> None:
    """Oracle: no file and no line, also where all values are not finite, or a single step was taken."""
    for records in (
        {},
        {"train": [{"step": 1, "loss": 2.0}]},
        {"train": [{"step": n, "loss": float("nan")} for n in range(5)]},
    ):
        bare = RunFacts(facts.recipe, 1, "", {}, {}, (), records, {})
        assert plots.draw(bare) == {} and plots.figures(bare) == []


def test_a_long_run_is_smoothed() -> None:
    """Oracle: means of the values around each place, by hand; the ends have fewer neighbours."""
    assert curves.smooth([0.0, 3.0, 6.0, 9.0], 2) == [0.0, 1.5, 4.5, 7.5]
