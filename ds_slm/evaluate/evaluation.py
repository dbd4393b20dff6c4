"""One evaluation: tasks by name, their rows, their items answered, their figures.

names --chosen_tasks--> names --prepare--> tasks: rows, questions, hashes --evaluate--> items, answered --> results
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_slm.errors import ConfigError, DataError, UserError
from ds_slm.evaluate.benchmarks import BENCHMARKS, MMLU, HubUnreachable, find_rows
from ds_slm.evaluate.opening import Opened
from ds_slm.evaluate.own_sets import OPERATORS, OWN_SETS, Answering, questions_of
from ds_slm.evaluate.results import Figure, Item, Question, content_sha256, figures, is_published
from ds_slm.evaluate.scoring import Counts
from ds_slm.evaluate.text import TextEncoder
from ds_slm.recipe.problems import nearest
from ds_slm.recipe.schema import Recipe
from ds_slm.run.scores import ARITHMARK, LEADERBOARD_METRICS

MMLU_NAME = "mmlu"
LEADERBOARD = tuple(LEADERBOARD_METRICS)
ALL_TASKS = (*LEADERBOARD, "winogrande", MMLU_NAME, "sciq", "boolq", "lambada_openai", "wikitext")
NO_HARNESS = "lm-evaluation-harness, whose tasks these are, is not installed: pip install -e '.[eval]'."


@dataclass
class TaskResult:
    """A model's result on one task."""

    name: str
    version: str
    items: int
    of_items: int
    """Number of items of the task."""
    file: str
    sha256: str
    """Hash of all its questions, whatever the limit."""
    published: bool | None
    """Whether they are the published questions; None if their hash is not known."""
    figures: dict[str, Figure]
    counts: Counts

    @property
    def is_limited(self) -> bool:
        """Whether only the first items were scored."""
        return self.items < self.of_items


@dataclass(frozen=True)
class Task:
    """A task that is ready to be answered."""

    name: str
    questions: list[Question]
    file: str
    version: str
    of_harness: Any = None
    rows: Sequence[Mapping[str, Any]] = ()


