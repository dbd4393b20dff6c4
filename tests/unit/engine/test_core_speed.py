"""How long one core takes for a recipe: a few blocks are timed and the rest are counted."""

from types import SimpleNamespace

import pytest
import torch

from ds_slm.engine import core_speed
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe


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
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 320}
    settings = [f"model.{name}={value}" for name, value in shape.items()]
    heads = ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=8"]
    others = [f"train.precision={precision}", f"optimizer.name={optimizer}", "tokenizer.vocab_size=320"]
    recipe = loading.load("demo", [*settings, *heads, *others])

    ticks = iter([0.0, 5.0, 5.0, 7.0, 7.0, 11.0] * 3)  # when each of three rounds begins and ends
    monkeypatch.setattr(core_speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = core_speed.core_speed(recipe, 1)
    values = 320 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
    tied = 1 if recipe.model.tie_word_embeddings else 2
    norms = 2 * 8 if recipe.model.qk_norm else 0
    assert found.micro_batch_s == pytest.approx(2.0)
    assert found.update_s_per_value == pytest.approx(2.0 / (values + norms + (tied - 1) * 320 * 32))
