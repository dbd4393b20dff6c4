"""Saving on two hosts, one of which fails: ranks that are threads, each a host with a run folder of its own.

A fault is put where a disk would have it, through `ds_slm.files.on_write_point`, or where memory runs out.
"""

import errno
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import gathering
from ds_slm.checkpoint.best import Best
from ds_slm.checkpoint.manager import Checkpoints
from ds_slm.checkpoint.resume import State
from ds_slm.checkpoint.saving import BackgroundSave, Saved
from ds_slm.engine import masters, partitions
from ds_slm.engine.partitions import PartitionValues, Snapshot
from ds_slm.errors import ReplacedByNewerLaunch, TrainingError
from ds_slm.files import on_write_point
from ds_slm.run import launches
from ds_slm.run.launches import Launch
from ds_slm.train import loop
from tests.support import ranks
from tests.unit.checkpoint.test_gathering import cut, tensors

HOSTS = ["host0", "host1"]
LAUNCH = Launch(1, "aaa", "host0", 7, "today")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank holds of the model: half of the same tensors, and block scales of its moments."""

    def snapshot(rank: int) -> Snapshot:
        whole = cut(tensors(), 2, seed=1)[rank]
        values = whole.stored["model"]
        scales = [PartitionValues(values[0].values, None, torch.full((rank + 2,), float(rank)))]
        stored = {"model": values, "exp_avg": scales, "exp_avg_sq": values}
        return Snapshot(whole.fragments, stored, whole.shapes, {"all": 1})

    monkeypatch.setattr(partitions, "snapshot", snapshot)
    monkeypatch.setattr(masters, "check", lambda engine, control: None)
    monkeypatch.setattr(gathering, "WINDOW_VALUES", 500)


@pytest.fixture
def faults() -> Iterator[list[Callable[[str, Path], None]]]:
    """Functions of a write point and a path."""
    yield on_write_point
    on_write_point.clear()


def fail_at(host: str, point: str, *steps: int, error: Exception = FULL) -> Callable[[str, Path], None]:
    """A host whose disk fails at a write point of some steps."""

    def fault(at: str, run: Path) -> None:
        if run.name == host and at in [f"{point}@{step}" for step in steps]:
            raise error

    return fault


class Host:
    """One rank's run as the loop sees it, and what it says."""

    def __init__(
        self, control: Any, folder: Path, keep_last: int = 2, launch: Launch = LAUNCH, eval_rows: int = 8
    ) -> None:
        self.folder = folder / HOSTS[control.rank]
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        if not (self.folder / "env.json").exists():
            (self.folder / "env.json").write_text(json.dumps(launch.facts()))
        settings = SimpleNamespace(checkpoint_copies=2, keep_last=keep_last, keep_best=True, eval_rows=eval_rows)
        engine: Any = SimpleNamespace(
            control=control, deepspeed=control.rank, loss_scaler=None, topology={"world_size": 2},
            recipe=SimpleNamespace(run=settings), interrupt=SimpleNamespace(saved=lambda: None),
        )  # fmt: skip
        self.said: list[str] = []
        background = BackgroundSave(engine, self.folder, launch, [0, 1], self.said.append)
        self.checkpoints = Checkpoints(background, {"data_sha256": "d"})
        self.run: Any = SimpleNamespace(
            checkpoints=self.checkpoints, engine=engine,
            report=SimpleNamespace(record=lambda *_: None, say=self.said.append),
            state=State(), val_loss=0.0, folder=self.folder,
        )  # fmt: skip

    def save(self, step: int, loss: float | None = None) -> Saved | None:
        """Save a step, evaluated where a loss is given, and wait for it."""
        self.run.state = replace(self.run.state, step=step, evaluated_step=step if loss is not None else -1)
        self.run.val_loss = loss
        loop.save(self.run)
        return self.checkpoints.wait()

    @property
    def steps(self) -> list[int]:
        return checkpoint_files.steps(self.folder)

    @property
    def best(self) -> int | None:
        return checkpoint_files.named_by(self.folder, "best")


