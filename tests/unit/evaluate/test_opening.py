"""Models of other architectures, scored through transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.evaluate import harness
from ds_slm.evaluate.opening import TransformersScorer, open_scorer
from ds_slm.evaluate.text import TextEncoder
from tests.support.scored_models import CONTEXT, VOCAB


def test_a_gpt2_is_scored_as_by_the_harness(tokenizer_folder: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: HFLM on the same folder: a random GPT2LMHeadModel of learned positions."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    opened = open_scorer(tmp_path)
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
