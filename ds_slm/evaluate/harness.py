"""lm-evaluation-harness around our scorer: its tasks, prompts, metrics and versions; our log-probabilities.

    the harness's own YAML + rows --task_of--> its task --run--> requests --HarnessModel--> scores --> metrics, samples

Only this module imports lm_eval. The harness does not choose the rows, because its tasks pin no revision of a dataset:
rows are passed in (`benchmarks.py`), and the questions that are scored are hashed (`results.content_sha256`).
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import lm_eval
import lm_eval.api.task
import lm_eval.utils
from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ds_slm.errors import DataError
from ds_slm.evaluate.benchmarks import BENCHMARKS, Benchmark
from ds_slm.evaluate.results import Item, Question
from ds_slm.evaluate.scoring import Counts, Request, Score, Scorer, score
from ds_slm.evaluate.text import TextEncoder
from ds_slm.run.scores import ARITHMARK, DOCUMENTATION

LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""The kinds of tasks that are scored by log-probabilities alone."""
TASKS = Path(lm_eval.__file__).parent / "tasks"
FEWSHOT_SEED = 1234
"""Seed for drawing examples: the harness's own default."""


class HarnessModel(TemplateLM):
    """Shows the harness a scorer and an encoder of text as a model."""

    def __init__(
        self, scorer: Scorer, encoder: TextEncoder, report: Callable[[int], None] = lambda items: None
    ) -> None:
        super().__init__()
        self.scorer, self.encoder, self.report = scorer, encoder, report
        self.counts: dict[str, Counts] = {}
        """The counts of each task."""

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.encoder.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that comes before a text without a context."""
        return self.encoder.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return self.encoder.encode([string], add_special_tokens)[0]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        pairs = self.encoder.pairs([request.args for request in requests])
        items, tasks = [], []
        numbered = groupby(zip(requests, pairs, strict=True), key=lambda one: (one[0].task_name, one[0].doc_id))
        for (task, _), group in numbered:
            items.append([pair for _, pair in group])
            tasks.append(task)

        return [(one.log_probability, one.is_greedy) for item in self._score(tasks, items) for one in item]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context that do not overlap."""
        items = []
        for ids in self.encoder.encode([request.args[0] for request in requests]):
            windows = lm_eval.utils.get_rolling_token_windows(ids, self.prefix_token_id, self.scorer.max_length, 1)
            items.append([Request(*lm_eval.utils.make_disjoint_window(window)) for window in windows])

        scores = self._score([request.task_name for request in requests], items)
        return [sum(one.log_probability for one in item) for item in scores]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        items = [[Request(context_ids, continuation_ids)] for _, context_ids, continuation_ids in requests]
        return [(one.log_probability, one.is_greedy) for (one,) in score(self.scorer, items, self.report)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Raises DataError: text is not generated here, and `task_of` refuses the tasks that need it."""
        raise DataError("tasks that are scored by what a model writes are not among those of ds-slm eval.")

    def _score(self, tasks: Sequence[str], items: Sequence[Sequence[Request]]) -> list[list[Score]]:
        """Score items, and count what was cut, for each task."""
        scores = score(self.scorer, items, self.report)
        for task, item, found in zip(tasks, items, scores, strict=True):
            self.counts.setdefault(task, Counts()).add(item, found, self.scorer.max_length)
        return scores


def task_of(
    config_path: Path, rows: Sequence[Mapping[str, Any]], fewshot_rows: Sequence[Mapping[str, Any]] = ()
) -> Any:
    """One of the harness's tasks over these rows.

    Args:
        config_path: its YAML, relative to the harness's tasks.
        rows: the rows that are scored, in the schema of the task's dataset.
        fewshot_rows: the rows from which its examples are taken, if it has any.

    Raises:
        DataError: it is not scored by log-probabilities, or it cannot be made from these rows.
    """
    config = load_yaml(TASKS / config_path, resolve_func=True)
    name = config.get("task", config_path.stem)
    _refuse_generation(name, config)

    # The rows are one split. If the task has examples, their rows are the other split.
    shots = config.get("num_fewshot") or 0
    for key in ("training_split", "validation_split", "fewshot_split", "tag", "task_alias", "group"):
        config.pop(key, None)
    if not shots:
        config.pop("fewshot_config", None)
    splits = DatasetDict({"test": Dataset.from_list([dict(row) for row in rows])})  # pyright: ignore
    if shots:
        splits["fewshot"] = Dataset.from_list([dict(row) for row in fewshot_rows])
        config["fewshot_split"] = "fewshot"
    config |= {"test_split": "test", "dataset_kwargs": None, "custom_dataset": lambda **_: splits}

    # The harness would change all rows anew whenever it reads them.
    if change_rows := config.get("process_docs"):
        config["process_docs"] = lru_cache(change_rows)

    try:
        with quiet():
            task = ConfigurableTask(config=config)
            task.set_config("num_fewshot", shots)
            return task
    except Exception as error:  # the templates of its tasks raise their own kinds
        raise DataError(
            f"task {name!r} cannot be made from these rows ({type(error).__name__}: {error}): expected the columns of "
            f"{config.get('dataset_path')}, got {', '.join(rows[0])}."
        ) from error


def fewshot_split_of(config_path: Path) -> str | None:
    """The split from which a task's examples are taken; None if its prompts have none."""
    config = load_yaml(TASKS / config_path, resolve_func=False)
    if not config.get("num_fewshot"):
        return None
    return config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")


def _refuse_generation(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("output_type", "generate_until")
    if kind not in LIKELIHOODS:
        raise DataError(
            f"task {name!r} is scored by what a model writes ({kind}): expected one that is scored by "
            f"log-probabilities alone ({', '.join(LIKELIHOODS)})."
        )


def run(tasks: Mapping[str, Any], model: HarnessModel, limit: int | None = None) -> dict[str, list[Item]]:
    """Score tasks, all their requests together.

    Args:
        tasks: made by `task_of`, by name.
        model: scores them.
        limit: only the first items of each are scored.
    """
    with quiet():
        for task in tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        results = evaluate(model, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=True)
        assert results is not None and "samples" in results
        return {name: [_item(tasks[name], sample) for sample in results["samples"][name]] for name in tasks}


def _item(task: Any, sample: Mapping[str, Any]) -> Item:
    requests = tuple(tuple(arguments) for arguments in sample["arguments"])
    answers = [one[0] if isinstance(one[0], tuple) else (one[0], False) for one in sample["resps"]]
    gold, choices = _gold(task, sample["doc"]), len(requests)
    right = gold if isinstance(gold, int) and 0 <= gold < choices else 0 if choices == 1 else None
    values = {name: sample[name] for name in sample["metrics"]}
    return Item(requests, gold, right, tuple(float(one) for one, _ in answers), values)


def _gold(task: Any, doc: Any) -> Any:
    """The right answer of an item: the number of a choice, or a text."""
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def questions_of(task: Any) -> list[Question]:
    """What a task asks of each of its rows, whatever the limit. Raises DataError for a row that it cannot ask."""
    try:
        with quiet():
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(limit=None, rank=0, world_size=1)
    except Exception as error:  # as above
        name = task.config.task
        raise DataError(
            f"a row of task {name!r} is not as the harness expects ({type(error).__name__}: {error})."
        ) from error

    asked = []
    with quiet():
        for _, group in groupby(task.instances, key=lambda instance: instance.doc_id):
            instances = list(group)
            asked.append(Question(tuple(tuple(one.args) for one in instances), _gold(task, instances[0].doc)))
    return asked


def aggregate(task: Any, metric: str, values: Sequence[Any]) -> float:
    """A metric's value by the task's own rule."""
    return float(task.aggregation()[metric](values))


def version_of(task: Any) -> str:
    """The version of a task's prompts and metrics."""
    return str(task.VERSION)


def benchmark_of(name: str) -> Benchmark:
    """Any other task of the harness. Takes seconds, because the harness reads the files of all its tasks.

    Raises:
        DataError: there is no such task (names the nearest one), or it is a group of several.
    """
    index = _index()
    entry = index.get(name)
    if entry is None:
        ours = [*BENCHMARKS, "mmlu", ARITHMARK, DOCUMENTATION, "card", "leaderboard"]
        near = difflib.get_close_matches(name, ours, n=1) or difflib.get_close_matches(name, index, n=1)
        hint = f": did you mean {near[0]}?" if near else "; `lm_eval ls tasks` lists them."
        raise DataError(f"task {name!r} is not one of the harness's{hint}")
    if entry.kind.name == "PY_TASK":
        raise DataError(f"task {name!r} is a program of the harness's, not a description: it cannot be scored here.")
    if entry.yaml_path is None or entry.kind.name != "TASK":
        first = ", ".join(_members(entry)[:3])
        raise DataError(f"task {name!r} is a {entry.kind.name.lower()} of several: name those that you want ({first}).")

    config = load_yaml(entry.yaml_path, resolve_func=False)
    _refuse_generation(name, config)
    path, part = str(config.get("dataset_path")), config.get("dataset_name")
    split = config.get("test_split") or config.get("validation_split") or "test"
    folders = (name.lower(), (str(part) if part else path.rpartition("/")[2]).lower())
    return Benchmark(name, str(entry.yaml_path.relative_to(TASKS)), (path, part), split, (), folders)


@cache
def _index() -> Mapping[str, Any]:
    """The harness's tasks by name."""
    with quiet():
        return TaskManager().task_index


def _members(entry: Any) -> list[str]:
    """The names of the tasks in a group or a tag."""
    listed = sorted(entry.tags) or (entry.cfg or {}).get("task") or []
    return [one if isinstance(one, str) else str(one.get("task") or one.get("group")) for one in listed]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's log lines and progress bars, and with its templates compiled once each."""
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    environment, from_string = lm_eval.utils.env, lm_eval.utils.env.from_string
    bars, tqdm = are_progress_bars_disabled(), lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable

    environment.from_string = lru_cache(from_string)  # pyright: ignore - it compiles a template for every row
    try:
        yield
    finally:
        environment.from_string = from_string
        lm_eval.api.task.tqdm = tqdm
        logger.setLevel(level)
        if not bars:
            enable_progress_bars()
