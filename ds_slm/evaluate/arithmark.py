"""ArithMark-2.0: arithmetic with four endings, all items and those of one, two and three operators.

    rows --read--> questions --score--> items, each answered in both of the ways that are published

acc             context and ending encoded apart, the ending with the largest sum of log-probabilities: the benchmark's
                own way.
acc_joint_mean  both encoded together, the ending with the largest mean log-probability of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_slm.errors import DataError
from ds_slm.evaluate.benchmarks import Benchmark, Published, read_json_lines
from ds_slm.evaluate.results import Item, Question
from ds_slm.evaluate.scoring import Counts, Request, Scorer, score
from ds_slm.evaluate.text import TextEncoder

NAME = "arithmark2"
ARITHMARK = Benchmark(
    NAME, "", ("AxiomicLabs/ArithMark-2.0", None), "test",
    ("ctx", "endings", "label", "metadata"), ("arithmark", "arithmark2", "arithmark-2.0"),
    (Published("arithmark*.jsonl", read_json_lines), Published("ArithMark*.jsonl", read_json_lines)),
)  # fmt: skip
OPERATORS = {1: f"{NAME}_1_operator", 2: f"{NAME}_2_operators", 3: f"{NAME}_3_operators"}
"""The name of the items with this many operators."""
VERSION = "2.0"


def questions_of(rows: Sequence[Mapping[str, Any]], place: str | Path) -> list[Question]:
    """The questions of all rows. Raises DataError for a row that is not one of ArithMark's."""
    questions = []
    for number, row in enumerate(rows, 1):
        endings, label, metadata = row["endings"], row["label"], row["metadata"]
        whole = isinstance(endings, list) and endings and isinstance(label, int) and 0 <= label < len(endings)
        if not whole or not isinstance(metadata, Mapping) or metadata.get("operator_count") not in OPERATORS:
            raise DataError(
                f"{place}, row {number}: expected endings, the number of the right one as label, and an operator_count "
                f"of 1 to 3 in metadata; got endings {endings!r}, label {label!r}, metadata {metadata!r}."
            )
        questions.append(Question(tuple((row["ctx"], ending) for ending in endings), label))
    return questions


def answer(
    questions: Sequence[Question], scorer: Scorer, encoder: TextEncoder, report: Callable[[int], None], counts: Counts
) -> list[Item]:
    """Every question answered."""
    apart, joint = [], []
    for question in questions:
        (context_ids,) = encoder.encode([question.requests[0][0]])
        endings = encoder.encode([ending for _, ending in question.requests], add_special_tokens=False)
        apart.append([Request(context_ids, ids) for ids in endings])
        joint.append(encoder.pairs([(context, ending) for context, ending in question.requests]))

    scores = score(scorer, [*apart, *joint], report)
    items = []
    for question, requests, sums, together, tokens in zip(
        questions, apart, scores[: len(apart)], scores[len(apart) :], joint, strict=True
    ):
        counts.add(requests, sums, scorer.max_length)
        totals = [one.log_probability for one in sums]
        means = [one.log_probability / len(pair.continuation_ids) for one, pair in zip(together, tokens, strict=True)]
        values = {
            "acc": float(_first_largest(totals) == question.gold),
            "acc_joint_mean": float(_first_largest(means) == question.gold),
        }
        items.append(Item(question.requests, question.gold, question.gold, tuple(totals), values))
    return items


def by_operators(rows: Sequence[Mapping[str, Any]], items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of one, two and three operators, by the names of these parts."""
    parts: dict[str, list[Item]] = {}
    for row, item in zip(rows, items, strict=False):  # with a limit there are fewer items than rows
        parts.setdefault(OPERATORS[row["metadata"]["operator_count"]], []).append(item)
    return dict(sorted(parts.items()))


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
