"""The same answers, item by item, as lm-evaluation-harness's own scorer gives on the export."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ds_slm.errors import DataError
from ds_slm.evaluate import harness
from ds_slm.evaluate.benchmarks import BENCHMARKS
from ds_slm.evaluate.harness import HarnessModel
from ds_slm.evaluate.opening import open_scorer
from ds_slm.evaluate.results import Item, figures
from ds_slm.evaluate.text import TextEncoder
from ds_slm.publish.export import export
from tests.support import benchmark_files, scored_models

CLOSE = {"rel": 1e-5, "abs": 1e-5}
"""fp32 sums of other orders. Log-probabilities of nearly 0 hold no more than the absolute part."""


def ours(path: Path) -> HarnessModel:
    """Our scorer as the harness sees it."""
    opened = open_scorer(path)
    return HarnessModel(opened.scorer, TextEncoder(opened.tokenizer))


def theirs(path: Path) -> Any:
    """The harness's own scorer."""
    with harness.quiet():
        return HFLM(pretrained=str(path), device="cpu", batch_size=4, dtype="float32")


def assert_same(got: Mapping[str, list[Item]], expected: Mapping[str, list[Item]]) -> None:
    """Every log-probability close, every answer equal, every figure close."""
    assert got.keys() == expected.keys()
    for name in got:
        assert len(got[name]) == len(expected[name]) == len(benchmark_files.ROWS[name])
        for mine, other in zip(got[name], expected[name], strict=True):
            assert (mine.requests, mine.gold, mine.right) == (other.requests, other.gold, other.right)
            assert mine.log_probabilities == pytest.approx(other.log_probabilities, **CLOSE), mine.requests
            assert mine.values.keys() == other.values.keys()
            for metric, value in mine.values.items():
                exact = metric.startswith("acc")
                assert value == other.values[metric] if exact else value == pytest.approx(other.values[metric], **CLOSE)
        for metric, figure in figures(got[name]).items():
            assert figure.value == pytest.approx(figures(expected[name])[metric].value, rel=1e-5), (name, metric)


@pytest.fixture(scope="module")
def of_harness() -> dict[Path, Any]:
    """The answers of the harness's own scorer, by export."""
    return {}


def expected_of(path: Path, tasks: Mapping[str, Any], known: dict[Path, Any]) -> dict[str, list[Item]]:
    """The answers of the harness's own scorer, computed once."""
    if path not in known:
        known[path] = harness.run(tasks, theirs(path))  # pyright: ignore - it takes any of the harness's models
    return known[path]


def test_every_item_is_answered_as_by_the_harness(made: Any, tasks: dict[str, Any], of_harness: dict) -> None:
    """Oracle: lm_eval.models.huggingface.HFLM on the export, for nine tasks of every kind.

    Long contexts are cut by both; some are empty, end in a space, or hold a control token's literal.
    """
    model = ours(made.export)
    got = harness.run(tasks, model)
    assert_same(got, expected_of(made.export, tasks, of_harness))
    assert all(model.counts[name].cut_contexts for name in ("hellaswag", "arc_easy", "winogrande", "sciq"))


def test_the_models_know_far_more_than_chance(made: Any, tasks: dict[str, Any]) -> None:
    """Oracle: chance. Agreement about models that know nothing would show less."""
    got = {name: figures(items) for name, items in harness.run(tasks, ours(made.export)).items()}
    choices = [found["acc"] for found in got.values() if "acc" in found and found["acc"].chance is not None]
    assert len(choices) == 7
    assert sum(one.value - (one.chance or 0) for one in choices) / len(choices) > 25
    assert sum(one.value > (one.chance or 0) + 15 for one in choices) >= 5
    assert got["lambada_openai"]["acc"].value > 30
    assert any(one.value < 100 for one in choices)


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_a_run_is_scored_as_its_export(place: str, qwen3: Any, tasks: dict[str, Any], of_harness: dict) -> None:
    """Oracle: HFLM on the export of the same weights."""
    assert_same(harness.run(tasks, ours(getattr(qwen3, place))), expected_of(qwen3.export, tasks, of_harness))


