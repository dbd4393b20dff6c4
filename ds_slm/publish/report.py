"""`ds-slm report`: one HTML file about some runs, which needs no network.

    RUN/metrics.jsonl, recipe.toml, eval.json, bad-steps/, ... --read--> Story, one a run --page--> HTML

It shows curves against steps, tokens and training time; differences between the recipes; held-out losses and
benchmarks; samples; and incidents. A run may be in progress: whatever its folder holds is shown. Only the manifests of
checkpoints are read: a figure of weights that none of them holds is not the run's.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.errors import ConfigError
from ds_slm.files import printable, read_json
from ds_slm.publish import curves
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.schema import Recipe, changes_result
from ds_slm.run import folder as run_folder
from ds_slm.run import metrics_file, scores

TEMPLATE = "report.html.jinja"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Incident:
    """Something that a reader of the curves should know."""

    step: int
    what: str


@dataclass(frozen=True)
class Story:
    """What one run folder tells."""

    name: str
    recipe: Recipe
    records: Mapping[str, Sequence[Record]]
    """Records by kind, in the order of steps."""
    done: Record
    scores: list[scores.Row]
    incidents: list[Incident]

    @property
    def last_step(self) -> int:
        """The newest step that is recorded."""
        return max((record["step"] for record in self.of("train")), default=0)

    def of(self, kind: str) -> Sequence[Record]:
        """The records of a kind."""
        return self.records.get(kind, [])


def write_page(runs: Sequence[Path]) -> str:
    """The report of some runs, as HTML.

    Raises:
        ConfigError: with every folder that is not a run, or has no trained step.
    """
    problems = [
        f"{run} is not a run folder: it holds no {loading.RECIPE_FILE}."
        for run in runs
        if not (run / loading.RECIPE_FILE).is_file()
    ]
    if problems:
        raise ConfigError(problems)

    stories = [_read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    if empty := [story.name for story in stories if not story.of("train")]:
        raise ConfigError([f"{name} has no record of a step: train it first." for name in empty])
    return _page(stories)


def _names(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's name, or its whole path if two have the same name."""
    short = [printable(run.resolve().name) for run in runs]
    return [name if short.count(name) == 1 else printable(str(run)) for run, name in zip(runs, short, strict=True)]


def _read(run: Path, name: str) -> Story:
    recipe = loading.load_recorded(run)
    records = metrics_file.read(run)
    for kind in ("train", "val"):
        records[kind] = [one for one in records.get(kind, []) if isinstance(one.get("loss"), int | float)]

    found, remarks = scores.newest(run, checkpoint_files.model_sha256s(run), recipe.train.steps)
    rows = scores.rows_of(found, recipe) if found else []
    rows = [replace(row, what=", ".join(dict.fromkeys(filter(None, [row.what, *remarks])))) for row in rows]
    incidents = sorted(_incidents(run, records), key=lambda one: one.step)
    return Story(name, recipe, records, run_folder.finished(run), rows, incidents)


def _incidents(run: Path, records: Mapping[str, Sequence[Record]]) -> Iterator[Incident]:
    """Launches, changes, loss spikes, steps that were refused, and a stop."""
    for record in records.get("launch", []):
        hosts = list(dict.fromkeys(record.get("hosts") or ()))
        where = f"{record.get('world_size')} x {record.get('device')} on {', '.join(hosts)}"
        begins = "resumed" if record["step"] else "started"
        base = f", with the weights of {record['base']}" if record.get("base") and not record["step"] else ""
        yield Incident(
            record["step"], f"{begins} on {where}, {record.get('precision')}, ZeRO-{record.get('zero_stage')}{base}"
        )

    for change in run_folder.changes_by_step(run, records.get("launch", [])):
        changed, skipped = change.get("changes"), change.get("skipped_rows")
        pairs = changed.items() if isinstance(changed, Mapping) else ()
        said = [f"{key}: {' → '.join(map(str, pair))}" for key, pair in pairs if isinstance(pair, list)]
        said += [f"rows left out: {skipped}"] if skipped else []
        if said:
            yield Incident(change["step"], f"launch {change.get('generation')}: {'; '.join(said)}")

    for record in records["train"]:
        if spike := record.get("loss_spike"):
            yield Incident(record["step"], f"loss spike: {record['loss']:.4f}, {spike:.4f} over the median")
    for path in sorted(run.glob("bad-steps/*/*.json")):
        if (what := read_json(path)) and isinstance(what.get("step"), int):
            yield Incident(what["step"], f"refused: {what.get('why')}")
    if (stopped := read_json(run / run_folder.STOPPED)) and isinstance(stopped.get("step"), int):
        yield Incident(stopped["step"], "stopped by a signal")


