"""The training benchmark: its arithmetic, its choice of the micro-batch, and every side for real."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import train as bench_train
from ds_slm.errors import DataError
from ds_slm.recipe import ds_config, loading
from tests.support import runs

MICRO_S, OPTIMIZER_S = 0.5, 0.2


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench_train.Bench:
    """Two CPU ranks on demo's recipe; launches are made up: half a second a row, and a fifth for the optimiser."""

    def made_up(bench: bench_train.Bench, side: str, micro_batch: int, accumulation: int) -> bench_train.Launch:
        if micro_batch > 4:
            raise DataError("out of memory")
        seconds = accumulation * MICRO_S * max(micro_batch, 2) + OPTIMIZER_S
        return bench_train.Launch(seconds, 1.0 + micro_batch, 9.0 if side == "ours" else None)

    monkeypatch.setattr(bench_train, "launch", made_up)
    return bench_train.Bench("demo", loading.load("demo"), [], tmp_path, devices=2, on_gpu=False)


def test_a_step_is_put_together_from_its_parts(bench: bench_train.Bench) -> None:
    """Oracle: by hand: 16 rows on 2 ranks are 4 forwards of 2 rows each, or 8 on one rank."""
    ours, alone = (bench_train.measure(bench, side, 2) for side in ("ours", "trainer"))
    assert (ours.micro_s, ours.optimizer_s) == (pytest.approx(1.0), pytest.approx(0.2))
    tokens = bench.recipe.train.global_batch_tokens
    assert bench.recipe.rows_per_step == 16
    assert ours.tokens_per_s == pytest.approx(tokens / 4.2) and alone.tokens_per_s == pytest.approx(tokens / 8.2)
    assert (ours.start_s, alone.start_s) == (9.0, None)
    console = Console(width=bench_train.TABLE_WIDTH, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench_train.table(bench, {"ours": [ours, ours], "trainer": [alone]}, "a CPU", 1e12))
    lines = console.export_text().splitlines()
    row = next(line.split() for line in lines if "trainer" in line)
    assert f"{alone.tokens_per_s:,.0f}" in row and "1.95" in row and "0.0%" in row


def test_the_best_micro_batch(bench: bench_train.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: 2 rows take as long as 1, 4 twice as long but share the optimiser; 8 do not fit and are passed over."""
    assert bench_train.best_micro_batch(bench, "bare", [1, 2, 4, 8]) == 4
    assert "bare, micro-batch 8: left out" in capsys.readouterr().out
    assert bench_train.best_micro_batch(bench, "bare", [8]) == 8
    with pytest.raises(DataError, match="bare runs at no micro-batch of 8, 16"):
        bench_train.best_micro_batch(bench, "bare", [8, 16])


def test_memory_alone(bench: bench_train.Bench) -> None:
    """Oracle: the made-up launches take a GB more than they have rows; the Trainer is one process."""
    cells = [list(column.cells) for column in bench_train.memory(bench, 3, ["ours", "trainer"]).columns]
    assert cells == [["ours", "trainer"], ["2", "1"], ["4.00", "4.00"]]


@pytest.mark.parametrize("name", ["gpt-s-1.4m", "ant-10m", "slm-10m", "demo"])
def test_a_launch_compiles_what_the_recipe_itself_would(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the rule, asked of the recipe as it is; a launch has steps of one micro-batch, so it asks another."""
    config = ds_config.read(runs.ROOT / "ds_configs" / "zero1.json")
    recipe, commands = loading.load(name), []
    bench = bench_train.Bench(name, recipe, [], tmp_path, devices=1, on_gpu=True)
    monkeypatch.setattr(bench_train.subprocess, "Popen", lambda command, **_: commands.append(command) or 1 / 0)
    for side, accumulation in (("ours", 1), ("ours", 4), ("bare", 1)):
        with pytest.raises(ZeroDivisionError):
            bench_train.launch(bench, side, 16, accumulation)

    wanted = ds_config.join(recipe, config, 1, "cuda", None).compiled
    for command in commands[:2]:
        shrunk = loading.load(name, [command[at + 1] for at, word in enumerate(command) if word == "--set"])
        given = ds_config.read(Path(command[command.index("--ds-config") + 1]))
        assert ds_config.join(shrunk, given, 1, "cuda", 16).compiled is wanted
        assert given | {"compile_blocks": "auto"} == config | {"compile_blocks": "auto"}
    assert ("--compiled" in commands[2]) is wanted


@pytest.mark.slow
def test_every_side_runs(tmp_path: Path) -> None:
    """Oracle: exit code 0, a speed and a peak of memory for each side, and a table."""
    small = ["model.num_hidden_layers=2", "train.steps=100"]
    flags = [word for pair in small for word in ("--set", pair)]
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "train.py"), "demo", "--rounds", "1"]
    done = runs.run([*command, "--micro-batches", "2", "--out", str(tmp_path), *flags], cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert set(result["rounds"]) == set(bench_train.SIDES)
    for [found] in result["rounds"].values():
        assert found["tokens_per_s"] > 0 and 0.1 < found["peak_gb"] < 10
    assert result["rounds"]["ours"][0]["start_s"] > 0
    assert "tokens/s" in done.stdout


@pytest.mark.slow
def test_the_seconds_of_a_start(tmp_path: Path) -> None:
    """Oracle: the parts of the real program's own clock; they add up to the time of the first forward."""
    command = [str(runs.BIN / "python"), str(runs.ROOT / "benchmarks" / "startup.py"), "demo", "--rounds", "1"]
    flags = ["--set", "model.num_hidden_layers=2", "--set", "train.steps=100", "--json", "--out", str(tmp_path)]
    done = runs.run([*command, *flags], cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(done.stdout)["warm_s"]
    whole_s, step_s = parts.pop("first forward after"), parts.pop("first step")
    assert {"launcher", "imports", "data", "meeting", "run folder", "engine", "weights", "records"} == parts.keys()
    assert sum(parts.values()) == pytest.approx(whole_s) and step_s > 0
    assert parts["launcher"] > parts["meeting"]  # two programs that import torch, beside two ranks that meet