def test_a_tokenizer_that_adds_bos(qwen3: Any, tokenizer_folder: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: HFLM, which leaves BOS to the tokenizer too."""
    bos_folder = scored_models.with_bos(tokenizer_folder, tmp_path / "tokenizer")
    export(scored_models.state_of(qwen3.model), qwen3.recipe.model, bos_folder, tmp_path / "export")
    model = ours(tmp_path / "export")
    assert model.encoder.adds_special_tokens
    assert model.prefix_token_id == 2
    assert model.tok_encode("red")[0] == 2
    assert_same(harness.run(tasks, model), harness.run(tasks, theirs(tmp_path / "export")))  # pyright: ignore


PAIRS = [
    ("", "red"), ("", " red"), ("", "<|endoftext|>red"), ("", "<|bos|> red"), ("The barik is ", "red"),
    ("The barik is \n ", "red and green"), ("<|endoftext|>", " red"), ("a<|endoftext|>b ", "<|pad|>"),
    ("<|bos|>The barik", " is red"), ("Łód", "ź is far"), ("The bar", "ik is red"),
    (benchmark_files.LONG, " red"), (benchmark_files.LONG + " ", benchmark_files.LONG[:150]), ("The  barik", "  "),
]  # fmt: skip


@pytest.mark.parametrize("adds_bos", [False, True])
def test_hostile_pairs(adds_bos: bool, qwen3: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: HFLM's ids of each context and continuation, its log-probabilities, and its windows of whole texts."""
    path = qwen3.export
    if adds_bos:
        bos_folder, path = scored_models.with_bos(tokenizer_folder, tmp_path / "tokenizer"), tmp_path / "export"
        export(scored_models.state_of(qwen3.model), qwen3.recipe.model, bos_folder, path)
    mine, other = ours(path), theirs(path)

    def asked(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("some", number, 1))  # pyright: ignore
            for number, one in enumerate(arguments)
        ]

    for pair, found in zip(PAIRS, mine.encoder.pairs(PAIRS), strict=True):
        if pair[0]:
            assert (list(found.context_ids), list(found.continuation_ids)) == other._encode_pair(*pair), pair

    pairs, texts = asked("loglikelihood", PAIRS), asked("loglikelihood_rolling", [("".join(pair),) for pair in PAIRS])
    with harness.quiet():  # one by one: HFLM takes pairs that are one text, cut in two places, for the same
        expected = [other.loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs]
        rolling = other.loglikelihood_rolling(texts, disable_tqdm=True)
    for pair, (got, is_greedy), (value, greedy) in zip(PAIRS, mine.loglikelihood(pairs), expected, strict=True):
        assert got == pytest.approx(value, **CLOSE), pair
        assert is_greedy == greedy, pair
    assert mine.loglikelihood_rolling(texts) == pytest.approx(rolling, **CLOSE)


def test_a_context_of_white_space_alone(qwen3: Any) -> None:
    """Oracle: the same text without a context. HFLM stops there: it moves the space and has no context left."""
    model = ours(qwen3.export)
    for context in ("  ", "\n"):
        assert model.encoder.pairs([(context, "red")]) == model.encoder.pairs([("", f"{context}red")])


def test_a_choice_longer_than_the_context_is_counted(qwen3: Any) -> None:
    """Oracle: HFLM stops at such a choice with an AssertionError; ours counts it, and the other items keep theirs."""
    rows = [dict(row) for row in benchmark_files.ROWS["piqa"][:4]]
    rows[1]["sol2"] = benchmark_files.LONG
    whole, spoilt = ({"piqa": harness.task_of(Path("piqa/piqa.yaml"), some)} for some in (rows[:1] + rows[2:], rows))
    model = ours(qwen3.export)
    before, got = harness.run(whole, ours(qwen3.export))["piqa"], harness.run(spoilt, model)["piqa"]
    assert model.counts["piqa"].cut_continuations == 1
    assert [item.values for item in got[:1] + got[2:]] == [item.values for item in before]
    assert all(map(float.__lt__, got[1].log_probabilities, (0.0, 0.0)))
    with pytest.raises(AssertionError):
        harness.run(spoilt, theirs(qwen3.export))  # pyright: ignore


