"""The table of all recipes' speeds: it goes on where it was ended, and ends a row when its ratios agree."""

from pathlib import Path

import pytest
import torch

from benchmarks import train, training_table

SLOWER = {"ours": 1.0, "trainer": 2.0, "trainer-ds": 1.5, "bare": 1.0}


class Machine:
    """Made-up launches of sides whose ratios are SLOWER, but for a rival that swings by `swings`; all are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, swings: list[float], lives: int = 1 << 30) -> None:
        self.launched: list[str] = []
        self.swings, self.lives = iter(swings), lives
        monkeypatch.setattr(train, "launch", self.launch)
        monkeypatch.setattr(train, "bench_of", self.bench_of)
        monkeypatch.setattr(training_table, "RECIPES", ("demo",))
        monkeypatch.setattr(training_table.kernels, "multiplies", lambda _, dtype: dtype == torch.float32)

    def bench_of(self, name: str, settings: list[str], out: Path, steps: int) -> train.Bench:
        """demo's recipe on two ranks, without data."""
        recipe = train.loading.load(name, settings)
        return train.Bench(name, recipe, settings, out, devices=2, on_gpu=False, steps=steps)

    def launch(self, bench: train.Bench, side: str, micro_batch: int, accumulation: int) -> train.Launch:
        """A launch without a step's fixed cost; the machine is ended before the launch after its last."""
        if len(self.launched) == self.lives:
            raise KeyboardInterrupt
        self.launched.append(side)
        swing = next(self.swings, 1.0) if (side, accumulation) == ("trainer", 4) else 1.0
        seconds = accumulation * SLOWER[side] * swing
        return train.Launch(seconds, 1.0, 9.0 if side == "ours" else None)


def run(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The command; the lines of its table that name demo."""
    training_table.run(out, [1], 4, training_table.PRECISIONS)
    return [line for line in capsys.readouterr().out.splitlines() if "demo, " in line]


def test_a_row_ends_when_its_ratios_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: two rounds, who begins changes; the Trainer's process has twice the forwards; bf16 is told."""
    machine = Machine(monkeypatch, [])
    bf16, fp32 = run(tmp_path, capsys)
    order = [side for side in train.SIDES for _ in train.ACCUMULATIONS]
    assert machine.launched == [*order, *order[::-1]]
    assert "no bf16 instructions" in bf16
    assert [cell.strip().split(" ")[1] for cell in fp32.split("│")[3:6]] == ["[4.00", "[1.50", "[1.00"]


def test_a_row_whose_ratios_swing_gets_more_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: ratios that never agree end at the most rounds."""
    machine = Machine(monkeypatch, [1.0, 1.3] * training_table.MOST_ROUNDS)
    assert run(tmp_path, capsys)[1].split("│")[-2].strip() == str(training_table.MOST_ROUNDS)
    assert len(machine.launched) == training_table.MOST_ROUNDS * len(train.SIDES) * len(train.ACCUMULATIONS)


def test_an_ended_table_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the round that was ended is measured again, the one before is kept, a finished row costs nothing."""
    a_round = len(train.SIDES) * len(train.ACCUMULATIONS)
    Machine(monkeypatch, [], lives=a_round + 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, capsys)
    again = Machine(monkeypatch, [])
    run(tmp_path, capsys)
    assert len(again.launched) == a_round
    run(tmp_path, capsys)
    assert len(again.launched) == a_round
