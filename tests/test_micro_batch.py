"""--micro-batch auto: the fastest that fits, measured once and remembered."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.recipe import schema
from ds_slm.train import micro_batch
from tests import runs

ZERO = {"stage": 1}


class TwoRanks:
    """Two ranks on this host; the other one is twice as slow."""

    rank, world_size, ranks_on_host = 0, 2, 2

    def gather(self, message: Any) -> list[Any]:
        return [message, 2 * message]

    def broadcast(self, message: Any, source: int) -> Any:
        return message

    def barrier(self) -> None: ...


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> schema.Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return schema.load(str(runs.write_recipe(tmp_path)), ["train.global_batch_tokens=512"])


def choose(recipe: schema.Recipe, **changes: Any) -> tuple[int, list[str]]:
    """What is chosen on a CPU, and what is said."""
    said: list[str] = []
    control: Any = TwoRanks()
    options = {"device_name": "a CPU", "zero": ZERO} | changes
    device, dtype = torch.device("cpu"), torch.float32
    return micro_batch.choose(recipe, control=control, device=device, dtype=dtype, say=said.append, **options), said


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({1: 1.0, 2: 2.0, 4: 1.5}, 2),
        ({1: 1.0, 2: 1.01, 4: 1.015}, 1),
        ({1: 1.0, 2: 1.01, 4: 1.5}, 4),
        ({1: 1.0, 2: 0.9, 4: 1.1}, 4),
        ({}, 1),
    ],
)
def test_twice_the_rows_must_pay(speeds: dict[int, float], chosen: int) -> None:
    """Oracle: by hand: the fastest; of two that are alike the smaller; one row where nothing else was measured."""
    assert micro_batch.fastest(speeds) == chosen


def test_the_slowest_rank_counts_and_slow_sizes_end_it(recipe: schema.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: made-up durations: 2 rows are fastest, 4 and 8 slower, 16 never tried (8 rows a rank)."""
    seconds, tried = {1: 1.0, 2: 1.0, 4: 3.0, 8: 7.0}, []

    def made_up(model: Any, recipe: Any, zero: Any, control: Any, device: Any, rows: int) -> float:
        tried.append(rows)
        return seconds[rows]

    monkeypatch.setattr(micro_batch, "_duration_s", made_up)
    chosen, said = choose(recipe)
    assert (chosen, tried) == (2, [1, 2, 4, 8])
    assert "(1: 0.5, 2: 1, 4: 0.667, 8: 0.571)" in said[0]


def test_what_does_not_fit_ends_it(recipe: schema.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with so much free memory that one row fits and two do not; and with none at all, one row."""
    real = micro_batch._free_bytes
    params = micro_batch.plan.parameter_counts(recipe.model)
    need = [
        micro_batch.budget.memory(recipe, params.total, params.embedding + params.head, ZERO, 2, rows).device_bytes
        for rows in (1, 2)
    ]
    assert need[0] < need[1] < real()
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: int(2 * (need[0] + 1) / micro_batch.FREE_SHARE))
    _, said = choose(recipe)
    assert "(1: " in said[0] and "2: " not in said[0]
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: 0)
    assert choose(recipe, device_name="another")[0] == 1


def test_a_choice_is_remembered(recipe: schema.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nothing is measured a second time; another device, ZeRO stage or model is; a damaged file is no error."""
    chosen, _ = choose(recipe)
    count = 0

    def counted(*_: Any) -> float:
        nonlocal count
        count += 1
        return math.inf

    monkeypatch.setattr(micro_batch, "_duration_s", counted)
    assert choose(recipe) == (chosen, [f"micro-batch {chosen}, as measured before ({micro_batch.cache_file()})"])
    assert count == 0
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"intermediate_size": 8})})
    for number, changed in enumerate(
        (lambda: choose(recipe, device_name="b"), lambda: choose(recipe, zero={"stage": 2}), lambda: choose(other)), 1
    ):
        changed()
        assert count == number
    micro_batch.cache_file().write_text("[1")
    choose(recipe)
    assert count == 4


def test_auto_in_a_real_run(tmp_path: Path) -> None:
    """Oracle: what is said is what the run records and what a second run remembers; the rows drawn are the same."""
    recipe = runs.write_recipe(tmp_path)
    ledgers, lines = [], []
    for name in ("first", "second"):
        arguments = ["--recipe", recipe, "--run-dir", name, "--max-steps", 2, "--micro-batch", "auto"]
        done = runs.run(runs.deepspeed_command(2, *arguments), tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        lines.append(next(line for line in done.stdout.splitlines() if line.startswith("micro-batch")))
        ledgers.append([record["ledger"] for record in runs.records(tmp_path / name)])
    [remembered] = json.loads((tmp_path / "cache" / "ds_slm" / "micro_batch.json").read_text()).values()
    assert lines[0].startswith(f"micro-batch {remembered}, by rows a second")
    assert lines[1].startswith(f"micro-batch {remembered}, as measured before")
    cuts = [json.loads((tmp_path / name / "env.json").read_text())["micro_batch_rows"] for name in ("first", "second")]
    assert cuts[0] == cuts[1] <= remembered
    assert ledgers[0] == ledgers[1]
