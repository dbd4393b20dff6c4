"""A recipe and a ds_config as the dictionary that DeepSpeed gets; what is said of a file that is not there."""

from pathlib import Path
from typing import Any

import pytest

from ds_slm.errors import ConfigError
from ds_slm.recipe import ds_config, loading
from ds_slm.recipe.schema import Recipe
from tests.support import runs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loading.load(str(runs.write_recipe(tmp_path)))


@pytest.mark.parametrize(("given", "nearest"), [("zero2", "zero2"), ("zero3.jsn", "zero3"), ("nothing", None)])
def test_a_ds_config_that_is_not_there(given: str, nearest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files of the checkout, every one; the nearest as a path that can be typed."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as raised:
        ds_config.read(Path(given))
    said = str(raised.value)
    assert f"--ds-config {given}: No such file or directory" in said
    assert all(path.name in said for path in (ROOT / "ds_configs").glob("*.json"))
    assert (f"the nearest is ds_configs/{nearest}.json" in said) if nearest else ("the nearest" not in said)


def test_a_nearest_ds_config_can_be_typed_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file that the message names is there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        ds_config.read(Path("zero2"))
    named = str(raised.value).partition("the nearest is ")[2].partition(";")[0]
    assert Path(named).is_file() and Path(named).name == "zero2.json"


def test_ds_config_writes_out_what_deepspeed_would_guess(recipe: Recipe) -> None:
    """Clipping, accumulation in fp32, and the batch, whatever the file says of memory and speed."""
    engine_config = ds_config.join(recipe, {"zero_optimization": {"stage": 2}}, 3, "cpu", 1)
    assert (engine_config.micro_batch, engine_config.accumulation_steps, engine_config.filler_rows) == (1, 3, 2)
    assert engine_config.deepspeed["gradient_clipping"] == 1.0
    assert engine_config.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}
    assert engine_config.deepspeed["train_batch_size"] == 9
    assert engine_config.deepspeed["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("path", sorted((runs.ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_are_accepted(recipe: Recipe, path: Path) -> None:
    """Every file of the checkout joins with a recipe."""
    assert ds_config.join(recipe, ds_config.read(path), 2, "cpu", None).accumulation_steps >= 1


@pytest.mark.parametrize(
    ("name", "zero", "device", "world_size", "compiled"),
    [
        ("demo", {}, "cpu", 2, False),
        ("slm-10m", {}, "cpu", 2, True),
        ("gpt-s-1.4m", {}, "cuda", 1, True),
        ("gpt-s-1.4m", {}, "cuda", 16, False),
        ("demo", {"compile_blocks": True}, "cpu", 2, True),
        ("slm-10m", {"compile_blocks": False}, "cpu", 2, False),
        ("slm-10m", {"zero_optimization": {"stage": 3}}, "cpu", 2, False),
    ],
)
def test_long_runs_compile_their_blocks(
    name: str, zero: dict[str, Any], device: str, world_size: int, compiled: bool
) -> None:
    """Oracle: FLOPs of a run and device by hand: demo 1e13; slm-10m 1e18; gpt-s-1.4m 6e16, a sixteenth of it 4e15."""
    ds_file = {"zero_optimization": {"stage": 1}, **zero}
    engine_config = ds_config.join(loading.load(name), ds_file, world_size, device, None)
    assert engine_config.compiled is compiled
    assert "compile_blocks" not in engine_config.deepspeed


def test_a_run_of_twice_the_demos_length_compiles_its_blocks_on_two_cores() -> None:
    """Oracle: docs/log.md, 2026-12-01: compiling once costs about what the demo's 800 steps save."""
    settings = {"zero_optimization": {"stage": 1}}
    compiled = [
        ds_config.join(loading.load("demo", [f"train.steps={steps}"]), settings, 2, "cpu", None).compiled
        for steps in (800, 1_600)
    ]
    assert compiled == [False, True]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_deterministic_is_yes_or_no(recipe: Recipe, value: object) -> None:
    """Oracle: the refusal, by name."""
    with pytest.raises(ConfigError, match=f"deterministic = {value!r}: expected true or false"):
        ds_config.join(recipe, {"zero_optimization": {"stage": 1}, "deterministic": value}, 1, "cpu", None)


@pytest.mark.parametrize(("value", "stage"), [("yes", 1), (1, 1), (True, 3)])
def test_compiling_what_cannot_be_is_refused(recipe: Recipe, value: object, stage: int) -> None:
    """A word that means nothing, and compiled blocks where ZeRO-3 fetches their weights."""
    with pytest.raises(ConfigError, match="compile_blocks"):
        ds_config.join(recipe, {"zero_optimization": {"stage": stage}, "compile_blocks": value}, 1, "cpu", None)


def test_every_conflict_is_told_at_once(recipe: Recipe) -> None:
    """Owner, nearest key and stage, in one error."""
    bad = {"scheduler": {}, "wall_clock_breakdwn": True, "zero_optimization": {"stage": 1, "reduce_buket_size": 1}}
    with pytest.raises(ConfigError) as caught:
        ds_config.join(recipe, {**bad, "train_micro_batch_size_per_gpu": 0}, 1, "cpu", None)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(part in told for part in ("[schedule]", "wall_clock_breakdown", "reduce_bucket_size", "= 0"))
