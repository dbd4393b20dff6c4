"""The sets that we score without lm-evaluation-harness: ArithMark, and sentences of the built-in documentation.

    rows --questions_of--> questions --answer--> items, by the set's own metrics

acc             context and ending encoded apart, the largest sum of log-probabilities: ArithMark's own way. For the
                documentation set: encoded together, as the harness does.
acc_norm        the largest sum for each character of the ending, as the harness does.
acc_joint_mean  encoded together, the largest mean log-probability of a token: how slm-10m's authors scored ArithMark.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_slm.errors import DataError
from ds_slm.evaluate import documentation
from ds_slm.evaluate.benchmarks import Benchmark, Found, Published, find_rows, read_json_lines
from ds_slm.evaluate.results import Item, Question
from ds_slm.evaluate.scoring import Counts, Request, Scorer, score
from ds_slm.evaluate.text import TextEncoder
from ds_slm.run.scores import ARITHMARK, DOCUMENTATION

OPERATORS = {1: f"{ARITHMARK}_1_operator", 2: f"{ARITHMARK}_2_operators", 3: f"{ARITHMARK}_3_operators"}
"""The name of the items with this many operators."""
_FILES = Benchmark(
    ARITHMARK, "", ("AxiomicLabs/ArithMark-2.0", None), "test",
    ("ctx", "endings", "label", "metadata"), ("arithmark", "arithmark2", "arithmark-2.0"),
    (Published("arithmark*.jsonl", read_json_lines), Published("ArithMark*.jsonl", read_json_lines)),
)  # fmt: skip


@dataclass(frozen=True)
class OwnSet:
    """A set that we score ourselves."""

    version: str
    find: Callable[[Path | None], Found]
    """Its rows, from a folder of benchmarks or the hub."""
    answer: Callable[["Answering", Sequence[Question]], list[Item]]
    parts: Callable[[Mapping[str, Any]], str] | None = None
    """The name of a row's part, if the set has parts."""


@dataclass(frozen=True)
class Answering:
    """Answers questions."""

    scorer: Scorer
    encoder: TextEncoder
    report: Callable[[int], None]
    counts: Counts

    def scores(self, items: Sequence[Sequence[Request]]) -> list[list[float]]:
        """The log-probability of each request."""
        found = score(self.scorer, items, self.report)
        for requests, scores in zip(items, found, strict=True):
            self.counts.add(requests, scores, self.scorer.max_length)
        return [[one.log_probability for one in scores] for scores in found]


def questions_of(found: Found) -> list[Question]:
    """The question of each row: a context and its endings. Raises DataError for a row that is not one."""
    questions = []
    for number, row in enumerate(found.rows, 1):
        context, endings, label = row["ctx"], row["endings"], row["label"]
        texts = isinstance(endings, list) and all(isinstance(one, str) and one for one in endings)
        if not (isinstance(context, str) and texts and isinstance(label, int) and 0 <= label < len(endings)):
            raise DataError(
                f"{found.place}, row {number}: expected a text, some endings and the number of the right one; got ctx "
                f"{context!r}, endings {endings!r}, label {label!r}."
            )
        questions.append(Question(tuple((context, ending) for ending in endings), label))
    return questions


def _answer_arithmark(answering: Answering, questions: Sequence[Question]) -> list[Item]:
    encoder = answering.encoder
    apart, joint = [], []
    for question in questions:
        (context_ids,) = encoder.encode([question.requests[0][0]])
        endings = encoder.encode([ending for _, ending in question.requests], add_special_tokens=False)
        apart.append([Request(context_ids, ids) for ids in endings])
        joint.append(_pairs(encoder, question))

    scores = answering.scores([*apart, *joint])
    items = []
    for index, question in enumerate(questions):
        sums, together = scores[index], scores[len(questions) + index]
        means = [total / len(pair.continuation_ids) for total, pair in zip(together, joint[index], strict=True)]
        values = {"acc": _is_right(sums, question), "acc_joint_mean": _is_right(means, question)}
        items.append(Item(question.requests, question.gold, question.gold, tuple(sums), values))
    return items


def _answer_as_harness(answering: Answering, questions: Sequence[Question]) -> list[Item]:
    scores = answering.scores([_pairs(answering.encoder, question) for question in questions])
    items = []
    for question, sums in zip(questions, scores, strict=True):
        lengths = [len(ending.removeprefix(" ")) for _, ending in question.requests]
        by_length = [total / length for total, length in zip(sums, lengths, strict=True)]
        values = {"acc": _is_right(sums, question), "acc_norm": _is_right(by_length, question)}
        items.append(Item(question.requests, question.gold, question.gold, tuple(sums), values))
    return items


def _pairs(encoder: TextEncoder, question: Question) -> list[Request]:
    return encoder.pairs([(context, ending) for context, ending in question.requests])


def _is_right(scores: Sequence[float], question: Question) -> float:
    """1.0 if the right choice has the largest score; if scores are equal, the first counts."""
    return float(max(range(len(scores)), key=scores.__getitem__) == question.gold)


def _find_arithmark(bench_dir: Path | None) -> Found:
    found = find_rows(_FILES, bench_dir)
    for number, row in enumerate(found.rows, 1):
        metadata = row["metadata"]
        if not isinstance(metadata, Mapping) or metadata.get("operator_count") not in OPERATORS:
            raise DataError(
                f"{found.place}, row {number}: expected metadata with an operator_count of 1 to 3, got {metadata!r}."
            )
    return found


OWN_SETS = {
    ARITHMARK: OwnSet(
        "2.0", _find_arithmark, _answer_arithmark, parts=lambda row: OPERATORS[row["metadata"]["operator_count"]]
    ),
    DOCUMENTATION: OwnSet(
        documentation.VERSION,
        lambda bench_dir: Found(documentation.rows(), "this installation's documentation"),
        _answer_as_harness,
    ),
}
