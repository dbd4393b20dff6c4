"""What a step asks of its device and of the other ranks, with a real engine of one rank in this process."""

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_slm.data.rows import Rows
from ds_slm.distributed import stop
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.stop import Request, micro_batches_per_vote
from ds_slm.engine.engine import Sums, Totals
from ds_slm.engine.row_reader import Share
from ds_slm.errors import DataError, Stopped
from ds_slm.train import loop
from tests.support import one_rank


@pytest.fixture(scope="module")
def control() -> Iterator[Control]:
    with one_rank.process_group() as control:
        yield control


@pytest.fixture(scope="module")
def run(control: Control, tmp_path_factory: pytest.TempPathFactory) -> Iterator[loop.Run]:
    """Seven micro-batches a step; four steps are taken: DeepSpeed's own clock begins behind the second."""
    run = one_rank.tiny_run(tmp_path_factory.mktemp("step"), control)
    for _ in range(4):
        loop.take_step(run)
    yield run
    run.reader.close()


class Transfers(TorchDispatchMode):
    """Whose code, ours or DeepSpeed's, made the host read a tensor's value: function names, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ours: list[str] = []
        whole = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (self.note(), whole(tensor))[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        for frame, _ in traceback.walk_stack(sys._getframe()):
            package = frame.f_globals.get("__name__", "").partition(".")[0]
            if package in ("ds_slm", "deepspeed"):
                if package == "ds_slm":
                    self.ours.append(frame.f_code.co_name)
                return


@pytest.mark.parametrize(("is_heard", "waits"), [(True, ["_gather", "grad_norm"]), (False, ["_gather"])])
def test_a_step_waits_once_for_its_device_and_for_its_record(
    run: loop.Run, monkeypatch: pytest.MonkeyPatch, is_heard: bool, waits: list[str]
) -> None:
    """Oracle: every value that our code reads off a tensor in a step of seven micro-batches, and the accelerator's
    `synchronize`: the message before the optimiser, and the norm where a record takes it; nothing else.
    """
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: pytest.fail("it waited"))
    monkeypatch.setattr(run.report, "is_heard", is_heard)
    monkeypatch.setattr(stop, "VOTE_EVERY_S", 3600.0)  # no vote within the step, however slow this machine is
    step = run.state.step
    with Transfers(monkeypatch) as transfers:
        loop.take_step(run)
    assert transfers.ours == waits
    assert run.state.step == step + 1


def test_transfers_are_seen(run: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: three more reads of a value in our own code, by the three ways there are."""
    agree = run.engine.agree

    def reads_more(share: Share) -> Totals:
        for read in (float, bool, torch.Tensor.item):
            exec(compile("read(one)", "", "eval"), {"__name__": "ds_slm.test", "read": read, "one": torch.ones(())})
        return agree(share)

    monkeypatch.setattr(run.engine, "agree", reads_more)
    with Transfers(monkeypatch) as transfers:
        loop.take_step(run)
    assert transfers.ours == ["<module>"] * 3 + ["_gather", "grad_norm"]


