"""What eval.json keeps of earlier evaluations, and what the table says of a figure."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ds_slm.errors import DataError
from ds_slm.evaluate import evaluation, record
from ds_slm.evaluate.evaluation import TaskResult
from ds_slm.evaluate.results import Figure, Item
from ds_slm.evaluate.scoring import Counts
from ds_slm.recipe import loading
from ds_slm.run import scores
from ds_slm.run.scores import CONFIDENCE, leaderboard_average, rows_of

CARD = {"hellaswag": 26.53, "arc_easy": 30.47, "arc_challenge": 25.00, "piqa": 50.92, "arithmark2": 24.32}


def result(name: str, value: float, items: int = 10, of_items: int = 10, published: bool | None = None) -> TaskResult:
    """A task's result with one figure."""
    metric = "acc" if name == "arithmark2" else "acc_norm"
    return TaskResult(
        name, "1.0", items, of_items, "a file", "0" * 64, published, {metric: Figure(value, 1.0, 25.0, 26.0)}, Counts()
    )


def found_of(sha256: str, *results: TaskResult) -> dict[str, Any]:
    """What `as_json` gives, as far as it is merged."""
    return {"model": {"sha256": sha256}, "tasks": tasks_of(*results), "leaderboard": None}


def tasks_of(*results: TaskResult) -> dict[str, Any]:
    """The tasks of an eval.json."""
    return {
        one.name: {
            **vars(one),
            "figures": {name: vars(figure) for name, figure in one.figures.items()},
            "counts": {},
            "limited": one.is_limited,
        }
        for one in results
    }


def items_of(value: float) -> list[Item]:
    return [Item((("a", " b"), ("a", " c")), 0, 0, (-1.0, value), {"acc": 1.0})]


def test_the_leaderboards_average() -> None:
    """Oracle: slm-10m's card: (26.53 + (30.47 + 25.00) / 2 + 50.92 + 24.32) / 4 = 32.38."""
    results = [result(name, value) for name, value in CARD.items()]
    assert leaderboard_average(tasks_of(*results)) == pytest.approx(32.38, abs=0.005)
    assert leaderboard_average(tasks_of(*results[:-1])) is None
    assert leaderboard_average(tasks_of(*results[:-1], result("arithmark2", 24.32, items=5))) is None
    assert evaluation.chosen_tasks(["leaderboard", "piqa"], None) == list(CARD)


def test_a_limited_figure_never_takes_a_whole_ones_place(tmp_path: Path) -> None:
    """Oracle: the file after a whole evaluation, a limited one, another whole one."""
    record.store(tmp_path, found_of("a", result("piqa", 1)), {"piqa": items_of(-2.0)})
    record.store(tmp_path, found_of("a", result("piqa", 2, items=5), result("sciq", 3, items=5)),
                 {"piqa": items_of(-3.0), "sciq": items_of(-4.0)})  # fmt: skip
    kept = json.loads((tmp_path / scores.EVAL_FILE).read_text())["tasks"]
    assert {name: task["items"] for name, task in kept.items()} == {"piqa": 10, "sciq": 5}
    assert record.read_items(tmp_path) == {"piqa": items_of(-2.0), "sciq": items_of(-4.0)}

    record.store(tmp_path, found_of("a", result("sciq", 3)), {"sciq": items_of(-5.0)})
    kept = json.loads((tmp_path / scores.EVAL_FILE).read_text())["tasks"]
    assert {name: task["items"] for name, task in kept.items()} == {"piqa": 10, "sciq": 10}
    assert record.read_items(tmp_path) == {"piqa": items_of(-2.0), "sciq": items_of(-5.0)}


def test_another_model_replaces_all(tmp_path: Path) -> None:
    """Oracle: the file after an evaluation of other weights: nothing of the first ones."""
    record.store(tmp_path, found_of("a", result("piqa", 1)), {"piqa": items_of(-2.0)})
    record.store(tmp_path, found_of("b", result("sciq", 2, items=5)), {"sciq": items_of(-3.0)})
    assert list(json.loads((tmp_path / scores.EVAL_FILE).read_text())["tasks"]) == ["sciq"]
    assert record.read_items(tmp_path) == {"sciq": items_of(-3.0)}


