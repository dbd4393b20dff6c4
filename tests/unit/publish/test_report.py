"""`ds-slm report`: a page about runs, parsed as HTML, and once seen by a browser."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ds_slm.errors import ConfigError
from ds_slm.publish import curves
from ds_slm.publish.report import write_page
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[3]


def write_run(folder: Path, steps: int = 40, lr: float = 3e-3, **more: list[dict]) -> Path:
    """A run folder of so many steps, with the records that `more` adds."""
    folder.mkdir(parents=True)
    recipe = loading.load("demo", [f"optimizer.lr={lr}"])
    (folder / "recipe.toml").write_text(loading.to_toml(recipe), encoding="utf-8")
    lines = [
        {
            "kind": "train", "step": step, "tokens": 2048 * step, "loss": 8 / (1 + lr * step), "lr": lr,
            "grad_norm": 1.0 / step, "tokens_per_s": 2048.0, "step_s": 1.0, "loss_spike": 2.5 if step == 7 else 0.0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    lines += [{"kind": "val", "step": step, "loss": 5.0, "tokens": 2048 * step} for step in range(20, steps + 1, 20)]
    lines += [{"kind": kind, **record} for kind, records in more.items() for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


LAUNCHES = [
    {"step": 0, "hosts": ["a", "a"], "world_size": 2, "device": "cpu", "precision": "bf16", "zero_stage": 1,
     "generation": 1},
    {"step": 20, "hosts": ["b"], "world_size": 1, "device": "cpu", "precision": "bf16", "zero_stage": 1,
     "generation": 2},
]  # fmt: skip
SAMPLES = [
    {"step": 20, "continuations": {"Once": " upon <b>a time</b>"}},
    {"step": 40, "continuations": {"Once": " & again"}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with all that a folder can hold, and one with another rate."""
    runs = tmp_path_factory.mktemp("runs")
    first = write_run(runs / "first", launch=LAUNCHES, samples=SAMPLES)
    write_run(runs / "second", steps=1200, lr=1e-3)

    (first / "bad-steps" / "step-00000033").mkdir(parents=True)
    (first / "bad-steps" / "step-00000033" / "what.json").write_text('{"step": 33, "why": "the loss is nan"}')
    (first / "changes.jsonl").write_text('{"generation": 2, "changes": {"train.steps": [400, 800]}}\n')
    (first / "stopped.json").write_text('{"step": 40}')
    return runs


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """The report of both."""
    return write_page([folder / "first", folder / "second"])


class Page(HTMLParser):
    """The text of a page, without its pictures and styles, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.loads, self.inside = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside += [tag] if tag in ("svg", "style") else []
        self.loads += [
            value for name, value in attrs if name in ("src", "href") and value and not value.startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside else f"{data.strip()}\n" * bool(data.strip())


def test_the_page_loads_nothing(page: str) -> None:
    """No file, no script, no network: it can be sent."""
    assert Page(page).loads == []
    assert "<script" not in page
    assert "@import" not in page and "url(http" not in page


def test_every_chart_has_every_axis_and_run(page: str) -> None:
    """Lines are found by their ids; the held-out losses stand in the first chart alone."""
    for axis in curves.AXES:
        for place in (0, 1):
            for field in ("loss", "lr", "grad_norm", "tokens_per_s"):
                assert page.count(f'id="train-{field}-{axis}-{place}"') == 1
            assert page.count(f'id="val-loss-{axis}-{place}"') == 1
    assert page.count("<svg") == 4 * len(curves.AXES)


def test_no_two_pictures_share_an_id(page: str) -> None:
    """A clip path of one would cut the lines of another. What matplotlib calls axes and ticks, nothing refers to."""
    used = re.findall(r'<clipPath id="(.+?)"', page) + re.findall(r'id="((?:train|val)-.+?)"', page)
    assert len(used) == len(set(used)) > 0 and not [one for one in used if " " in one]


def test_it_tells_what_differs_and_what_happened(page: str) -> None:
    """Every kind of incident, in the order of steps."""
    text = Page(page).text
    assert "optimizer.lr\n0.003\n0.001" in text
    assert "model.hidden_size" not in text

    incidents = text.split("Incidents")[1]
    said = [
        "started on 2 x cpu on a, bf16, ZeRO-1", "loss spike", "resumed on 1 x cpu", "launch 2: train.steps: 400 → 800",
        "refused: the loss is nan", "stopped by a signal",
    ]  # fmt: skip
    places = [incidents.index(one) for one in said]
    assert places == sorted(places)
    assert "40 of 800" in text


def test_samples_are_text_whatever_they_hold(page: str) -> None:
    """A model's text is nobody's markup; the newest stands first."""
    assert "upon &lt;b&gt;a time&lt;/b&gt;" in page
    text = Page(page).text
    assert text.index("& again") < text.index("upon <b>")


def test_the_same_runs_give_the_same_page(folder: Path, page: str) -> None:
    """No clock, no random ids."""
    assert write_page([folder / "first", folder / "second"]) == page


def test_a_run_of_an_older_version_is_shown() -> None:
    """Oracle: a folder that an earlier version wrote; it records neither launches nor samples."""
    text = Page(write_page([ROOT / "tests" / "golden" / "made" / "run"])).text
    assert "8 of 12" in text


def test_what_is_no_run_is_refused_all_at_once(folder: Path, tmp_path: Path) -> None:
    """Every folder that is none; a run that has not begun."""
    with pytest.raises(ConfigError) as refused:
        write_page([folder, tmp_path, folder / "first"])
    assert len(refused.value.problems) == 2

    begun = write_run(tmp_path / "begun", steps=0)
    with pytest.raises(ConfigError, match="no record of a step"):
        write_page([begun])


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Two folders may be called alike."""
    other = write_run(tmp_path / "first")
    assert str(other) in Page(write_page([folder / "first", other])).text


