"""Contexts computed once and continuations as branches of them: every figure as if each sequence stood alone."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_slm.evaluate import scoring
from ds_slm.evaluate.opening import open_scorer
from ds_slm.evaluate.scoring import Counts, DecoderScorer, Request, Score, score
from ds_slm.evaluate.text import TextEncoder
from ds_slm.model.decoder import Continuations, Decoder, branched, build
from ds_slm.model.loss import score_tokens
from ds_slm.recipe.sections import Model
from tests.support.scored_models import CONTEXT, recipe_of

CLOSE = {"rel": 1e-5, "abs": 1e-5}
VARIANTS = {
    "grouped": {},
    "one-key-head": {"num_key_value_heads": 1},
    "every-key-head": {"num_key_value_heads": 4},
    "exclusive": {"exclusive_attention": True},
    "exclusive-qk-norm": {"exclusive_attention": True, "qk_norm": True},
    "untied": {"tie_word_embeddings": False},
}


def decoder_of(**changes: Any) -> Decoder:
    """A decoder of random weights that are large enough for every token to count."""
    shape = recipe_of(qk_norm=False).model
    assert shape is not None
    return build(Model(**{**shape.model_dump(), "init_std": 0.2, **changes}), seed=4).eval()


def random_items(seed: int = 0) -> list[list[Request]]:
    """Items of every kind: choices of one context, contexts of one choice, alike in part, over-long, empty."""
    rng = random.Random(seed)
    ids = lambda count: [rng.randrange(2, 400) for _ in range(count)]  # noqa: E731
    items = []
    for _ in range(6):
        context = ids(rng.randint(1, 60))
        items.append([Request(context, ids(rng.randint(1, 9))) for _ in range(rng.randint(2, 5))])
        answer = ids(rng.randint(1, 6))
        items.append([Request([*context[:9], *ids(4)], answer) for _ in range(2)])
        items.append([Request(ids(rng.randint(1, 30)), ids(rng.randint(1, 5)))])
    begun = ids(7)
    items.append([Request(ids(1), []), Request(ids(3), ids(2))])
    items.append([Request(begun, begun[:4] + ids(3)), Request(begun, begun[:4] + ids(1)), Request(begun, begun[:2])])
    items.append([Request(begun, begun), Request(begun, begun)])
    items.append([Request(ids(CONTEXT + 9), ids(4)), Request(ids(CONTEXT - 2), ids(7)), Request(ids(2), ids(3))])
    long = ids(CONTEXT + 20)
    items.append([Request(long, ids(1)), Request(long, ids(5)), Request(long, ids(5))])
    items.append([Request(ids(4), ids(CONTEXT + 3)), Request(ids(4), ids(CONTEXT + 1)), Request(ids(4), ids(CONTEXT))])
    return items


@torch.no_grad()
def alone(logits_of: Any, request: Request) -> tuple[float, bool]:
    """One sequence by a plain forward over its newest tokens, in float64."""
    whole = [*request.context_ids, *request.continuation_ids][-(CONTEXT + 1) :]
    count = min(len(request.continuation_ids), CONTEXT)
    if not count:
        return 0.0, True
    logits_TV: Tensor = logits_of(torch.tensor([whole[:-1]]))[0, -count:].double()
    targets_T = torch.tensor(whole[-count:])
    values_T = logits_TV.log_softmax(-1).gather(1, targets_T.unsqueeze(1)).squeeze(1)
    return float(values_T.sum()), bool((logits_TV.argmax(-1) == targets_T).all())


def assert_same(got: Sequence[Sequence[Score]], expected: Sequence[Sequence[tuple[float, bool]]]) -> None:
    """Close log-probabilities, equal greediness."""
    assert [len(item) for item in got] == [len(item) for item in expected]
    for item, others in zip(got, expected, strict=True):
        for one, (value, is_greedy) in zip(item, others, strict=True):
            assert one.log_probability == pytest.approx(value, **CLOSE)
            assert one.is_greedy == is_greedy


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_request_as_if_it_stood_alone(variant: str) -> None:
    """Oracle: our decoder's whole logits of each sequence alone, log-softmax in float64."""
    model, items = decoder_of(**VARIANTS[variant]), random_items()
    expected = [[alone(model, request) for request in item] for item in items]
    assert_same(score(DecoderScorer(model), items), expected)


def test_each_request_as_by_transformers(made: Any, questions: dict[str, Any]) -> None:
    """Oracle: transformers on the export, in float64, each sequence alone; greedy ones and others are among them."""
    from transformers import AutoModelForCausalLM

    opened = open_scorer(made.export)
    encoder = TextEncoder(opened.tokenizer)
    asked = [one for name in ("arc_easy", "winogrande", "lambada_openai") for one in questions[name][:6]]
    items = [encoder.pairs(one.requests) for one in asked]  # pyright: ignore
    theirs = AutoModelForCausalLM.from_pretrained(made.export, dtype=torch.float64).eval()
    expected = [[alone(lambda ids_BT: theirs(ids_BT).logits, one) for one in item] for item in items]
    assert_same(score(opened.scorer, items), expected)
    assert {is_greedy for item in expected for _, is_greedy in item} == {True, False}


