"""The benchmark of planned memory: it goes on where it was ended, and its ratios are those of the plan."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_memory

ARGUMENTS = ["plan_memory.py", "demo", "--stages", "1", "--tokens", "1024", "--precision", "fp32"]
CASE = "demo-fp32-zero1-rows8-eager"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    """The benchmark's own command."""
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, "--out", str(out), *more])
    return plan_memory.main()


def test_a_case_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one launch over two commands, and the ratio of the plan to a made-up peak."""
    launched = []

    def measure(case: plan_memory.Case, *_: Any) -> dict[str, Any]:
        launched.append(case.key)
        peak = plan_memory.planned(case).device_bytes / 1e9 / 1.25
        return {"case": case.key, "peak_gb": peak, "peak_with_save_gb": peak + 0.07, "date": "2026-11-30"}

    monkeypatch.setattr(plan_memory, "measure", measure)
    assert run(monkeypatch, tmp_path) == run(monkeypatch, tmp_path) == run(monkeypatch, tmp_path, "--table") == 0
    assert launched == [CASE] and json.loads((tmp_path / f"{CASE}.json").read_text())["case"] == CASE
    row = next(line for line in capsys.readouterr().out.splitlines() if CASE in line and "1.25" in line)
    assert "0.07" in row and "program" in row


def test_a_table_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the way out is named."""
    with pytest.raises(plan_memory.DataError, match="leave out --table"):
        run(monkeypatch, tmp_path, "--table")
