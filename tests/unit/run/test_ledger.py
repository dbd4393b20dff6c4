"""The ledger of rows: what `ds-slm verify` reads, prints and compares."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.data.order import Order, extend_ledger, ledger_text, step_row_ids
from ds_slm.errors import CheckpointError
from ds_slm.run import ledger


def run_folder(folder: Path, seeds: list[int], every: int = 1) -> Path:
    """A run whose step n drew the rows of seeds[n - 1]; logged every so many steps."""
    folder.mkdir()
    link, lines = "", []
    for step, seed in enumerate(seeds, start=1):
        link = extend_ledger(link, ledger_text(step_row_ids(Order(seed, [50], [1]), 4 * (step - 1), 4, "wrap", 50)))
        if step % every == 0:
            lines.append(json.dumps({"kind": "train", "step": step, "ledger": link}))
            lines.append(json.dumps({"kind": "val", "step": step, "loss": 1.0}))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 3))
def test_compare_finds_the_first_step_with_other_rows(same: list[bool], every: int) -> None:
    """Oracle: the first step whose rows were made different; equal links prove what was not logged."""
    links: dict[str, dict[int, str]] = {"ours": {}, "theirs": {}}
    for name, seeds in (("ours", [0] * len(same)), ("theirs", [int(not one) for one in same])):
        link = ""
        for step, seed in enumerate(seeds, start=1):
            link = extend_ledger(link, ledger_text([Order(seed, [50], [1]).sample(step)]))
            links[name][step] = link
    links["theirs"] = {step: link for step, link in links["theirs"].items() if step % every == 0 or step == len(same)}
    compared = ledger.compare(links["ours"], links["theirs"])
    changed = next((step for step, one in enumerate(same, start=1) if not one), None)
    seen = sorted(links["theirs"])
    expected = None if changed is None else next(step for step in seen if step >= changed)
    assert compared.differ_at_step == expected
    assert compared.same_until_step == max([step for step in seen if changed is None or step < changed], default=0)


def test_verify_rows_and_against(tmp_path: Path, ds_slm: Any) -> None:
    """Oracle: ledgers of made-up runs: the same, another logging interval, other rows from step 5 on."""
    one = run_folder(tmp_path / "one", [7] * 8)
    sparse = run_folder(tmp_path / "sparse", [7] * 8, every=2)
    other = run_folder(tmp_path / "other", [7] * 4 + [8] * 4)
    printed = ds_slm("verify", one, "--rows").stdout.splitlines()
    assert [line.split()[0] for line in printed] == [str(step) for step in range(1, 9)]
    assert json.loads(ds_slm("verify", one, "--rows", "--json").stdout)["ledger"]["8"] == printed[-1].split()[1]
    same = ds_slm("verify", one, "--rows", "--against", sparse)
    assert same.returncode == 0
    assert same.stdout.strip().endswith("drew the same rows in the same order up to step 8")
    differs = ds_slm("verify", sparse, "--against", other)
    assert differs.returncode == 2
    assert "drew the same rows up to step 4 and others by step 6" in differs.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no metrics.jsonl"),
        ("", "holds no training step yet"),
        ('{"kind": "train", "step": 1, "ledger": "a"}\n{"kind": "tra', "line 2 is damaged"),
        ('{"kind": "train", "step": 1}\n', "line 1 is damaged"),
    ],
)
def test_what_is_no_ledger_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    """Oracle: the sentence; no traceback."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        ledger.read(tmp_path)


def test_runs_without_a_common_step(tmp_path: Path) -> None:
    """Oracle: the sentence."""
    with pytest.raises(CheckpointError, match="logged no step in common"):
        ledger.compare({1: "a"}, {2: "b"})
