"""The benchmark of planned steps over links: it goes on where it was ended, and its ratios are those of the plan."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import plan_network
from ds_slm.errors import DataError
from ds_slm.recipe import rates

CASE, UNLIMITED = "demo-fp32-zero2-rows16-0.1gbit", "demo-fp32-zero2-rows16-infgbit"
SPEED = rates.CoreSpeed(micro_batch_s=0.5, update_s_per_value=1e-8)
PARAMS = 1_967_424


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    """The benchmark's own command."""
    flags = ["demo", "--stages", "2", "--precisions", "fp32", "--links", "0.1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["plan_network.py", *flags, *more])
    return plan_network.main()


def test_a_case_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: two launches over three commands; two forwards, half the values updated, and by hand what is sent.

    What the network takes is the difference of the two launches.
    """
    sent = (2 * 4 * 2 + 4) * PARAMS // 2
    network_s = (2 * 4 * 2 + 4 * 3 / 2) * PARAMS / 2 * 8 / 0.1e9 * 1538 / 1448  # gloo gathers at two thirds of the link
    step_s = 2 * 0.5 + PARAMS / 2 * 1e-8 + network_s
    launched = []

    def measure_all(missing: list[plan_network.Case], out: Path) -> None:
        launched.extend(case.key for case in missing)
        for case in missing:
            taken_s = step_s / 1.25 - (0.75 if case.key == UNLIMITED else 0)
            measured = {"case": case.key, "step_s": taken_s, "sent_bytes": 50e6, "core": asdict(SPEED), "date": "today"}
            (out / f"{case.key}.json").write_text(json.dumps(measured))

    monkeypatch.setattr(plan_network, "measure_all", measure_all)
    assert run(monkeypatch, tmp_path) == run(monkeypatch, tmp_path) == run(monkeypatch, tmp_path, "--table") == 0
    assert launched == [UNLIMITED, CASE]
    lines = capsys.readouterr().out.splitlines()
    cells = next(line for line in lines if CASE in line).replace("│", " ").split()
    seconds = [f"{step_s:.2f}", f"{step_s / 1.25:.2f}", "1.25", f"{network_s:.2f}", "0.75"]
    assert cells == [CASE, *seconds, f"{sent / 1e6:.1f}", "50.0"]
    assert not any(UNLIMITED in line for line in lines)


def test_a_table_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the way out is named."""
    with pytest.raises(DataError, match="leave out --table"):
        run(monkeypatch, tmp_path, "--table")
