"""How long one core takes for a recipe: a few blocks are timed and the rest are counted."""

import multiprocessing
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from ds_slm.engine import core_speed
from ds_slm.errors import DeviceError
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe


def tiny_recipe(*settings: str) -> Recipe:
    """The demo with a model of four narrow blocks."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = [f"model.{name}={value}" for name, value in (shape | heads).items()]
    return loading.load("demo", [*model, "tokenizer.vocab_size=320", *settings])


def test_blocks_are_timed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand; 2 s for all but the blocks and 3 s a block, on one thread, of the whole recipe's blocks."""
    recipe, threads = loading.load("slm-10m"), torch.get_num_threads()
    used = []

    def micro_batch_s(part: Recipe, rows: int, compiled: bool) -> float:
        used.append((part.model.num_hidden_layers, rows, compiled, torch.get_num_threads()))
        return 2.0 + 3.0 * part.model.num_hidden_layers

    monkeypatch.setattr(core_speed, "_micro_batch_s", micro_batch_s)
    monkeypatch.setattr(core_speed, "_update_s_per_value", lambda _: 1e-9)
    found = core_speed.core_speed(recipe, 2, compiled=True)
    assert found.micro_batch_s == pytest.approx(2.0 + 3.0 * recipe.model.num_hidden_layers)
    assert found.update_s_per_value == 1e-9
    assert used == [(1, 2, True, 1), (3, 2, True, 1)] and found.compiled and torch.get_num_threads() == threads


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_real_recipe_has_a_speed(precision: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock of our own: the least of three rounds counts, for either model and for the update."""
    recipe = tiny_recipe(f"train.precision={precision}", f"optimizer.name={optimizer}")
    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 11.0] * 3)  # when each of three rounds begins and ends
    monkeypatch.setattr(core_speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = core_speed.core_speed(recipe, 1)
    values = 320 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
    tied = 1 if recipe.model.tie_word_embeddings else 2
    norms = 2 * 8 if recipe.model.qk_norm else 0
    assert found.micro_batch_s == pytest.approx(2.0)
    assert found.update_s_per_value == pytest.approx(2.0 / (values + norms + (tied - 1) * 320 * 32))


def test_the_other_cores_compute_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's list of processes: two others that compute while a core is timed, none afterwards."""
    found: list[int] = []

    def micro_batch_s(*_: object) -> float:
        others = [psutil.Process(one.pid) for one in multiprocessing.active_children()]
        before_s, deadline_s = [one.cpu_times().user for one in others], time.monotonic() + 60
        while not all(one.cpu_times().user > was for one, was in zip(others, before_s, strict=True)):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        found.append(len(others))
        return 1.0

    monkeypatch.setattr(core_speed, "_micro_batch_s", micro_batch_s)
    monkeypatch.setattr(core_speed, "_update_s_per_value", lambda _: 1e-9)
    core_speed.core_speed(tiny_recipe(), 1, cores=3)
    assert found == [2, 2]
    assert multiprocessing.active_children() == []


def test_a_busy_core_that_ends_spoils_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's memory killer, by hand: no time, but a sentence with the exit code and a way out."""

    def micro_batch_s(*_: object) -> float:
        for one in multiprocessing.active_children():
            one.kill()
            one.join()
        return 1.0

    monkeypatch.setattr(core_speed, "_micro_batch_s", micro_batch_s)
    monkeypatch.setattr(core_speed, "_update_s_per_value", lambda _: 1e-9)
    with pytest.raises(DeviceError, match=r"1 of 1 processes .* \(exit codes -9\), .*fewer --devices"):
        core_speed.core_speed(tiny_recipe(), 1, cores=2)
