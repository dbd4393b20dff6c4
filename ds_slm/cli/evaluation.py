"""`ds-slm eval`: open the model, answer the tasks, print the table, write eval.json beside the model."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from ds_slm.cli import tables
from ds_slm.cli.output import print_json, report_to
from ds_slm.data.sources.readers import is_unicode
from ds_slm.errors import ConfigError, DataError
from ds_slm.evaluate import comparison, evaluation, ranking, record
from ds_slm.evaluate.on_devices import opened_on
from ds_slm.evaluate.opening import Opened, open_scorer
from ds_slm.evaluate.results import Item
from ds_slm.files import refuse_unwritable
from ds_slm.recipe import loading
from ds_slm.run.scores import EVAL_FILE, rows_of


@dataclass(frozen=True)
class Flags:
    """The flags of `ds-slm eval`, except the model."""

    tasks: str
    bench_dir: Path | None
    limit: int | None
    recipe: str | None
    against: Path | None
    devices: int
    as_json: bool


def run(model: Path, flags: Flags) -> None:
    """Evaluate a model. Raises UserError before scoring, with every reason why it cannot be scored."""
    report = report_to(flags.as_json)
    paths = [path for path in (model, flags.against) if path]
    with opened_on(flags.devices, paths) as (opened, *others):
        for one in (opened, *others):
            record.refuse_damaged(one.folder)
            refuse_unwritable(one.run or one.folder)

        recipe = loading.load(flags.recipe) if flags.recipe else None
        if recipe is None and opened.run:
            recipe = loading.load_recorded(opened.run)

        names = evaluation.chosen_tasks([name.strip() for name in flags.tasks.split(",") if name.strip()], recipe)
        if not names:
            raise ConfigError("--tasks names none: expected card, leaderboard, or names with commas between them.")
        tasks = evaluation.prepare(names, flags.bench_dir, report)
        found, items = _score(opened, tasks, flags, report)
        differences = [
            one for other in others for one in comparison.compare(items, _score(other, tasks, flags, report)[1])
        ]

    if flags.as_json:
        print_json({**found, "against": [asdict(one) for one in differences]} if differences else found)
        return
    tables.show_evaluation(rows_of(found, recipe))
    if differences:
        print(f"\n{model} less {flags.against}, on the same items:")
        tables.show_differences(differences)


def _score(
    opened: Opened, tasks: list[evaluation.Task], flags: Flags, report: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, list[Item]]]:
    """Answer the tasks, store the results beside the model, and print what was cut and where results are."""
    begun_s = time.monotonic()
    with Progress(
        TextColumn("scoring"), BarColumn(), TextColumn("{task.completed:,} rows"),
        disable=flags.as_json or not sys.stdout.isatty(), transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=None)
        results, items = evaluation.evaluate(opened, tasks, flags.limit, lambda rows: progress.advance(bar, rows))

    found = record.as_json(opened, results, flags.limit, time.monotonic() - begun_s)
    record.store(opened.folder, found, items)
    for line in _remarks(results):
        report(line)
    report(f"{opened.folder / EVAL_FILE}: {found['seconds']:.1f} s, {found['tokens_per_s']:,.0f} tokens/s")
    return found, items


def _remarks(results: list[evaluation.TaskResult]) -> list[str]:
    """Lines on what was cut to fit the model's context."""
    lines = []
    for result in results:
        if count := result.counts.cut_contexts:
            lines.append(
                f"{result.name}: {count:,} contexts are longer than the model's: their oldest tokens are left out"
            )
        if count := result.counts.cut_continuations:
            lines.append(
                f"{result.name}: {count:,} choices are longer than the model's context: only their newest tokens are "
                "scored"
            )
    return lines


def rank(model: Path, texts: list[str], file: Path | None, by_mean: bool, as_json: bool) -> None:
    """`ds-slm rank`: the choices of one context, or of each line of a file, the likeliest first."""
    if file is not None and texts:
        raise ConfigError("--file holds contexts and choices already: leave them out of the command.")
    if file is None and len(texts) < 3:
        raise ConfigError("name a context and at least two choices, or a file of them: --file FILE.jsonl.")
    if not all(map(is_unicode, texts)):
        raise ConfigError("a context or choice holds bytes that are not UTF-8: expected text.")
    questions = [(texts[0], texts[1:])] if file is None else _questions_of(file)

    ranked = ranking.rank(open_scorer(model), questions, by_mean)
    if as_json:
        lines = [
            {"context": context, "choices": [asdict(one) for one in choices]}
            for (context, _), choices in zip(questions, ranked, strict=True)
        ]
        print_json({"ranked": lines})
        return
    for (context, _), choices in zip(questions, ranked, strict=True):
        tables.show_ranking(context, choices)


def _questions_of(file: Path) -> list[tuple[str, list[str]]]:
    """A context and its choices from each line of a JSON-lines file. Raises DataError with every line without them."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error}): save it as such.") from error

    questions, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context, choices = row["context"], row["choices"]
            texts = [context, *choices] if isinstance(choices, list) else []
            if len(texts) < 3 or not all(isinstance(one, str) and is_unicode(one) for one in texts):
                raise ValueError("the choices are not a list of two texts or more")
            questions.append((context, choices))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(
                f'{file}, line {number}: {error!r}: expected {{"context": "...", "choices": ["...", "..."]}}.'
            )

    if problems or not questions:
        raise DataError(problems or f"{file} holds no line.")
    return questions
