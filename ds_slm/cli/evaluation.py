"""`ds-slm eval`: the model opened, its tasks answered, the table printed, eval.json written beside the model."""

import sys
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ds_slm.cli import tables
from ds_slm.cli.output import print_json, report_to
from ds_slm.evaluate import evaluation, record
from ds_slm.evaluate.opening import open_scorer
from ds_slm.evaluate.table import rows_of
from ds_slm.recipe import schema


def run(
    model: Path, tasks: str, bench_dir: Path | None, limit: int | None, recipe_name: str | None, as_json: bool
) -> None:
    """Evaluate a model. Raises UserError with all that keeps it from being scored, before anything is."""
    begun_s = time.monotonic()
    report = report_to(as_json)
    opened = open_scorer(model)

    recipe = schema.load(recipe_name) if recipe_name else None
    if recipe is None and (opened.folder / "recipe.toml").is_file():
        recipe = schema.load_recorded(opened.folder)

    names = evaluation.chosen_tasks([name.strip() for name in tasks.split(",") if name.strip()], recipe)
    prepared = evaluation.prepare(names, bench_dir, report)

    with Progress(
        TextColumn("scoring"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeRemainingColumn(),
        disable=as_json or not sys.stderr.isatty(),
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=None)
        results, items = evaluation.evaluate(opened, prepared, limit, lambda rows: progress.advance(bar, rows))

    found = record.as_json(opened, results, limit, time.monotonic() - begun_s)
    record.store(opened.folder, found, items)

    if as_json:
        print_json(found)
        return
    for line in _remarks(results):
        report(line)
    tables.show_evaluation(rows_of(found, recipe))
    report(f"written: {opened.folder / record.EVAL_FILE}, {record.ITEMS_FILE}; {found['seconds']:.0f} s")


def _remarks(results: list[evaluation.TaskResult]) -> list[str]:
    """What was cut to fit the model's context."""
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
