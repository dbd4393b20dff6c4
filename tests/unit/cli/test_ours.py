"""`ds-slm recipes`: ours is what the runs there are say, and a run of something else says what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ds_slm.cli.ours import ours_of
from ds_slm.files import write_json
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support.assistants import ds_slm

DEMO = loading.load("demo")


def write_run(runs: Path, name: str, *overrides: str, done: bool = True, **environment: Any) -> Path:
    """A run folder of the demo, as a launch leaves it."""
    recipe, folder = loading.load("demo", list(overrides)), runs / name
    (folder / "checkpoints" / "step-00000400").mkdir(parents=True)
    (folder / "recipe.toml").write_text(loading.to_toml(recipe))
    facts = {"recipe_name": "demo", "replaced_sources": [], "data_sha256": "d", **environment}
    write_json(folder / "env.json", facts)
    if done:
        figures = {"val_loss": 2.5, "val_bits_per_byte": 1.716}
        hashes = {"recipe_sha256": recipe.identity_sha256(), "data_sha256": "d"}
        write_json(folder / "done.json", {"step": recipe.train.steps, **figures, **hashes})
    return folder


CASES = {
    "finished": ({}, (), "1.716 bits per byte", True),
    "unfinished": ({"done": False}, (), "step 400 of 800", False),
    "replaced": ({"replaced_sources": ["docs"]}, (), "1.716 bits per byte (other data: docs)", False),
    "unrecorded": ({"replaced_sources": None}, (), "1.716 bits per byte (its data are not recorded)", False),
    "changed": ({}, ("train.seed=9",), "1.716 bits per byte (another recipe: train.seed 1337 -> 9)", False),
    "began with a model": ({"base_sha256": "b"}, (), "1.716 bits per byte (it began with a trained model)", False),
    "prepared anew": ({"data_sha256": "e"}, (), "1.716 bits per byte (done.json is of other data)", False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_says_what_it_is(tmp_path: Path, case: str) -> None:
    """Oracle: by hand: only a finished run of this recipe and its data counts as ours without another word."""
    given, overrides, text, counts = CASES[case]
    assert DEMO.train.seed == 1337 and DEMO.train.steps == 800
    write_run(tmp_path, "any-name", *overrides, **given)
    found = ours_of("demo", DEMO, tmp_path)
    assert found is not None
    assert (str(found), found.counts) == (text, counts)


def write_eval(folder: Path, step: int, sha256: str = "a", **task: Any) -> None:
    """An eval.json of one task, as `ds-slm eval` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"acc_norm": {"value": 26.671, "stderr": 0.44, "chance": 25.0, "commonest": 25.7}}
    whole = {"items": 10_042, "limited": False, "published": True, "figures": figures, **task}
    write_json(folder / "eval.json", {"model": {"step": step, "sha256": sha256}, "tasks": {"hellaswag": whole}})


def write_gpt_s(runs: Path, checkpoints: Mapping[int, str]) -> tuple[Recipe, Path]:
    """A finished run of gpt-s-1.4m with checkpoints of these weights; its recipe, and its folder."""
    recipe, folder = loading.load("gpt-s-1.4m"), runs / "run"
    for step, sha256 in checkpoints.items():
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_json(checkpoint / "manifest.json", {"files": {"model.safetensors": {"sha256": sha256}}})
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(loading.to_toml(recipe))
    write_json(folder / "env.json", {"replaced_sources": [], "data_sha256": "d"})
    hashes = {"recipe_sha256": recipe.identity_sha256(), "data_sha256": "d"}
    write_json(folder / "done.json", {"step": 20_345, "val_loss": 2.5, **hashes})
    return recipe, folder


@pytest.mark.parametrize(
    ("step", "task", "text"),
    [
        (20_345, {}, "hellaswag/acc_norm 26.67"),
        (20_345, {"limited": True, "items": 150}, "hellaswag/acc_norm 26.67 (first 150)"),
        (20_345, {"published": False}, "hellaswag/acc_norm 26.67 (other rows)"),
        (400, {}, "hellaswag/acc_norm 26.67 (at step 400)"),
    ],
)
def test_what_was_scored_stands_beside_the_published_figure(tmp_path: Path, step: int, task: dict, text: str) -> None:
    """Oracle: by hand; gpt-s-1.4m's headline is HellaSwag, and no trial passes for it without its word."""
    recipe, folder = write_gpt_s(tmp_path, {step: "a"})
    assert recipe.train.steps == 20_345 and recipe.targets[0].metric == "hellaswag/acc_norm"
    write_eval(folder, step, **task)
    assert str(ours_of("gpt-s-1.4m", recipe, tmp_path)) == text