def test_both_hosts_hold_the_same_bytes(tmp_path: Path) -> None:
    """Oracle: the tensors themselves; both folders' files; the scales of both ranks as notes."""

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path)
        assert host.save(5) == Saved(tuple(HOSTS))
        return host

    first, second = ranks.run(HOSTS, rank)
    folders = [checkpoint_files.folder_of_step(host.folder, 5) for host in (first, second)]
    assert all(checkpoint_files.verify(folder) == [] for folder in folders)
    assert len({checkpoint_files.manifest_sha256(folder) for folder in folders}) == 1
    model = checkpoint_files.read_model(folders[0])
    assert model.keys() == tensors().keys() and all(torch.equal(model[name], one) for name, one in tensors().items())
    with checkpoint_files.open_tensors(folders[1] / checkpoint_files.ABSMAX) as notes:
        assert {name: notes.get_tensor(name).tolist() for name in notes.keys()} == {  # noqa: SIM118 - not a dict
            "rank0.partition0.exp_avg": [0.0, 0.0],
            "rank1.partition0.exp_avg": [1.0, 1.0, 1.0],
        }
    assert first.said == ["step 5: saved step-00000005"]


@pytest.mark.parametrize("point", ["begun", "model.safetensors", "state", "manifest-synced", "old-moved", "renamed"])
def test_a_step_is_saved_where_one_host_holds_it(tmp_path: Path, faults: list, point: str) -> None:
    """Oracle: step 10 (2.0) fails on host 1 alone: 10 stays the best though 15 (2.5) is on both, and all is told.

    Host 1 holds what it held before until it holds something better.
    """
    faults.append(fail_at("host1", point, 10))

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path, keep_last=1)
        host.save(5, 3.0)
        if point == "old-moved":  # of that very step there is one, from before the run was resumed further back
            checkpoint_files.Writer(host.folder, 10).commit({"step": 10})
        saved = host.save(10, 2.0)
        assert saved == Saved(("host0",), (f"host1: {FULL}",)) and saved.durable
        assert host.checkpoints.is_saved(host.run.state) and host.checkpoints.is_durable(10)
        return host

    def again(control: Any, host: Host) -> Host:
        host.save(15, 2.5)
        return host

    first, second = ranks.run(HOSTS, lambda control: again(control, rank(control)))
    assert (first.checkpoints.best.step, first.checkpoints.best.val_loss) == (10, 2.0)
    assert (first.steps, first.best) == ([10, 15], 10)
    assert second.best == 5 and {5, 15} <= set(second.steps)
    assert "step 10: saved step-00000010 on host0, BUT NOT on host1: [Errno 28] No space left on device" in first.said
    assert not list((second.folder / "checkpoints").glob(".step-*"))


def test_a_host_that_comes_back_follows_the_best(tmp_path: Path, faults: list) -> None:
    """Oracle: by hand. Host 0 misses 10 (2.0), host 1 misses 20 (1.5): each keeps its best until it holds a better."""
    faults += [fail_at("host0", "manifest", 10), fail_at("host1", "manifest", 20)]

    def rank(control: Any) -> tuple[Host, list[int | None]]:
        host = Host(control, tmp_path, keep_last=1)
        marks = []
        for step, loss in ((5, 3.0), (10, 2.0), (15, 2.5), (20, 1.5), (25, 1.0)):
            host.save(step, loss)
            marks.append(host.best)
        return host, marks

    (first, marks0), (second, marks1) = ranks.run(HOSTS, rank)
    assert marks0 == [5, 5, 5, 20, 25] and marks1 == [5, 10, 10, 10, 25]
    assert first.steps == second.steps == [25] and first.checkpoints.best.step == 25


def test_a_step_that_no_host_holds_was_not_saved(tmp_path: Path, faults: list) -> None:
    """Oracle: both disks full at step 10: told with both hosts, and its evaluation is no longer the best."""
    faults += [fail_at(host, "state", 10) for host in HOSTS]

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path)
        host.save(5, 3.0)
        saved = host.save(10, 2.0)
        assert saved is not None and not saved.durable and not host.checkpoints.is_saved(host.run.state)
        host.save(15, 2.5)
        return host

    first, second = ranks.run(HOSTS, rank)
    assert first.checkpoints.best.step == 15 and first.steps == second.steps == [5, 15]
    assert any("COULD NOT BE SAVED: host0: [Errno 28]" in one and "host1: [Errno 28]" in one for one in first.said)