def test_figures_of_other_weights_say_so(folder: Path, tmp_path: Path) -> None:
    """No checkpoint is left to compare with, and the run has gone on since it was scored."""
    run = write_run(tmp_path / "scored")
    figure = {"value": 41.5, "stderr": 1.25, "chance": 25.0, "commonest": None}
    task = {"items": 9, "of_items": 9, "limited": False, "published": None, "figures": {"acc": figure}}
    found = {"model": {"sha256": "other", "step": 20}, "tasks": {"piqa": task}}
    (run / "eval.json").write_text(json.dumps(found))
    text = Page(write_page([run])).text
    assert "weights unchecked" in text and "at step 20" in text


def test_records_that_are_damaged_are_passed_over(tmp_path: Path) -> None:
    """Each in a way that JSON allows."""
    run = write_run(tmp_path / "run", samples=[{"step": 5, "continuations": ["text"]}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99}\n')
    (run / "changes.jsonl").write_text('{"generation": 2, "changes": [1], "skipped_rows": [[1, 2]]}\n')
    assert "rows left out: [[1, 2]]" in Page(write_page([run])).text


def test_held_out_losses_stand_between_the_steps_that_were_recorded() -> None:
    """By hand: on a line through steps 0, 5 and 10 that took a second each, evaluations at 0, 3, 10 and behind them."""
    train = [{"step": step, "loss": 5.0, "tokens": 100 * step, "step_s": 1.0} for step in (5, 10)]
    val = [{"step": step, "loss": 5.0} for step in (0, 3, 10, 12)]
    ((_, pictures), *_) = curves.charts([("run", {"train": train, "val": val})])
    for axis, picture in pictures.items():
        dots = picture.split(f'id="val-loss-{axis}-0"')[1].split("</g>\n   </g>")[0]
        first, *others = (float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', dots))
        places = [(one - first) / (others[1] - first) for one in others]
        assert places == pytest.approx([0.3, 1.0, 1.2], abs=1e-3)


def test_what_two_texts_differ_in_is_named(tmp_path: Path) -> None:
    """Oracle: the files; both sources have the same name and weight."""
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        text = f'name = "text"\nkind = "files"\npath = "/data/{run.name}.jsonl"'
        recipe = loading.parse((run / "recipe.toml").read_text(), recorded=True)
        tables = recipe.model_dump(mode="json", exclude_none=True)
        tables["data"]["source"] = [tomllib.loads(text)]
        (run / "recipe.toml").write_text(loading.to_toml(Recipe.model_validate(tables)))
    assert "text of one.jsonl (1)\ntext of two.jsonl (1)" in Page(write_page(runs)).text


def test_numbers_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """Oracle: a page; JSON allows null wherever a number stands."""
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 401, "loss": 1.0, "tokens": null}\n{"kind": "val", "step": 401}\n')
    (run / "done.json").write_text('{"step": 401, "val_loss": null, "val_perplexity": 2.0}')
    assert "all held-out rows: perplexity" in Page(write_page([run])).text


def test_time_counts_steps_that_were_not_recorded() -> None:
    """By hand: every fourth step is recorded and takes a second."""
    assert curves.elapsed_s([{"step": 4, "step_s": 1.0}, {"step": 8, "step_s": 1.0}]) == [4.0, 8.0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: apt-get install chromium")
def test_a_browser_draws_every_run(tmp_path: Path) -> None:
    """Oracle: pixels of a screenshot in each run's colour, in the place of the first chart."""
    from PIL import Image

    runs = [write_run(tmp_path / "first", 400), write_run(tmp_path / "second", 400, 1e-3)]
    (tmp_path / "report.html").write_text(write_page(runs), encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,1400",
        f"--screenshot={tmp_path / 'seen.png'}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)

    seen = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))[420:760, 30:640].astype(int)
    for colour in curves.COLOURS[:2]:
        distance = np.abs(seen - np.array(tuple(bytes.fromhex(colour[1:])))).sum(axis=-1)
        assert (distance < 30).sum() > 200, colour


def test_the_command_writes_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0, one file."""
    from ds_slm.cli import main

    out = tmp_path / "both.html"
    monkeypatch.setattr(sys, "argv", ["ds-slm", "report", str(folder / "first"), "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 0
    assert out.read_text(encoding="utf-8") == write_page([folder / "first"])
