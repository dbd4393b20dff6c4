"""ArithMark's two ways of answering, and its parts by number of operators."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.errors import DataError
from ds_slm.evaluate.benchmarks import Found
from ds_slm.evaluate.opening import open_scorer
from ds_slm.evaluate.own_sets import ARITHMARK, OWN_SETS, Answering, questions_of
from ds_slm.evaluate.scoring import Counts
from ds_slm.evaluate.text import TextEncoder
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from tests.support.scored_models import recipe_of, state_of

ROWS = [
    {
        "ctx": f"The barik {number} plus {number + 1}{' times 2' * (number % 3)} is", "label": number % 4,
        "endings": [" red", f" {number * 2 + 1} and green", " the sea", f" {number}"],
        "metadata": {"operator_count": number % 3 + 1},
    }
    for number in range(9)
]  # fmt: skip


@torch.no_grad()
def test_both_ways_by_hand(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: transformers' logits: the sum over ids encoded apart, the mean over those encoded together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = recipe_of().model
    assert shape is not None
    model = build(shape.model_copy(update={"init_std": 0.2}), seed=2)
    place = tmp_path / "export"
    export(state_of(model), shape, tokenizer_folder, place)
    opened = open_scorer(place)
    answering = Answering(opened.scorer, TextEncoder(opened.tokenizer), lambda rows: None, Counts())
    items = OWN_SETS[ARITHMARK].answer(answering, questions_of(Found(ROWS, "rows")))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(place),
    )

    def values(ids: list[int], scored: int) -> torch.Tensor:
        logits_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return torch.stack([logits_TV[index - 1, ids[index]] for index in range(len(ids) - scored, len(ids))])

    for row, item in zip(ROWS, items, strict=True):
        context = tokenizer(row["ctx"])["input_ids"]
        sums, means = [], []
        for ending in row["endings"]:
            apart, together = tokenizer(ending)["input_ids"], tokenizer(row["ctx"] + ending)["input_ids"]
            sums.append(float(values(context + apart, len(apart)).sum()))
            means.append(float(values(together, len(together) - len(context)).mean()))
        assert item.log_probabilities == pytest.approx(sums, rel=1e-5, abs=1e-5)
        assert item.values["acc"] == float(sums.index(max(sums)) == row["label"])
        assert item.values["acc_joint_mean"] == float(means.index(max(means)) == row["label"])


def test_parts_by_operators() -> None:
    """Oracle: the count in each row's metadata."""
    part = OWN_SETS[ARITHMARK].parts
    assert part is not None
    names = ["arithmark2_1_operator", "arithmark2_2_operators", "arithmark2_3_operators"]
    assert [part(row) for row in ROWS] == names * 3


@pytest.mark.parametrize("change", [{"label": 4}, {"label": "1"}, {"endings": []}])
def test_odd_rows(change: dict[str, Any]) -> None:
    """Oracle: the row's number and what it should hold."""
    with pytest.raises(DataError, match="rows, row 2: expected a text"):
        questions_of(Found([ROWS[0], {**ROWS[1], **change}], "rows"))