@pytest.mark.parametrize("batch_tokens", [1, 64, 1000, None])
@pytest.mark.parametrize("least_shared", [0, 0.25, 2])
def test_figures_do_not_depend_on_batches_or_sharing(
    batch_tokens: int | None, least_shared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: each sequence alone, by our decoder."""
    model, items = decoder_of(), random_items(seed=1)
    monkeypatch.setattr(scoring, "LEAST_SHARED", least_shared)
    expected = [[alone(model, request) for request in item] for item in items]
    assert_same(score(DecoderScorer(model), items, batch_tokens=batch_tokens), expected)


def test_figures_do_not_depend_on_the_order_of_items() -> None:
    """Oracle: the same items in another order."""
    scorer, items = DecoderScorer(decoder_of()), random_items(seed=2)
    order = list(range(len(items)))
    random.Random(5).shuffle(order)
    whole, shuffled = score(scorer, items), score(scorer, [items[number] for number in order])
    expected = [[(one.log_probability, one.is_greedy) for one in whole[number]] for number in order]
    assert_same(shuffled, expected)


def test_sharing_saves_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: tokens of the rows: choices of one context hold it once."""
    context, choices = list(range(10, 60)), [[100, 101], [102, 103], [104, 105]]
    item = [Request(context, choice) for choice in choices]
    (row,) = scoring._rows([item], CONTEXT, True)
    assert len(row.ids) == 50 + 3
    monkeypatch.setattr(scoring, "LEAST_SHARED", 2)
    assert [len(row.ids) for row in scoring._rows([item], CONTEXT, True)] == [51, 51, 51]


def test_a_row_holds_only_so_many_tokens_of_branches() -> None:
    """Oracle: by hand: two branches of three tokens after a context of any length, then the third."""
    context = list(range(10, 60))
    item = [Request(context, [first, 101, 102, 103]) for first in (7, 8, 9)]
    rows = list(scoring._rows([item], CONTEXT, True, row_tokens=6))
    assert [len(row.ids) for row in rows] == [50 + 6, 50 + 3]
    assert [sorted(set(row.requests)) for row in rows] == [[0, 1], [2]]


def test_one_token_continuations_share_the_whole_row() -> None:
    """Oracle: a row of the context alone, with one place and several targets."""
    (row,) = scoring._rows([[Request([5, 6, 7], [number]) for number in (8, 9, 10)]], CONTEXT, False)
    assert (row.ids, row.places, row.targets, row.has_branches) == ([5, 6, 7], [2, 2, 2], [8, 9, 10], False)


def test_a_continuation_longer_than_the_context() -> None:
    """Oracle: a plain forward over its newest tokens, and the number of those that are not scored."""
    model = decoder_of()
    request = Request([3, 4, 5], [number % 400 + 2 for number in range(CONTEXT + 30)])
    ((found,),) = score(DecoderScorer(model), [[request]])
    newest = torch.tensor([request.continuation_ids[-CONTEXT - 1 :]])
    with torch.no_grad():
        values = model(newest[:, :-1])[0].double().log_softmax(-1).gather(1, newest[0, 1:, None])
    assert found.log_probability == pytest.approx(float(values.sum()), rel=1e-5)
    assert found.cut_tokens == 30


def test_what_is_cut_is_counted() -> None:
    """Oracle: lengths by hand around the context's."""
    requests = [Request([1] * length, [2] * more) for length, more in ((90, 7), (91, 7), (1, 96), (1, 97))]
    scores = [Score(0.0, False, max(0, len(request.continuation_ids) - CONTEXT)) for request in requests]
    counts = Counts()
    counts.add(requests, scores, CONTEXT)
    assert counts == Counts(tokens=97 + 98 + 97 + 98, cut_contexts=2, cut_continuations=1)


def test_nothing_to_score() -> None:
    """Oracle: as many empty lists."""
    scorer = DecoderScorer(decoder_of())
    assert score(scorer, []) == []
    assert score(scorer, [[], []]) == [[], []]


def test_batches_hold_about_as_many_tokens() -> None:
    """Oracle: padded sizes, at most what is asked for; all rows once; those with branches apart."""
    rows = list(scoring._rows(random_items(), CONTEXT, True))
    for most in (64, 400):
        found = list(scoring.batches(rows, most))
        assert sorted(map(id, rows)) == sorted(id(row) for batch in found for row in batch)
        assert all(len(batch) == 1 or len(batch) * max(len(row.ids) for row in batch) <= most for batch in found)
        assert all(len({row.has_branches for row in batch}) == 1 for batch in found)
    reported: list[int] = []
    score(DecoderScorer(decoder_of()), random_items(), reported.append, 400)
    assert sum(reported) == sum(bool(row.targets) for row in rows)


def test_every_target_is_scored_after_its_token() -> None:
    """Oracle: the branch of each place, walked back to the context, spells the request's own tokens."""
    context = [5, 6, 7, 8]
    item = [Request(context, [9, 10, 11]), Request(context, [9, 12]), Request(context, [13])]
    (row,) = scoring._rows([item], CONTEXT, True)
    for number, request in enumerate(item):
        places = [place for place, owner in zip(row.places, row.requests, strict=True) if owner == number]
        targets = [target for target, owner in zip(row.targets, row.requests, strict=True) if owner == number]
        assert targets == request.continuation_ids
        assert row.ids[places[0]] == context[-1]
        assert [row.ids[place] for place in places[1:]] == request.continuation_ids[:-1]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_are_what_each_gives_alone(variant: str) -> None:
    """Oracle: the decoder on context and branch alone: hidden states through the whole logits."""
    model = decoder_of(**VARIANTS[variant])
    rng = torch.Generator().manual_seed(1)
    context, lengths = torch.randint(2, 400, (11,), generator=rng), (4, 1, 7)
    branches = [torch.randint(2, 400, (length,), generator=rng) for length in lengths]
    ids_BT = torch.cat([context, *branches, torch.zeros(3, dtype=torch.long)])[None]
    numbers = [0] * 11 + [1] * 4 + [2] + [3] * 7 + [-1] * 3
    positions = model.model.positions_of(*branched(torch.tensor([numbers])))
    hidden_TD = model.model(ids_BT, positions, None)[0]

    begin = 11
    for branch in branches:
        whole = torch.cat([context, branch])[None]
        expected_TD = model.model(whole, model.model.positions(whole, None), None)[0]
        got_TD = torch.cat([hidden_TD[:11], hidden_TD[begin : begin + len(branch)]])
        torch.testing.assert_close(got_TD, expected_TD, atol=1e-5, rtol=1e-5)
        begin += len(branch)


def test_positions_and_sight_of_branches() -> None:
    """Oracle: by hand: two tokens of context, two branches, one of padding."""
    positions_BT, seen_BTT = branched(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert positions_BT.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert seen_BTT[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]  # fmt: skip


def test_rows_of_branches_without_a_shared_context() -> None:
    """Oracle: by hand: each branch begins at position 0 and sees itself alone."""
    positions_BT, seen_BTT = branched(torch.tensor([[1, 1, 2]]))
    assert positions_BT.tolist() == [[0, 1, 0]]
    assert seen_BTT[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_token_scores_are_log_softmax_of_whole_logits(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's log_softmax of all logits in float64; equal places side by side and apart, any chunk."""
    from ds_slm.model import loss

    monkeypatch.setattr(loss, "loss_chunk_tokens", lambda *_: chunk_tokens)
    generator = torch.Generator().manual_seed(3)
    hidden_ND, weight_VD = torch.randn(9, 16, generator=generator), torch.randn(50, 16, generator=generator)
    places_N = torch.tensor([0, 0, 2, 2, 2, 7, 0, 8, 8])
    logits_NV = (hidden_ND.double() @ weight_VD.double().T)[places_N]
    targets_N = torch.tensor([1, 4, 9, 49, 0, 7, 3, 0, 0])
    targets_N[[2, 6]] = logits_NV.argmax(-1)[[2, 6]]

    found = score_tokens(hidden_ND, weight_VD, places_N, targets_N)
    expected_N = logits_NV.log_softmax(-1).gather(1, targets_N.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.log_probability_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    assert found.is_greedy_N.tolist() == (logits_NV.argmax(-1) == targets_N).tolist()


def test_of_equal_logits_the_smallest_id_is_greedy() -> None:
    """Oracle: torch's and numpy's argmax, the first."""
    hidden_ND, weight_VD = torch.ones(1, 4), torch.ones(6, 4)
    found = score_tokens(hidden_ND, weight_VD, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert found.is_greedy_N.tolist() == [True, False]


@torch.no_grad()
def test_plain_rows_need_no_mask() -> None:
    """Oracle: the same row with every token in the context."""
    model = decoder_of()
    ids_BT, places_N, targets_N = torch.tensor([[5, 6, 7, 8]]), torch.tensor([1, 3]), torch.tensor([7, 9])
    plain = model(ids_BT, continuations=Continuations(None, places_N, targets_N))
    masked = model(ids_BT, continuations=Continuations(torch.zeros_like(ids_BT), places_N, targets_N))
    torch.testing.assert_close(plain.log_probability_N, masked.log_probability_N)


def test_a_scorer_reads_its_model(qwen3: Any) -> None:
    """Oracle: the shape of the recipe; training mode is left."""
    scorer = DecoderScorer(qwen3.model.train())
    assert (scorer.max_length, scorer.device.type, scorer.model.training) == (CONTEXT, "cpu", False)
    assert isinstance(qwen3.export, Path)
