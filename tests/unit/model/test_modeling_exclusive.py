"""The modeling file of exclusive attention, as several versions of transformers and vLLM call it."""

import ast
import inspect
import textwrap

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

from ds_slm.model import modeling_exclusive as exclusive

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "initializer_range": 0.3}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(qk_norm: bool) -> exclusive.ExclusiveForCausalLM:
    torch.manual_seed(0)
    return exclusive.ExclusiveForCausalLM(exclusive.ExclusiveConfig(**SIZES, qk_norm=qk_norm)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_attention_takes_its_cache_by_both_names(name: str) -> None:
    """Oracle: the whole row at once; transformers 5.24 renamed the argument, and an unknown one is ignored."""
    model = model_of(qk_norm=True)
    attention, x_BTD = model.model.layers[0].self_attn, torch.randn(1, 6, 32)
    position_embeddings = model.model.rotary_emb(x_BTD, torch.arange(6)[None])
    mask_TT = torch.full((6, 6), float("-inf")).triu(1)
    expected_BTD, _ = attention(x_BTD, position_embeddings, mask_TT[None, None])

    cache, found = DynamicCache(), []
    for token in range(6):
        place = slice(token, token + 1)
        angles = tuple(table[:, place] for table in position_embeddings)
        found.append(attention(x_BTD[:, place], angles, None, **{name: cache})[0])
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(torch.cat(found, 1), expected_BTD, atol=1e-5, rtol=0)


def flat(module, query, key, value, mask, **options):
    """As vLLM's attention: heads come back side by side."""
    output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
    return output.flatten(2), weights


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_engine_may_bring_its_own_attention(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: transformers' own attention implementations."""
    model, ids_BT = model_of(qk_norm), torch.arange(12)[None]
    expected_BTV = model(ids_BT).logits
    assert expected_BTV.std() > 0.3
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flat", flat)
    for implementation in ("flat", "eager"):
        model.config._attn_implementation = implementation
        torch.testing.assert_close(model(ids_BT).logits, expected_BTV, atol=1e-5, rtol=1e-5)


def test_vllm_finds_the_attention() -> None:
    """Oracle: vLLM's rule: one call of a name that an entry of ALL_ATTENTION_FUNCTIONS was assigned to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(exclusive.ExclusiveAttention.forward)))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    looked_up = [node for node in assigned if isinstance(node.value, ast.Subscript)]
    names = [ast.unparse(node.targets[0]) for node in looked_up if "ALL_ATTENTION_FUNCTIONS[" in ast.unparse(node)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert len(calls) == 1
    assert {"scaling": "self.scaling"}.items() <= {one.arg: ast.unparse(one.value) for one in calls[0].keywords}.items()
