"""Models of other architectures, scored through transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_slm.errors import CheckpointError
from ds_slm.evaluate import harness
from ds_slm.evaluate.opening import TransformersScorer, open_scorer
from ds_slm.evaluate.scoring import Request, score
from ds_slm.evaluate.text import TextEncoder
from tests.support.scored_models import CONTEXT, VOCAB


def write_gpt2(folder: Path, tokenizer_folder: Path) -> Path:
    """A random GPT2LMHeadModel of learned positions."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def test_a_model_s_own_code_does_not_run(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a file that the code would write, though somebody answers yes to every question."""
    folder = write_gpt2(tmp_path / "model", tokenizer_folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": named}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        open_scorer(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_not_made_up(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: the name of the tensor that was taken out."""
    folder = write_gpt2(tmp_path, tokenizer_folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "h.1.mlp.c_fc.weight" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"lacks .*h\.1\.mlp\.c_fc\.weight"):
        open_scorer(folder)
    (folder / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        open_scorer(folder)


def test_a_model_that_looks_ahead_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: a BERT, which transformers loads as a causal model; with `is_decoder` it is one."""
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for is_decoder in (True, False):
        config = BertConfig(**shape, intermediate_size=64, max_position_embeddings=CONTEXT, is_decoder=is_decoder)
        BertLMHeadModel(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
        if is_decoder:
            assert open_scorer(tmp_path).scorer.max_length == CONTEXT
            continue
        with pytest.raises(CheckpointError, match="is not a causal model"):
            open_scorer(tmp_path)


def test_a_checkpoint_that_is_named_has_a_place_of_its_own(qwen3: Any) -> None:
    """Oracle: the run folder's results are the newest checkpoint's."""
    assert open_scorer(qwen3.run).folder == qwen3.run
    opened = open_scorer(qwen3.checkpoint)
    assert opened.folder == qwen3.run / "eval" / qwen3.checkpoint.name
    assert (opened.run, opened.facts["step"]) == (qwen3.run, 7)
    assert open_scorer(qwen3.export).run is None


def test_a_gpt2_is_scored_as_by_the_harness(tokenizer_folder: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: HFLM on the same folder."""
    from lm_eval.models.huggingface import HFLM

    opened = open_scorer(write_gpt2(tmp_path, tokenizer_folder))
    assert isinstance(opened.scorer, TransformersScorer)
    assert (opened.scorer.max_length, opened.facts["scored_by"]) == (CONTEXT, "transformers")

    chosen = {name: tasks[name] for name in ("arc_easy", "winogrande", "lambada_openai", "wikitext")}
    got = harness.run(chosen, harness.HarnessModel(opened.scorer, TextEncoder(opened.tokenizer)))
    with harness.quiet():
        theirs: Any = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=4, dtype="float32")
    for name, expected in harness.run(chosen, theirs).items():
        for mine, other in zip(got[name], expected, strict=True):
            assert mine.log_probabilities == pytest.approx(other.log_probabilities, rel=1e-5, abs=1e-5)
            assert mine.values.get("acc") == other.values.get("acc")


def transformers_models() -> dict[str, Any]:
    """Tiny random models by what their layers do with a mask and positions of the caller's."""
    import transformers as hf

    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = {**sizes, "intermediate_size": 64, "max_position_embeddings": CONTEXT, "initializer_range": 0.2}
    named = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    named["initializer_range"] = 0.2
    return {
        "rotary": hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**plain)),
        "learned positions": hf.GPT2LMHeadModel(hf.GPT2Config(**named)),
        "distances": hf.BloomForCausalLM(hf.BloomConfig(**named)),
        "sliding window": hf.MistralForCausalLM(hf.MistralConfig(**plain, num_key_value_heads=2, sliding_window=16)),
        "recurrent": hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
    }


def test_branches_of_models_that_take_them() -> None:
    """Oracle: which architectures place a token by its position alone; and the same model without branches."""
    takes = {"rotary", "learned positions"}
    context = list(range(20, 50))
    items = [[Request(context, [7, 8, 9, 10]), Request(context, [9, 8]), Request(context, [11])]]
    for name, model in transformers_models().items():
        scorer = TransformersScorer(model, torch.device("cpu"))
        assert scorer.branches == (name in takes), name
        (found,) = score(scorer, items)
        scorer.branches = False
        (expected,) = score(scorer, items)
        for one, other in zip(found, expected, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5, abs=1e-5), name
            assert one.is_greedy == other.is_greedy
