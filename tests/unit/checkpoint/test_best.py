"""Which checkpoint is the best: over always the same held-out rows, and one that a host holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import retention
from ds_slm.checkpoint.best import Best
from ds_slm.checkpoint.resume import ResumePoint
from ds_slm.files import on_write_point
from ds_slm.run import folder as run_folder
from tests.support import ranks
from tests.unit.checkpoint.test_manager import HOSTS, Host, fail_at, snapshots  # noqa: F401 - a fixture

LOSSES = {5: 2.0, 10: 2.5}


def launch(folder: Path, best: Best | None, eval_rows: int, losses: dict[int, float]) -> tuple[Best, list[str]]:
    """A launch on both hosts that resumes a run with this best, saves some more, and says something; its best."""

    def one(control: Any) -> tuple[Best, list[str]]:
        host = Host(control, folder, keep_last=1, eval_rows=eval_rows)
        own = checkpoint_files.newest_whole(host.folder)
        if own and best:
            host.run.state = replace(host.run.state, step=int(own.name[5:]))
            host.checkpoints.resume(host.run.state, ResumePoint(0, own, best.fields(), host.run.state.step))
        for step, loss in losses.items():
            host.save(step, loss)
        return host.checkpoints.best, host.said

    return ranks.run(HOSTS, one)[0]


@pytest.mark.parametrize("loss", [1.0, 3.0])
def test_losses_over_other_held_out_rows_are_not_compared(tmp_path: Path, loss: float) -> None:
    """Oracle: by hand. The best over 8 rows, step 5, is kept and marked until there is one over 2 rows, however great
    its loss is; from there on losses over 2 rows are compared.
    """
    best, _ = launch(tmp_path, None, 8, LOSSES)
    assert (best.step, best.eval_rows) == (5, 8)

    resumed, said = launch(tmp_path, best, 2, {})
    assert (resumed.step, resumed.val_loss) == (-1, None)
    assert any(
        "step 5 (loss 2.0000), was the best over 8 held-out rows, and run.eval_rows is 2 now" in one for one in said
    )
    run = tmp_path / "host0"
    assert checkpoint_files.steps(run) == [5, 10] and checkpoint_files.named_by(run, "best") == 5

    best, _ = launch(tmp_path, best, 2, {15: loss})
    assert (best.step, best.val_loss) == (15, loss)
    assert checkpoint_files.steps(run) == [15] and checkpoint_files.named_by(run, "best") == 15
    best, said = launch(tmp_path, best, 2, {20: loss + 0.5})
    assert best.step == 15 and not any("held-out rows" in one for one in said)


def test_the_same_rows_say_nothing(tmp_path: Path) -> None:
    """Oracle: the best stays, and its loss is compared on."""
    best, _ = launch(tmp_path, None, 8, LOSSES)
    best, said = launch(tmp_path, best, 8, {15: 2.1})
    assert best.step == 5 and not any("held-out rows" in one for one in said)


@pytest.mark.parametrize("changed", [False, True])
def test_of_an_older_versions_best_the_changes_tell(tmp_path: Path, changed: bool) -> None:
    """Its checkpoints do not say over how many rows. Oracle: whether changes.jsonl holds a change of that setting."""
    best, _ = launch(tmp_path, None, 8, LOSSES)
    older = replace(best, eval_rows=None)
    for host in HOSTS:
        for content in (tmp_path / host).glob("checkpoints/step-*/state.json"):
            content.write_text(json.dumps(json.loads(content.read_text()) | {"best_eval_rows": None}))
    run_folder.record_change(
        tmp_path / "host1", {"generation": 2, "begins_at_step": 10}, {"changes": {"train.steps": [20, 30]}}
    )
    if changed:
        run_folder.record_change(
            tmp_path / "host1", {"generation": 3, "begins_at_step": 10}, {"changes": {"run.eval_rows": [40, 8]}}
        )
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(checkpoint_files, "verify", lambda checkpoint, read=True: [])
        resumed, said = launch(tmp_path, older, 8, {})
    assert resumed.step == (-1 if changed else 5)
    assert any("was the best over other held-out rows" in one for one in said) == changed


def test_resuming_puts_the_checkpoints_in_order(tmp_path: Path) -> None:
    """Oracle: by hand. Host 1 lacks the best, step 10, and holds a damaged 20: set aside; its own best stays marked.

    Where host 0 is gone, the best that is left takes the place of the one that is lost.
    """

    def train(control: Any) -> Host:
        host = Host(control, tmp_path, keep_last=2)
        for step, loss in ((5, 3.0), (10, 2.0), (15, 2.5), (20, 2.6)):
            if step == 10 and control.rank:
                on_write_point.append(fail_at("host1", "state", 10))
            control.barrier()
            host.save(step, loss)
        return host

    before = ranks.run(HOSTS, train)[0]
    on_write_point.clear()
    broken = checkpoint_files.folder_of_step(tmp_path / "host1", 20)
    (broken / "state.json").unlink()

    def resume(control: Any) -> tuple[Best, list[str]]:
        host = Host(control, tmp_path)
        own, damaged = checkpoint_files.newest_whole_and_damaged(host.folder, print)
        content = before.checkpoints.best.fields()
        host.checkpoints.resume(
            before.run.state, ResumePoint(0, own, content, int(own.name[5:]) if own else -1, tuple(damaged))
        )
        return host.checkpoints.best, host.said

    resumed, said = ranks.run(HOSTS, resume)[0]
    assert resumed.step == 10 and any("host1: " in one and "damaged" in one for one in said)
    assert [path.name for path in retention.set_aside_ones(tmp_path / "host1")] == ["step-00000020"]
    assert checkpoint_files.named_by(tmp_path / "host1", "latest") == 15
    assert checkpoint_files.named_by(tmp_path / "host1", "best") == 5
    assert checkpoint_files.named_by(tmp_path / "host0", "best") == 10

    (tmp_path / "host0").rename(tmp_path / "gone")
    resumed, said = ranks.run(HOSTS, resume)[0]
    assert (resumed.step, resumed.val_loss) == (5, 3.0)
    assert any("step 10 (loss 2.0000), lies on none of these hosts; step 5 (loss 3.0000)" in one for one in said)