def test_a_limit_takes_the_first_items(qwen3: Any, tasks: dict[str, Any]) -> None:
    """Oracle: the first items of the whole task."""
    chosen = {name: tasks[name] for name in ("arc_easy", "wikitext")}
    whole, limited = (harness.run(chosen, ours(qwen3.export), limit) for limit in (None, 5))
    for name in chosen:
        assert len(limited[name]) == 5
        for got, expected in zip(limited[name], whole[name][:5], strict=True):
            assert got.requests == expected.requests
            assert got.log_probabilities == pytest.approx(expected.log_probabilities, **CLOSE)


def test_prompts_are_the_harnesss(tasks: dict[str, Any]) -> None:
    """Oracle: the text of the harness's prompts; items of three, four and five choices."""
    asked = harness.questions_of(tasks["arc_easy"])
    assert asked[0].requests[0][0] == f"Question: {benchmark_files.ROWS['arc_easy'][0]['question']}\nAnswer:"
    assert {len(one.requests) for one in asked} == {3, 4, 5}


@pytest.mark.parametrize(
    ("config", "row", "parts"),
    [
        (
            "arc/arc_easy.yaml",
            {"question": "why?", "options": ["a", "b"]},
            ("arc_easy", "expected the columns of allenai/ai2_arc, got question, options"),
        ),
        ("gsm8k/gsm8k.yaml", {"question": "why?", "answer": "#### 1"}, ("gsm8k", "generate_until")),
    ],
)
def test_refused_tasks(config: str, row: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Oracle: a sentence each: columns that are not the task's, a task of generation."""
    with pytest.raises(DataError) as raised:
        harness.task_of(Path(config), [row])
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_quiet_leaves_all_as_it_was() -> None:
    """Oracle: the harness's own objects, before and after, when the body fails too."""
    import lm_eval.api.task
    import lm_eval.utils

    before = lm_eval.api.task.tqdm, lm_eval.utils.env.from_string
    with pytest.raises(ZeroDivisionError), harness.quiet():
        raise ZeroDivisionError
    assert (lm_eval.api.task.tqdm, lm_eval.utils.env.from_string) == before


def test_templates_are_compiled_and_rows_changed_once(qwen3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: HellaSwag's YAML: one function that changes rows, three templates at most; by calls counted."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(lm_eval.utils.env, "compile")
    count(Dataset, "map")
    task = harness.task_of(Path(BENCHMARKS["hellaswag"].config), benchmark_files.ROWS["hellaswag"])
    harness.questions_of(task)
    assert 0 < calls["compile"] <= 6  # when it is made, and when it is asked
    harness.run({"hellaswag": task}, ours(qwen3.export))
    assert calls["compile"] <= 9
    assert calls["map"] == 1


def test_version_is_the_harnesss() -> None:
    """Oracle: the metadata in the harness's YAML."""
    rows = benchmark_files.ROWS
    versions = {name: harness.version_of(harness.task_of(Path(BENCHMARKS[name].config), rows[name])) for name in rows}
    assert versions["boolq"] == versions["wikitext"] == "2.0"
    assert versions["hellaswag"] == versions["lambada_openai"] == "1.0"


def test_a_choice_without_a_token_is_refused(qwen3: Any) -> None:
    """Oracle: the harness asserts there; a log-probability of 0 would win."""
    encoder = TextEncoder(open_scorer(qwen3.export).tokenizer)
    with pytest.raises(DataError, match="has no token of its own"):
        encoder.pairs([("The bar", ""), ("The bar", " red")])