def test_a_pointer_that_cannot_be_written_costs_no_checkpoint(tmp_path: Path, faults: list) -> None:
    """Oracle: marking the best fails on host 1 at step 10: held on both; nothing that is the best is deleted."""
    faults.append(fail_at("host1", "latest", 10))

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path, keep_last=1)
        host.save(5, 3.0)
        assert host.save(10, 2.0) == Saved(tuple(HOSTS))
        host.save(15, 2.5)
        return host

    first, second = ranks.run(HOSTS, rank)
    assert [host.best for host in (first, second)] == [10, 10] and second.steps == [10, 15]
    assert any("step 10: host1: the checkpoints could not be put in order" in one for one in first.said)


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("where", ["snapshot", "windows", "reading", "writing"])
def test_a_rank_short_of_memory_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: list, host: int, where: str
) -> None:
    """Oracle: torch's own words on one rank; the others go on, the next save is whole.

    Where the values themselves are lost nothing is saved; where only a writer fails, the other one holds the step.
    """
    short = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
    failing: set[int] = {host}
    if where == "snapshot":
        snapshot = partitions.snapshot

        def failing_snapshot(rank: int) -> Snapshot:
            if rank in failing:
                raise short
            return snapshot(rank)

        monkeypatch.setattr(partitions, "snapshot", failing_snapshot)
    elif where == "windows":
        original = gathering.Gathering.__init__

        def init(self: gathering.Gathering, writers: list[int], control: Any) -> None:
            if control.rank in failing:
                raise MemoryError("no room")
            original(self, writers, control)

        monkeypatch.setattr(gathering.Gathering, "__init__", init)
    elif where == "reading":
        decoded = PartitionValues.decoded

        def failing_decoded(self: PartitionValues, begin: int, end: int) -> torch.Tensor:
            if failing and threading.current_thread().name == "saving" and self.values.numel() == sizes[host]:
                raise short
            return decoded(self, begin, end)

        sizes = [one.stored["model"][0].values.numel() for one in cut(tensors(), 2, seed=1)]
        assert sizes[0] != sizes[1]
        monkeypatch.setattr(PartitionValues, "decoded", failing_decoded)
    else:
        faults.append(fail_at(HOSTS[host], "optimizer-exp_avg.safetensors", 5, error=short))

    def rank(control: Any) -> Host:
        one = Host(control, tmp_path)
        saved = one.save(5)
        assert saved is not None and saved.durable == (where == "writing")
        assert len(saved.failed) == 1 and saved.failed[0].startswith(f"{HOSTS[host]}: ")
        control.barrier()
        failing.clear()
        assert one.save(6) == Saved(tuple(HOSTS))
        return one

    first, second = ranks.run(HOSTS, rank)
    assert first.steps == second.steps == [6] or where == "writing"
    assert not list((first.folder / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("point", ["manifest-synced", "renamed", "latest", "best"])
def test_a_replaced_launch_touches_nothing_more(tmp_path: Path, faults: list, point: str) -> None:
    """Oracle: a launch with the same number and another id takes host 1's folder at a write point.

    Both ranks are told; from that point on host 1's pointers and older checkpoints are left alone.
    """

    def taken(at: str, run: Path) -> None:
        if (run.name, at) == ("host1", f"{point}@10"):
            (run / "env.json").write_text(json.dumps(replace(LAUNCH, id="bbb").facts()))

    faults.append(taken)

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path, keep_last=1)
        host.save(5, 3.0)
        with pytest.raises(ReplacedByNewerLaunch):
            host.save(10, 2.0)
        return host

    _, second = ranks.run(HOSTS, rank)
    assert second.steps == ([5] if point == "manifest-synced" else [5, 10])
    latest = checkpoint_files.named_by(second.folder, "latest")
    assert latest == (10 if point in ("latest", "best") else 5)
    assert second.best == (10 if point == "best" else 5)


def test_the_run_is_done_where_one_host_holds_the_last_step(tmp_path: Path, faults: list) -> None:
    """Oracle: host 1 lacks step 20: done.json on both, with the hash of host 0's, and who holds it."""
    faults.append(fail_at("host1", "state", 20))

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path)
        host.save(20)
        host.checkpoints.write_done(20, {"step": 20})
        return host

    first, second = ranks.run(HOSTS, rank)
    done = [json.loads((host.folder / "done.json").read_text()) for host in (first, second)]
    assert done[0] == done[1] and done[0]["held_by"] == ["host0"] and done[0]["step"] == 20
    whole = checkpoint_files.folder_of_step(first.folder, 20)
    assert done[0]["checkpoint_sha256"] == checkpoint_files.manifest_sha256(whole)