@pytest.mark.parametrize(
    ("checkpoints", "text"),
    [
        ({20_345: "a"}, "hellaswag/acc_norm 26.67"),
        ({400: "b", 20_345: "a"}, "hellaswag/acc_norm 26.67"),
        ({20_345: "b"}, "validation loss 2.5"),
        ({400: "b", 20_345: "c"}, "validation loss 2.5"),
        ({}, "hellaswag/acc_norm 26.67 (weights unchecked)"),
    ],
)
def test_figures_of_other_weights_are_not_ours(checkpoints: Mapping[int, str], text: str, tmp_path: Path) -> None:
    """Oracle: by hand: eval.json is of the weights `a`; a folder that was trained anew holds checkpoints of others."""
    recipe, folder = write_gpt_s(tmp_path, checkpoints)
    write_eval(folder, 20_345)
    assert str(ours_of("gpt-s-1.4m", recipe, tmp_path)) == text


def test_the_newest_checkpoint_that_was_scored_is_shown(tmp_path: Path) -> None:
    """Oracle: by hand: an earlier checkpoint was scored as the run, then the last one by its name."""
    recipe, folder = write_gpt_s(tmp_path, {400: "a", 20_345: "b"})
    write_eval(folder, 400, "a", published=False)
    write_eval(folder / "eval" / "step-00020345", 20_345, "b")
    assert str(ours_of("gpt-s-1.4m", recipe, tmp_path)) == "hellaswag/acc_norm 26.67"


@pytest.mark.parametrize("manifest", [b"", b"[]", b'{"files": []}', b'{"files": {"model.safetensors": {}}}'])
def test_a_damaged_manifest_says_nothing_of_weights(manifest: bytes, tmp_path: Path) -> None:
    """Oracle: the same run without a checkpoint."""
    recipe, folder = write_gpt_s(tmp_path, {20_345: "a"})
    next(folder.rglob("manifest.json")).write_bytes(manifest)
    write_eval(folder, 20_345)
    assert "(weights unchecked)" in str(ours_of("gpt-s-1.4m", recipe, tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": "gpt2", "tasks": {}}'])
def test_a_damaged_record_is_no_figure(content: bytes, tmp_path: Path) -> None:
    """Oracle: the run as if nothing had been scored."""
    recipe, folder = write_gpt_s(tmp_path, {20_345: "a"})
    (folder / "eval.json").write_bytes(content)
    assert str(ours_of("gpt-s-1.4m", recipe, tmp_path)) == "validation loss 2.5"


def test_the_run_that_counts_is_shown(tmp_path: Path) -> None:
    """Oracle: of a longer run of another recipe, an unfinished one and the recipe's own, the last."""
    write_run(tmp_path, "a", "train.steps=9000")
    write_run(tmp_path, "b", done=False)
    own = write_run(tmp_path, "c")
    found = ours_of("demo", DEMO, tmp_path)
    assert found is not None and found.run == str(own)


@pytest.mark.parametrize("name", ["recipe.toml", "done.json", "env.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]"])
def test_damaged_files_are_no_run_of_ours(tmp_path: Path, name: str, content: bytes) -> None:
    """Oracle: no error, and nothing that counts."""
    (write_run(tmp_path, "demo") / name).write_bytes(content)
    found = ours_of("demo", DEMO, tmp_path)
    assert found is None or not found.counts


def test_the_verb_reads_the_runs_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the figure of a run, in the table and the JSON object; without runs every recipe is not yet run."""
    monkeypatch.chdir(tmp_path)
    assert ds_slm("recipes", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("not yet run") == len(loading.library_names())
    write_run(tmp_path / "elsewhere", "demo")
    assert ds_slm("recipes", "--runs", "elsewhere", monkeypatch=monkeypatch) == 0
    assert "1.716 bits per byte" in capsys.readouterr().out
    assert ds_slm("recipes", "--runs", "elsewhere", "--json", monkeypatch=monkeypatch) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["recipes"]}
    assert rows["demo"]["ours"] == "1.716 bits per byte" and rows["demo"]["run"]["counts"]
    assert rows["slm-10m"]["ours"] is None and rows["slm-10m"]["run"] is None
