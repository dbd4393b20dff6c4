"""`ds-slm eval --devices N`: the figures of one process, and an end that is told when a rank fails."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.errors import DeviceError
from ds_slm.evaluate import on_devices, rank_process, record
from ds_slm.evaluate.on_devices import PipeRanks, opened_on
from ds_slm.evaluate.opening import open_scorer
from ds_slm.evaluate.results import Item
from ds_slm.evaluate.scoring import Request, score
from tests.support import benchmark_files
from tests.unit.evaluate.test_opening import write_gpt2

TASKS = ("piqa", "lambada_openai", "wikitext")
CHOICES = ("acc", "acc_norm")
ITEMS = [[Request([5, 6, 7], [8, 9]), Request([5, 6, 7], [10])], [Request([3], [4, 5])]]
needs_devices = pytest.mark.skipif(0 < torch.cuda.device_count() < 3, reason="needs three GPUs, or none")


@pytest.fixture(scope="module")
def places(qwen3: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of ours, a model of transformers, and the benchmarks' files."""
    folder = tmp_path_factory.mktemp("devices")
    for name in TASKS:
        benchmark_files.write_published(folder / "files", name, benchmark_files.ROWS[name])
    return {"ours": qwen3.run, "theirs": write_gpt2(folder / "gpt2", tokenizer_folder), "files": folder / "files"}


@pytest.fixture
def answers(places: dict[str, Path], ds_slm: Callable[..., Any]) -> Callable[..., list[Item]]:
    """From a number of devices and some models to each one's items."""

    def on(devices: int, model: str, *others: str) -> list[Item]:
        flags = ("--tasks", ",".join(TASKS), "--bench-dir", places["files"], "--devices", devices, "--json")
        against = [word for other in others for word in ("--against", places[other])]
        done = ds_slm("eval", places[model], *against, *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["settings"]["devices"] == devices
        found = [record.read_items(places[name]) for name in (model, *others)]
        return [item for tasks in found for name in TASKS for item in tasks[name]]

    return on


@needs_devices
def test_figures_are_those_of_one_process(answers: Callable[..., list[Item]]) -> None:
    """Oracle: one device: every item's log-probabilities and choices, of our decoder and of a model of transformers."""
    alone, ours = answers(1, "ours", "theirs"), answers(1, "ours")
    for found, expected in ((answers(2, "ours", "theirs"), alone), (answers(3, "ours"), ours)):
        for one, other in zip(found, expected, strict=True):
            assert one.log_probabilities == pytest.approx(other.log_probabilities, rel=1e-6, abs=1e-6)
            assert (one.requests, one.gold, one.right) == (other.requests, other.gold, other.right)
            assert [one.values.get(metric) for metric in CHOICES] == [other.values.get(metric) for metric in CHOICES]


@needs_devices
def test_a_rank_that_dies_is_told(qwen3: Any) -> None:
    """Oracle: a process that is killed: the sentence at the next round, every process gone, the threads as before."""
    threads, started = torch.get_num_threads(), []
    with pytest.raises(DeviceError, match=r"rank 1 of 2 died \(signal 9"), opened_on(2, [qwen3.export]) as (opened,):
        assert score(opened.scorer, ITEMS) == score(open_scorer(qwen3.export).scorer, ITEMS)
        started += opened.scorer._ranks.processes.values()  # pyright: ignore[reportAttributeAccessIssue]
        started[0].kill()
        score(opened.scorer, ITEMS)
    assert [process.returncode for process in started] == [-9]
    assert torch.get_num_threads() == threads


@needs_devices
def test_the_other_ranks_end_with_rank_0(qwen3: Any) -> None:
    """Oracle: an error of rank 0 while rank 1 still opens the model: no process is left."""
    started = []
    with pytest.raises(ZeroDivisionError), opened_on(2, [qwen3.export]) as (opened,):
        started += opened.scorer._ranks.processes.values()  # pyright: ignore[reportAttributeAccessIssue]
        raise ZeroDivisionError
    assert [process.returncode is not None for process in started] == [True]


class TooLarge:
    """A scorer whose forward finds too little memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, batches: Any) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate too much")


FAILURES = {
    "another model": "was written anew while it was opened",
    "no model": "does not exist",
    "too large": "RuntimeError: CUDA out of memory.; the same command with --devices 1 may say more",
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_rank_that_fails_says_why(case: str, qwen3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sentence that one process would print, on rank 0 at its next round, with the rank's number."""
    opened = open_scorer(qwen3.export)
    sha256 = "0" * 64 if case == "another model" else opened.facts["sha256"]
    path = qwen3.export / "nowhere" if case == "no model" else qwen3.export
    if case == "too large":
        broken = replace(opened, scorer=TooLarge(opened.scorer.device))  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(rank_process, "open_scorer", lambda path: broken)

    ours, theirs = multiprocessing.Pipe()
    ranks = PipeRanks(1, 2, {0: theirs})
    other = threading.Thread(target=rank_process.score_for_rank_0, args=(ranks, path, sha256))
    other.start()
    scorer = on_devices.RanksScorer(opened.scorer, PipeRanks(0, 2, {1: ours}))
    with pytest.raises(DeviceError) as raised:
        score(scorer, ITEMS)
    other.join()
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith("rank 1 of 2: ") and FAILURES[case] in raised.value.problems[0]


def test_a_rank_without_rank_0_ends(qwen3: Any) -> None:
    """Oracle: a pipe whose other end is closed: no error, for nobody would read it."""
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    sha256 = open_scorer(qwen3.export).facts["sha256"]
    ended = rank_process.score_for_rank_0(PipeRanks(1, 2, {0: theirs}), qwen3.export, sha256)
    assert ended is None and not theirs.closed


def test_there_must_be_as_many_gpus(qwen3: Any, ds_slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a machine with two GPUs, made up: exit code 2 and the sentence, before a model is opened."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_devices.refuse_missing_devices(2)
    done = ds_slm("eval", qwen3.export, "--tasks", "documentation", "--devices", 3)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --devices 3: this machine shows 2 CUDA devices; name as many, or fewer.\n"


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: a third of seven, at least one; all of them where OMP_NUM_THREADS was set."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        for devices, threads in ((3, 2), (8, 1)):
            with on_devices._shared_threads(devices) as found:
                assert found == torch.get_num_threads() == threads
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        with on_devices._shared_threads(3) as found:
            assert found == torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)
