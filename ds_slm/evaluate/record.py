"""The files of an evaluation: eval.json, and every item in eval-items.jsonl.gz.

results, items --as_json, store--> FOLDER/eval.json (merged with earlier scores of the same model), items
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_slm.errors import DataError
from ds_slm.evaluate.evaluation import MMLU_NAME, TaskResult
from ds_slm.evaluate.opening import Opened
from ds_slm.evaluate.results import Item
from ds_slm.evaluate.text import TextEncoder
from ds_slm.files import replace_bytes, replace_text
from ds_slm.run.scores import EVAL_FILE, leaderboard_average, merge_tasks, read

ITEMS_FILE = "eval-items.jsonl.gz"


def as_json(opened: Opened, results: Sequence[TaskResult], limit: int | None, seconds: float) -> dict[str, Any]:
    """The content of eval.json for one evaluation that took `seconds`."""
    encoder = TextEncoder(opened.tokenizer)
    tokens = sum(result.counts.tokens for result in results if result.name != MMLU_NAME)
    try:
        harness = version("lm-eval")
    except PackageNotFoundError:
        harness = None

    found = {
        "model": opened.facts,
        "lm_eval": harness,
        "settings": {
            "prefix_id": encoder.prefix_id,
            "adds_special_tokens": encoder.adds_special_tokens,
            "max_length": opened.scorer.max_length,
            "limit": limit,
            "device": str(opened.scorer.device),
            "devices": opened.scorer.at_a_time,
        },
        "tasks": {result.name: {**asdict(result), "limited": result.is_limited} for result in results},
        "leaderboard": None,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
    found["leaderboard"] = leaderboard_average(found["tasks"])
    return found


def refuse_damaged(folder: Path) -> None:
    """Raise DataError if `store` could not use what an earlier evaluation left; call this before scoring."""
    read(folder)
    _lines(folder / ITEMS_FILE)


def store(folder: Path, found: dict[str, Any], items: Mapping[str, Sequence[Item]]) -> None:
    """Write eval.json and the items. Earlier scores of the same model stay, except those of tasks scored again."""
    before = read(folder)
    same = before.get("model", {}).get("sha256") == found["model"]["sha256"]
    merged = {**found, "tasks": merge_tasks(before.get("tasks", {}) if same else {}, found["tasks"])}
    merged["leaderboard"] = leaderboard_average(merged["tasks"])
    new = {name for name, task in found["tasks"].items() if merged["tasks"][name] is task}

    lines = [line for line in _lines(folder / ITEMS_FILE) if json.loads(line)["task"] not in new] if same else []
    for name, answered in items.items():
        if name in new:
            lines += [json.dumps({"task": name, **item._asdict()}, ensure_ascii=False) for item in answered]

    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(folder / ITEMS_FILE, gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    replace_text(folder / EVAL_FILE, json.dumps(merged, indent=2) + "\n")


def read_items(folder: Path) -> dict[str, list[Item]]:
    """The items of each task on which a model was scored. Raises DataError if there are none."""
    path = folder / ITEMS_FILE
    if not path.is_file():
        raise DataError(f"{folder} has no {ITEMS_FILE}: score it first, ds-slm eval {folder}.")

    found: dict[str, list[Item]] = {}
    for line in _lines(path):
        fields = json.loads(line)
        requests = tuple(tuple(one) for one in fields["requests"])
        scores = tuple(fields["log_probabilities"])
        item = Item(requests, fields["gold"], fields["right"], scores, fields["values"])
        found.setdefault(fields["task"], []).append(item)

    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]  # texts may hold other line ends
        for line in lines:
            json.loads(line)["task"]
        return lines
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error!r}): delete it, and score the model again.") from error
