"""The best checkpoint of a run whose evaluations do not all take the same held-out rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_slm.checkpoint import format as checkpoint_format
from ds_slm.train import run_folder
from ds_slm.train.checkpointing import Found, State
from tests import ranks
from tests.test_saving import HOSTS, Host, snapshots  # noqa: F401 - a fixture

LOSSES = {5: 2.0, 10: 2.5}


def launch(folder: Path, state: State, eval_rows: int, losses: dict[int, float]) -> tuple[State, list[str]]:
    """A launch on both hosts that resumes a state and saves some more; its state, and what it says."""

    def one(control: Any) -> tuple[State, list[str]]:
        host = Host(control, folder, keep_last=1)
        host.run.engine.recipe.run.eval_rows = eval_rows
        own = checkpoint_format.newest_whole(host.folder)
        found = Found(0, own, {}, state.step) if own else None
        host.run.state = host.saver.resume(state, found)
        host.run.best_on_disk = host.run.state.best_val_loss, host.run.state.best_step
        for step, loss in losses.items():
            host.save(step, loss)
        return host.run.state, host.said

    return ranks.run(HOSTS, one)[0]


@pytest.mark.parametrize("loss", [1.0, 3.0])
def test_losses_over_other_held_out_rows_are_not_compared(tmp_path: Path, loss: float) -> None:
    """Oracle: by hand. The best over 8 rows, step 5, is kept and marked until there is one over 2 rows, however great
    its loss is; from there on losses over 2 rows are compared.
    """
    state, _ = launch(tmp_path, State(), 8, LOSSES)
    assert (state.best_step, state.best_eval_rows) == (5, 8)

    resumed, said = launch(tmp_path, state, 2, {})
    assert (resumed.best_step, resumed.best_val_loss) == (-1, None)
    assert any(
        "step 5 (loss 2.0000), was the best over 8 held-out rows, and run.eval_rows is 2 now" in one for one in said
    )
    run = tmp_path / "host0"
    assert checkpoint_format.steps(run) == [5, 10] and checkpoint_format.named_by(run, "best") == 5

    state, _ = launch(tmp_path, state, 2, {15: loss})
    assert (state.best_step, state.best_val_loss) == (15, loss)
    assert checkpoint_format.steps(run) == [15] and checkpoint_format.named_by(run, "best") == 15
    state, said = launch(tmp_path, state, 2, {20: loss + 0.5})
    assert state.best_step == 15 and not any("held-out rows" in one for one in said)


def test_the_same_rows_say_nothing(tmp_path: Path) -> None:
    """Oracle: the best stays, and its loss is compared on."""
    state, _ = launch(tmp_path, State(), 8, LOSSES)
    state, said = launch(tmp_path, state, 8, {15: 2.1})
    assert state.best_step == 5 and not any("held-out rows" in one for one in said)


@pytest.mark.parametrize("changed", [False, True])
def test_of_an_older_versions_best_the_changes_tell(tmp_path: Path, changed: bool) -> None:
    """Its checkpoints do not say over how many rows. Oracle: whether changes.jsonl holds a change of that setting."""
    state, _ = launch(tmp_path, State(), 8, LOSSES)
    older = replace(state, best_eval_rows=None)
    for host in HOSTS:
        for content in (tmp_path / host).glob("checkpoints/step-*/state.json"):
            content.write_text(json.dumps(json.loads(content.read_text()) | {"best_eval_rows": None}))
    run_folder.record_change(tmp_path / "host1", 2, {"changes": {"train.steps": [20, 30]}})
    if changed:
        run_folder.record_change(tmp_path / "host1", 3, {"changes": {"run.eval_rows": [40, 8]}})
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(checkpoint_format, "verify", lambda checkpoint, read=True: [])
        resumed, said = launch(tmp_path, older, 8, {})
    assert resumed.best_step == (-1 if changed else 5)
    assert any("was the best over other held-out rows" in one for one in said) == changed