def test_a_host_that_cannot_write_done_is_told_of(tmp_path: Path, faults: list) -> None:
    """Oracle: host 1's disk refuses done.json: told; both refuse: the run has failed."""
    refusing = {"host1"}

    def refuse(point: str, path: Path) -> None:
        if point == "replacing" and path.name == "done.json" and path.parent.name in refusing:
            raise FULL

    faults.append(refuse)

    def rank(control: Any) -> Host:
        host = Host(control, tmp_path)
        host.save(20)
        host.checkpoints.write_done(20, {})
        control.barrier()
        refusing.add("host0")
        control.barrier()
        with pytest.raises(TrainingError, match=r"host0: done\.json.*host1: done\.json"):
            host.checkpoints.write_done(20, {})
        return host

    first, second = ranks.run(HOSTS, rank)
    assert (first.folder / "done.json").is_file() and not (second.folder / "done.json").exists()
    assert any(one.startswith("host1: done.json could not be written") for one in first.said)


def test_weights_of_a_bad_step_are_written_where_they_can_be(tmp_path: Path) -> None:
    """Oracle: the tensors; on host 1 a folder is in the file's way: told on both, the other one is whole."""
    (tmp_path / "host1" / "weights" / "in the way").mkdir(parents=True)

    def rank(control: Any) -> list[str]:
        host = Host(control, tmp_path)
        return host.checkpoints.write_weights(host.folder / "weights")

    first, second = ranks.run(HOSTS, rank)
    assert first == second and len(first) == 1 and first[0].startswith("host1: ")
    with checkpoint_files.open_tensors(tmp_path / "host0" / "weights") as stored:
        assert all(torch.equal(stored.get_tensor(name), one) for name, one in tensors().items())


def test_a_disk_that_cannot_read_env_is_nobody_elses(tmp_path: Path) -> None:
    """Oracle: env.json is unreadable, then gone: the launch goes on saving."""

    def rank(control: Any) -> None:
        host = Host(control, tmp_path)
        (host.folder / "env.json").write_text('{"gene')
        assert host.save(5) == Saved(tuple(HOSTS))
        (host.folder / "env.json").unlink()
        assert host.save(6) == Saved(tuple(HOSTS))
        assert not launches.is_replaced(host.folder, LAUNCH)

    ranks.run(HOSTS, rank)


def test_a_run_ends_well_with_several_ranks_on_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: done.json names the one host, whose second rank writes nothing and knows no hash."""
    monkeypatch.setattr(checkpoint_files, "manifest_sha256", lambda folder: "a" * 64)
    control = SimpleNamespace(hosts=["node1", "node1"], gather=lambda own: [own, None])
    stand_in: Any = SimpleNamespace(
        _control=control, _run=tmp_path, _background=SimpleNamespace(writers=[0]), writes=True, is_replaced=False,
        _named=lambda problem: [],
    )  # fmt: skip
    Checkpoints.write_done(stand_in, 3, {"step": 3})
    assert json.loads((tmp_path / "done.json").read_text())["held_by"] == ["node1"]


def test_a_failed_save_leaves_the_best_what_it_was() -> None:
    """Oracle: by hand: 2.0 at step 10 is durable, 1.5 at step 20 was not saved: 1.8 at step 30 is the best."""
    outcomes = [Saved(("host",)), Saved(failed=("host: the disk is full",)), Saved(("other",), ("host: full",))]
    begun: list[tuple[int, int]] = []
    background: Any = SimpleNamespace(
        finish=lambda: outcomes.pop(0) if begun else None,
        begin=lambda content: begun.append((content["step"], content["best_step"])),
        engine=SimpleNamespace(loss_scaler=None, recipe=SimpleNamespace(run=SimpleNamespace(eval_rows=8))),
        run=None, control=None, say=None,
    )  # fmt: skip
    checkpoints = Checkpoints(background, {})
    for step, loss in ((10, 2.0), (20, 1.5), (30, 1.8)):
        checkpoints.save(State(step=step, evaluated_step=step), loss)
    checkpoints.wait()
    assert begun == [(10, 10), (20, 20), (30, 30)]
    assert checkpoints.best == checkpoints._durable_best == Best(1.8, 30, eval_rows=8)