def _page(stories: Sequence[Story]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("ds_slm.publish", ""), autoescape=True, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        stories=stories,
        charts=curves.charts([(story.name, story.records) for story in stories]),
        axes=curves.AXES,
        facts=[_facts(story) for story in stories],
        differences=_differences(stories),
        tasks=_tasks(stories),
        samples=[_samples(story) for story in stories],
        colours=curves.COLOURS,
    )


def _facts(story: Story) -> dict[str, str]:
    """The facts of a run, for its column in the first table."""
    train, recipe = story.of("train"), story.recipe
    last, steps = train[-1], recipe.train.steps
    seconds = curves.elapsed_s(train)[-1]
    speeds = [value for _, value in curves.series(train, "tokens_per_s")]

    base = next((str(one["base"]) for one in story.of("launch") if one.get("base")), "")
    facts = {
        **({"base": base} if base else {}),
        "parameters": f"{parameters(recipe.model):,}",
        "steps": f"{story.last_step:,} of {steps:,}",
        "tokens" if recipe.sft is None else "target tokens": f"{last.get('tokens') or 0:,}",
        "time of all steps": f"{seconds / 3600:.2f} h",
        "tokens per second (median)": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "last training loss": f"{last['loss']:.4f}",
    }
    if val := story.of("val"):
        facts["last held-out loss"] = f"{val[-1]['loss']:.4f}"
    names = {"val_loss": "loss", "val_perplexity": "perplexity", "val_bits_per_byte": "bits per byte"}
    facts |= {
        f"all held-out rows: {name}": f"{story.done[key]:.4f}"
        for key, name in names.items()
        if curves.is_number(story.done.get(key))
    }
    return facts


def _differences(stories: Sequence[Story]) -> dict[str, list[str]]:
    """The parts of the recipes that differ between runs."""
    first = stories[0].recipe
    compared = [resume_rules.changes(first, story.recipe) for story in stories]
    keys = sorted({key for changed in compared for key in changed if changes_result(key)})
    firsts = {key: was for changed in compared for key, (was, _) in changed.items()}
    return {key: [_shown(changed.get(key, (None, firsts[key]))[1]) for changed in compared] for key in keys}


def _shown(value: Any) -> str:
    """A value of a recipe as text; for sources their names, origins and weights."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        places = [source.get("id") or Path(source.get("path") or "").name for source in value]
        named = [
            " of ".join(filter(None, [source.get("name"), place])) for source, place in zip(value, places, strict=True)
        ]
        return ", ".join(f"{name} ({source.get('weight')})" for name, source in zip(named, value, strict=True))
    return "" if value is None else str(value)


def _tasks(stories: Sequence[Story]) -> dict[str, list[scores.Row | None]]:
    """Each benchmark's figure of each run."""
    by_run = [{f"{row.task}/{row.metric}": row for row in story.scores} for story in stories]
    names = dict.fromkeys(name for rows in by_run for name, row in rows.items() if row.ours is not None)
    return {name: [rows.get(name) for rows in by_run] for name in names}


def _samples(story: Story) -> dict[str, list[tuple[int, str]]]:
    """Each prompt with its continuations by step, the newest first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for record in reversed(story.of("samples")):
        continuations = record.get("continuations")
        for prompt, text in continuations.items() if isinstance(continuations, Mapping) else ():
            found.setdefault(prompt, []).append((record["step"], str(text)))
    return found