WORDS = {
    "within ±": (result("piqa", 50.92 + 1.9, published=True), 50.92),
    "differs by +2.00": (result("piqa", 52.92, published=True), 50.92),
    "differs by -2.00": (result("piqa", 48.92, published=True), 50.92),
    "other rows": (result("piqa", 50.92, published=False), 50.92),
    "first 5": (result("piqa", 50.92, items=5, published=True), 50.92),
    "within ±, rows unchecked": (result("piqa", 50.92), 50.92),
    "differs by +9.00, rows unchecked": (result("piqa", 59.92), 50.92),
}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_the_table(word: str) -> None:
    """Oracle: slm-10m's published 50.92 of PIQA, and 1.96 standard errors of 1 on each side."""
    one, published = WORDS[word]
    figures = {name: vars(figure) for name, figure in one.figures.items()}
    task = {**vars(one), "figures": figures, "limited": one.is_limited}
    (row,) = rows_of({"model": {}, "tasks": {"piqa": task}}, loading.load("slm-10m"))
    assert (row.published, row.plus_minus, row.chance, row.commonest) == (published, CONFIDENCE, 25.0, 26.0)
    assert row.what == word


def test_a_figure_of_another_step_says_so() -> None:
    """Oracle: slm-10m's last step is 47,683; its figures are the finished model's."""
    tasks = tasks_of(result("piqa", 50.92, published=True))
    (row,) = rows_of({"model": {"step": 400}, "tasks": tasks}, loading.load("slm-10m"))
    assert row.what == "within ±, at step 400"
    (row,) = rows_of({"model": {"step": 47_683}, "tasks": tasks}, loading.load("slm-10m"))
    assert row.what == "within ±"


def test_the_average_is_of_what_the_file_holds(tmp_path: Path) -> None:
    """Oracle: by hand; made of two evaluations, made anew with a task, and with the remark of its parts."""
    first, *others = (result(name, value, published=True) for name, value in CARD.items())
    record.store(tmp_path, found_of("a", first), {})
    record.store(tmp_path, found_of("a", *others), {})
    assert json.loads((tmp_path / scores.EVAL_FILE).read_text())["leaderboard"] == pytest.approx(32.38, abs=0.005)

    record.store(tmp_path, found_of("a", result("hellaswag", 26.53 + 40, published=False)), {})
    found = json.loads((tmp_path / scores.EVAL_FILE).read_text())
    assert found["leaderboard"] == pytest.approx(42.38, abs=0.005)
    *_, row = rows_of(found, loading.load("slm-10m"))
    assert row.what == "differs by +10.00, other rows"


def test_texts_may_hold_any_end_of_a_line(tmp_path: Path) -> None:
    """Oracle: what was stored; MMLU's rows hold U+0085, others U+2028."""
    odd = [Item((("a\u0085b\u2028c\u2029d\r\n", " b"), ("a", " c")), 0, 0, (-1.0, -2.0), {"acc": 1.0})]
    record.store(tmp_path, found_of("a", result("piqa", 1)), {"piqa": odd})
    record.store(tmp_path, found_of("a", result("sciq", 1)), {"sciq": items_of(-3.0)})
    assert record.read_items(tmp_path) == {"piqa": odd, "sciq": items_of(-3.0)}


OTHERS = '{"model": {}, "tasks": {"x": {"items": 1, "limited": false, "published": null, "figures": %s}}}'
"""A record whose figures are not ours."""


@pytest.mark.parametrize(
    "content",
    [
        *('{"model": "gpt2"}', '{"model": {}, "tasks": {"x": {}}}', "[]", "{"),
        *(OTHERS % figures for figures in ("[]", '{"acc": 0.5}', '{"acc": {"value": 0.5}}')),
        OTHERS % '{"acc": {"value": null, "stderr": null, "chance": null, "commonest": null}}',
    ],
)
def test_a_file_of_others_is_not_read_and_not_lost(tmp_path: Path, content: str) -> None:
    """Oracle: the sentence, and the file as it was."""
    (tmp_path / scores.EVAL_FILE).write_text(content)
    with pytest.raises(DataError, match="move it away"):
        scores.read(tmp_path)
    assert (tmp_path / scores.EVAL_FILE).read_text() == content


@pytest.mark.parametrize("line", ["{", "[]", "{}", '"task"'])
def test_items_of_others_are_refused_before_a_model_is_scored(line: str, tmp_path: Path) -> None:
    """Oracle: the sentence; `store` merges what is there, so it would come once all is scored."""
    record.store(tmp_path, found_of("a", result("piqa", 1)), {"piqa": items_of(-2.0)})
    record.refuse_damaged(tmp_path)
    (tmp_path / record.ITEMS_FILE).write_bytes(gzip.compress(f"{line}\n".encode()))
    with pytest.raises(DataError, match="delete it, and score the model again"):
        record.refuse_damaged(tmp_path)
