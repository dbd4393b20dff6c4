"""What a model card tells of the devices. Oracles: folders whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_slm.publish.card.devices import Setup
from ds_slm.publish.card.facts import read_facts
from ds_slm.recipe import loading
from ds_slm.run import folder as run_folder
from ds_slm.run import metrics_file
from tests.support import told_runs
from tests.support.cards import rows_of, section
from tests.support.told_runs import recipe_of, write_run


def test_device_hours_count_steps_that_were_not_recorded(tmp_path: Path) -> None:
    """Oracle: every fourth of 12 steps was recorded, each of 0.5 s on 2 devices: 12 s."""
    run = write_run(tmp_path / "run", recipe_of())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[3:12:4]))
    facts = read_facts(run, recipe_of(), run / "checkpoints" / "step-00000012")
    assert facts.device_hours == pytest.approx(12 / 3600)


def test_device_hours_count_each_launch_with_its_own_devices(tmp_path: Path) -> None:
    """Oracle: by hand: 4 of 12 steps of 0.5 s on 8 devices, the rest on 3."""
    run = write_run(tmp_path / "run", recipe_of())
    with (run / "metrics.jsonl").open("a") as file:
        for step, world_size in ((0, 8), (4, 3)):
            file.write(json.dumps({"kind": "launch", "step": step, "world_size": world_size}) + "\n")
    facts = read_facts(run, recipe_of(), run / "checkpoints" / "step-00000012")
    assert facts.device_hours == pytest.approx(0.5 * (4 * 8 + 8 * 3) / 3600)


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """Six steps on one Abacus, then six on two hosts of H100, with another learning rate."""
    first = {"device": "Abacus", "world_size": 1, "hosts": ["a"], "zero_stage": 0, "generation": 1}
    then = {"device": "H100", "world_size": 16, "hosts": ["a"] * 8 + ["b"] * 8, "zero_stage": 3, "generation": 2}
    run = write_run(tmp_path / "run", recipe_of(), **then)
    told_runs.add_checkpoint(run, recipe_of(), 6)
    run_folder.record_change(run, {"generation": 2, "begins_at_step": 6}, {"changes": {"optimizer.lr": [0.01, 0.5]}})
    (run / "recipe.toml").write_text(loading.to_toml(recipe_of("optimizer.lr=0.5")))

    records = metrics_file.read(run)
    launches = [{"kind": "launch", "step": 0, **first}, {"kind": "launch", "step": 6, **then}]
    train = [{**one, "tokens_per_s": 100.0 if one["step"] <= 6 else 5e6} for one in records["train"]]
    lines = [json.dumps(one) + "\n" for one in [*launches, *train, *records["val"]]]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def test_an_earlier_checkpoint_knows_nothing_of_later_launches(moved: Path, export: Any) -> None:
    """Oracle: the first launch alone: neither the devices nor the rate of the second touched these weights."""
    card = export(moved, "--step", "6")
    assert rows_of(card)["Hardware"] == ["1 × Abacus on 1 host, 3 device seconds"]
    assert "DeepSpeed ZeRO-0" in card and "100 tokens a second" in card
    assert "H100" not in card and "Launch 2" not in card
    assert "up to 0.01" in section(card, "Training") and "lr = 0.01" in card


def test_what_an_older_version_recorded_is_told_as_far_as_it_goes(moved: Path, export: Any) -> None:
    """Oracle: by hand: its changes have no step, which the launch records tell; its first launch has no record."""
    path = moved / "changes.jsonl"
    path.write_text(path.read_text().replace(', "step": 6', ""))
    assert "Launch 2" not in export(moved, "--step", "6")

    lines = (moved / "metrics.jsonl").read_text().splitlines(keepends=True)
    (moved / "metrics.jsonl").write_text("".join(lines[1:]))
    card = export(moved.rename(moved.with_name("renamed")))
    assert "- 6 steps on devices that were not recorded" in card and "- 6 steps on 16 × H100" in card
    assert rows_of(card)["Hardware"] == ["16 × H100 on 2 hosts"]


def test_each_kind_of_launch_has_its_own_speed(moved: Path, export: Any) -> None:
    """Oracle: by hand: six steps of 100 tokens a second on one device, six of 5,000,000 on sixteen."""
    card = export(moved)
    assert rows_of(card)["Hardware"] == ["1 × Abacus on 1 host, then 16 × H100 on 2 hosts, 51 device seconds"]
    training = section(card, "Training")
    assert (
        "- 6 steps on 1 × Abacus on 1 host, DeepSpeed ZeRO-0, 2 rows in a forward of a device, 100 tokens" in training
    )
    assert "- 6 steps on 16 × H100 on 2 hosts, DeepSpeed ZeRO-3, 2 rows in a forward of a device, 5,000,000" in training
    assert "Launch 2 changed optimizer.lr from 0.01 to 0.5" in training


@pytest.mark.parametrize(("device", "told"), [("H100", "the peak FLOP/s"), ("EPYC (cpu)", "one matrix product")])
def test_what_a_share_of_is_said(device: str, told: str) -> None:
    """Oracle: by hand: a GPU's peak is its datasheet's, a CPU's is measured."""
    setup = Setup(f"2 × {device} on 1 host", "", 1, [{"step": 1, "mfu": 0.25}])
    assert setup.measured() == [f"25% of {'the FLOP/s of ' if 'cpu' in device else ''}{told}"]