def test_a_step_has_one_message(run: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: this rank's messages, of two ranks that say the same: the first step's rows, then one a step.

    An evaluation between two steps has its own, and the step behind it knows its rows all the same.
    """
    ranks = as_ranks(run, monkeypatch, 2, lambda rank, own: own)
    monkeypatch.setattr(run.engine, "_announced", (None, []))
    monkeypatch.setattr(run, "stop_at_step", run.state.step + 3)

    def take() -> float:
        before = ranks.gathered
        loop.take_step(run)
        return ranks.gathered - before

    assert [take(), take()] == [2, 1]
    held_out = run.reader.held_out(3, "val")
    run.engine.evaluate(held_out.micro_batches, run.engine.agree(held_out))
    assert take() == 1
    assert run.reader.following() is None


def test_making_an_engine_sends_no_weights(control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: DeepSpeed's own broadcasts. Weights have no values yet, and every rank makes its own afterwards."""
    sent = []
    monkeypatch.setattr("deepspeed.comm.broadcast", lambda tensor, *args, **options: sent.append(tensor.numel()))
    one_rank.tiny_run(tmp_path, control).reader.close()
    assert sent == []


class Ranks:
    """Of `count` ranks this one is the first; the others say what `others` makes of it."""

    def __init__(self, count: int, others: Any) -> None:
        self.rank, self.world_size, self.group = 0, count, None
        self.hosts = [f"host{rank}" for rank in range(count)]
        self.others, self.gathered = others, 0

    def all_gather_into_tensor(self, into: torch.Tensor, own: torch.Tensor) -> None:
        self.gathered += 1
        assert into.shape == (self.world_size * len(own),)  # gloo refuses another shape
        into.copy_(torch.cat([own, *(self.others(rank, own) for rank in range(1, self.world_size))]))

    def gather(self, message: Any) -> list[Any]:
        return [message, *(["theirs"] for _ in range(1, self.world_size))]


def as_ranks(run: loop.Run, monkeypatch: pytest.MonkeyPatch, count: int, others: Any) -> Ranks:
    """Let the engine believe that it has siblings."""
    ranks = Ranks(count, others)
    monkeypatch.setattr(run.engine, "control", ranks)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", ranks.all_gather_into_tensor)
    return ranks


def share(weights: float, problems: list[str] | None = None) -> Share:
    """One row of two targets."""
    rows = Rows(np.ones((1, 3), np.int64), np.full((1, 2), weights, np.float32))
    return Share([] if problems else [rows], problems or [])


def test_one_message_says_what_a_step_holds(run: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: sums in the order of ranks, of values whose sum depends on it; the slowest rank's pace."""
    own_s = run.engine._micro_batch_s
    weights = [1.0, 1e16, 1.0, -1e16]
    said = {rank: torch.tensor([1, 0, weights[rank], 3, 0.25], dtype=torch.float64) for rank in range(1, 4)}
    ranks = as_ranks(run, monkeypatch, 4, lambda rank, own: said[rank])
    found = run.engine.agree(share(0.5))
    assert found == Totals(sum(weights), 2.0 + 9.0, micro_batches_per_vote(max(own_s, 0.25)))
    assert ranks.gathered == 1


def test_any_ranks_problem_with_its_rows_is_raised_here(run: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: both ranks' problems; no first forward."""
    as_ranks(run, monkeypatch, 2, lambda rank, own: torch.tensor([1, 1, 0, 0, 0], dtype=torch.float64))
    with pytest.raises(DataError) as error:
        run.engine.agree(share(1.0))
    assert error.value.problems == ["host1: theirs"]
    with pytest.raises(DataError) as error:
        run.engine.agree(share(1.0, ["ours"]))
    assert error.value.problems == ["host0: ours", "host1: theirs"]


def test_a_problem_with_the_next_rows_is_raised_behind_this_step(
    run: loop.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the other of two ranks cannot read its next rows: this step is applied, the next one raises that here."""

    def others(rank: int, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own[:-5], torch.tensor([1, 1, 0, 0, 0], dtype=torch.float64)])

    ranks = as_ranks(run, monkeypatch, 2, others)
    rows = run.reader.of_step(run.state.position, another_follows=True).share
    run.engine.forward_backward(rows.micro_batches, Totals(224.0, 224.0, 100), run.reader.following)
    assert run.engine.step(0.0)

    following = run.reader.following()
    assert following is not None and not following.problems
    with pytest.raises(DataError) as error:
        run.engine.agree(following)
    assert error.value.problems == ["host1: theirs"] and ranks.gathered == 1


def test_a_rank_whose_next_rows_are_not_read_yet_makes_all_ranks_ask_again(
    run: loop.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the other of two ranks says nothing of its next rows: a second message, before the next step, does."""
    late = [True]

    def others(rank: int, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own[:-5], torch.zeros(5, dtype=torch.float64)]) if late.pop() else own

    ranks = as_ranks(run, monkeypatch, 2, others)
    rows = run.reader.of_step(run.state.position, another_follows=True).share
    run.engine.forward_backward(rows.micro_batches, Totals(224.0, 224.0, 100), run.reader.following)
    assert run.engine.step(0.0)

    following = run.reader.following()
    assert following is not None and ranks.gathered == 1
    late.append(False)
    assert run.engine.agree(following).weight == 2 * following.weight and ranks.gathered == 2


@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_another_ranks_wish_comes_with_its_sums(run: loop.Run, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Oracle: one message behind the last micro-batch; SAVE is noted, STOP raised, none changes nothing."""

    def requests(request: Request) -> Any:
        return lambda rank, own: torch.cat(
            [own[:-6], torch.tensor([float(request), 0, 0, 0, 0, 0], dtype=torch.float64)]
        )

    rows = run.reader.of_step(0, another_follows=False).share.micro_batches
    totals = Totals(224.0, 224.0, 100)

    def take() -> Sums:
        if phase == "evaluation":
            return run.engine.evaluate(rows, totals)
        try:
            return run.engine.forward_backward(rows, totals)
        finally:
            run.engine.step(0.0)  # DeepSpeed counts micro-batches

    monkeypatch.setattr(run.engine.interrupt, "start_vote", lambda: pytest.fail("it is not time to"))
    monkeypatch.setattr(run.engine.interrupt, "_watch", lambda: None)
    ranks = as_ranks(run, monkeypatch, 2, requests(Request.NONE))
    alone = take()
    assert ranks.gathered == 1 and not run.engine.interrupt.save_requested
    ranks.others = requests(Request.SAVE)
    assert take() == alone and run.engine.interrupt.save_requested
    ranks.others = requests(Request.STOP)
    with pytest.raises(Stopped):
        take()
    run.engine.interrupt.save_requested, run.engine.interrupt._request = False, Request.NONE


@pytest.mark.parametrize(("every", "votes"), [(1, 6), (2, 3), (3, 2), (7, 0), (50, 0)])
def test_ranks_vote_within_a_step_that_is_long(
    run: loop.Run, monkeypatch: pytest.MonkeyPatch, every: int, votes: int
) -> None:
    """Oracle: by hand, of seven micro-batches: behind each `every`th, but the last, whose sums say it."""
    asked = []
    monkeypatch.setattr(run.engine.interrupt, "start_vote", lambda: SimpleNamespace(wait=lambda: asked.append(1)))
    rows = run.reader.of_step(0, another_follows=False).share.micro_batches
    run.engine.forward_backward(rows, Totals(224.0, 224.0, every))
    assert len(asked) == votes
    run.engine.evaluate(rows, Totals(224.0, 224.0, every))
    assert len(asked) == 2 * votes
    run.engine.step(0.0)


@pytest.mark.parametrize(("seconds", "every"), [(0.0, 1), (50.0, 1), (1.0, 1), (0.3, 3), (0.001, 1000)])
def test_how_often_ranks_vote(seconds: float, every: int) -> None:
    """Oracle: by hand: within a second, or after each micro-batch that takes longer, and while nothing is known."""
    assert stop.VOTE_EVERY_S == 1.0
    assert micro_batches_per_vote(seconds) == every


def test_a_signal_within_a_step_discards_it(run: loop.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a request that is noted at the last forward: Stopped before the optimiser; the step is not taken."""
    place, engine = run.engine._on_device, run.engine
    seen = []

    def on_device(rows: Rows) -> Any:
        seen.append(rows)
        if len(seen) == engine.engine_config.accumulation_steps:
            engine.interrupt._request = Request.STOP
        return place(rows)

    monkeypatch.setattr(engine, "_on_device", on_device)
    monkeypatch.setattr(engine.interrupt, "_watch", lambda: None)
    step = run.state.step
    with pytest.raises(Stopped):
        loop.take_step(run)
    assert run.state.step == step
    engine.interrupt._request = Request.NONE
    engine.deepspeed.optimizer.zero_grad()


def test_the_ledger_is_that_of_rows_read_one_by_one(control: Control, run: loop.Run) -> None:
    """Oracle: `extend_ledger` over the rows of each position, in turn."""
    from ds_slm.data.order import extend_ledger, ledger_text

    position, ledger = 0, ""
    report: Any = run.report
    recorded = {record["step"]: record["ledger"] for record in report.records}
    for step in range(1, run.state.step + 1):
        ledger = extend_ledger(ledger, ledger_text(run.rows.row_ids(position)))
        position = run.rows.next_position(position)
        assert recorded.get(step, ledger) == ledger
    assert (position, ledger) == (run.state.position, run.state.ledger) and len(recorded) > 4