def chosen_tasks(names: Sequence[str], recipe: Recipe | None) -> list[str]:
    """Tasks by name. `card` stands for tasks of the recipe's published figures, `leaderboard` for the leaderboard's.

    Without a recipe, or without published figures of tasks, `card` is all of `ALL_TASKS`.
    """
    chosen: list[str] = []
    for name in names:
        if name == "card":
            known = (*ALL_TASKS, *BENCHMARKS)
            published = [target.metric.partition("/")[0] for target in recipe.targets] if recipe else []
            published = [ARITHMARK if one in OPERATORS.values() else one for one in published]
            chosen += [one for one in published if one in known] or ALL_TASKS
        elif name == "leaderboard":
            chosen += LEADERBOARD
        else:
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def prepare(names: Sequence[str], bench_dir: Path | None, report: Callable[[str], None]) -> list[Task]:
    """Find the rows of tasks and make their questions.

    Raises:
        DataError: with every task that does not exist, or whose rows are missing or damaged.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    unreached: list[HubUnreachable] = []
    for name in names:
        try:
            for task in _tasks_of(name, bench_dir):
                if any(task.name == one.name for one in tasks):
                    continue  # both a group of tasks and one of its members were named
                report(f"{task.name}: {len(task.questions):,} items of {task.file}")
                tasks.append(task)
        except HubUnreachable as error:
            unreached.append(error)
        except UserError as error:
            problems += error.problems

    if unreached:  # one sentence for all
        datasets = {name: path for one in unreached for name, path in one.datasets.items()}
        problems += HubUnreachable(datasets, unreached[0].reason).problems
    if problems:
        raise DataError(problems)
    return tasks


def _tasks_of(name: str, bench_dir: Path | None) -> Iterable[Task]:
    """A task by its name, or the tasks of a group."""
    if name in OWN_SETS:
        found = OWN_SETS[name].find(bench_dir)
        yield Task(name, questions_of(found), found.place, OWN_SETS[name].version, rows=found.rows)
        return

    harness = _harness(name)
    for benchmark in MMLU if name == MMLU_NAME else [BENCHMARKS.get(name) or harness.benchmark_of(name)]:
        found, config = find_rows(benchmark, bench_dir), Path(benchmark.config)
        examples = harness.fewshot_split_of(config)
        others = replace(benchmark, split=examples, published=()) if examples else None
        task = harness.task_of(config, found.rows, find_rows(others, bench_dir).rows if others else ())
        yield Task(benchmark.name, harness.questions_of(task), found.place, harness.version_of(task), task)


def _harness(*names: str) -> Any:
    """The module that answers these tasks. Raises ConfigError if its library is missing, or a name was mistyped."""
    try:
        from ds_slm.evaluate import harness
    except ImportError as error:
        unknown = [name for name in names if name not in (*ALL_TASKS, *BENCHMARKS)]
        slips = [f"task {name!r} is not built in{nearest(name, OWN_SETS)}." for name in unknown]
        raise ConfigError([*slips, f"{NO_HARNESS} ({error})"]) from error
    return harness


def evaluate(
    opened: Opened, tasks: Sequence[Task], limit: int | None, report: Callable[[int], None]
) -> tuple[list[TaskResult], dict[str, list[Item]]]:
    """Answer tasks.

    Args:
        opened: the model.
        tasks: made by `prepare`.
        limit: only the first items of each are answered.
        report: takes the number of rows that were computed since the last call.

    Returns:
        The results, including parts and groups; and the items of each task.

    Raises:
        DataError: the model gives log-probabilities that are not numbers.
    """
    encoder = TextEncoder(opened.tokenizer)
    counts: dict[str, Counts] = {}
    items: dict[str, list[Item]] = {}

    # Answer the harness's own tasks together, so that batches are fuller.
    if of_harness := {task.name: task.of_harness for task in tasks if task.of_harness is not None}:
        harness = _harness(*of_harness)
        model = harness.HarnessModel(opened.scorer, encoder, report)
        items |= harness.run(of_harness, model, limit)
        counts |= model.counts
    for task in tasks:
        if task.name in OWN_SETS:
            counts[task.name] = Counts()
            answering = Answering(opened.scorer, encoder, report, counts[task.name])
            items[task.name] = OWN_SETS[task.name].answer(answering, task.questions[:limit])

    # A broken model answers every item with the first choice: that is not a score.
    broken = [name for name, answered in items.items() if _is_broken(answered)]
    if broken:
        raise DataError(
            f"{opened.facts['path']} gives log-probabilities that are not finite ({', '.join(broken)}): its weights "
            "are damaged, or its training diverged. `ds-slm verify RUN` names checkpoints that are whole."
        )

    results = []
    for task in tasks:
        results.append(_result(task, items[task.name], counts.get(task.name, Counts())))
        results += _parts(task, items[task.name], results[-1])
    return results + _groups(tasks, items, counts), items


def _is_broken(items: Sequence[Item]) -> bool:
    return any(not abs(one) < float("inf") for item in items for one in item.log_probabilities)


def _result(task: Task, items: Sequence[Item], counts: Counts) -> TaskResult:
    sha256, published = content_sha256(task.questions), is_published(task.name, task.questions)
    aggregate = None if task.of_harness is None else partial(_harness().aggregate, task.of_harness)
    found = figures(items, aggregate)
    total = len(task.questions)
    return TaskResult(task.name, task.version, len(items), total, task.file, sha256, published, found, counts)


def _parts(task: Task, items: Sequence[Item], whole: TaskResult) -> list[TaskResult]:
    """The parts of a set, if it has parts, such as ArithMark by number of operators."""
    part_of = OWN_SETS[task.name].parts if task.name in OWN_SETS else None
    if part_of is None:
        return []

    totals = Counter(map(part_of, task.rows))
    parts: dict[str, list[Item]] = {}
    for row, item in zip(task.rows, items, strict=False):  # with a limit there are fewer items than rows
        parts.setdefault(part_of(row), []).append(item)

    return [
        replace(whole, name=name, items=len(part), of_items=totals[name], figures=figures(part), counts=Counts())
        for name, part in sorted(parts.items())
    ]


def _groups(
    tasks: Sequence[Task], items: Mapping[str, Sequence[Item]], counts: Mapping[str, Counts]
) -> list[TaskResult]:
    """MMLU over all its subjects, weighted by their sizes, if all were asked for."""
    subjects = [task for task in tasks if task.name in {one.name for one in MMLU}]
    if len(subjects) < len(MMLU):
        return []
    together = [item for task in subjects for item in items[task.name]]
    questions = [question for task in subjects for question in task.questions]
    total = sum((counts.get(task.name, Counts()) for task in subjects), Counts())
    whole = Task(MMLU_NAME, questions, str(Path(subjects[0].file).parent), "2")
    return [_result(whole, together, total)]
