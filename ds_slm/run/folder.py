"""A run's folder: who may continue it, and what it says of itself.

Every launch has an id and a generation number, one more than the last. Both are in env.json (launches.py), with the
versions, the hosts and every effective choice.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, load_tokenizer
from ds_slm.errors import CheckpointError, ConfigError, DataError, RecipeError
from ds_slm.files import (
    fsync,
    new_folder,
    obstacle,
    read_json,
    read_json_lines,
    refuse_unwritable,
    replace_bytes,
    replace_text,
    write_json,
)
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.loading import RECIPE_FILE
from ds_slm.recipe.schema import Recipe
from ds_slm.run import metrics_file, software
from ds_slm.run.metrics_file import METRICS

STOPPED = "stopped.json"
"""The file that a run leaves if a signal ended it, with its step and generation; the next launch removes it."""
SAVED = "saved.json"
"""The newest step that was saved, and the hosts that hold it: on every host, also on hosts that keep no checkpoints."""
FOLDERS, FILES = (
    ("checkpoints", "logs", "tb"),
    ("env.json", "ds_config.json", METRICS, "changes.jsonl", "done.json", STOPPED, SAVED),
)
"""The names of the folders and files that a launch writes."""


LEFTOVERS = re.compile(r"logs|tokenizer|changes\.jsonl|\.host-.+|\.tokenizer\.tmp|\..+\.tmp-.+")
"""What a launch leaves if it was killed before it wrote recipe.toml. Older versions wrote the tokenizer before that."""


def refuse_foreign(run: Path, recipe: Recipe, resume: str, allow_change: bool) -> None:
    """Raise CheckpointError if this launch may not write into the folder.

    Args:
        run: the run folder, which need not exist.
        recipe: what is to be trained.
        resume: 'never' refuses any folder that is not empty.
        allow_change: permit the changes that need permission.
    """
    if in_the_way := obstacle(run):
        raise CheckpointError(f"--run-dir {in_the_way}")
    if not run.exists() or all(LEFTOVERS.fullmatch(path.name) for path in run.iterdir()):
        return

    # The folder is not empty: only a run folder may be continued.
    if resume == "never":
        raise CheckpointError(
            f"--run-dir {run} is not empty, and --resume never may not touch it: name another folder."
        )
    if not (run / RECIPE_FILE).is_file():
        raise CheckpointError(f"--run-dir {run} is not empty and holds no recipe.toml: not a run folder; name another.")

    # The run's recipe must be the same, except for changes that are permitted.
    try:
        old = loading.load_recorded(run)
    except RecipeError as error:
        _refuse_unless_trained_with(run, recipe, error)
        return
    refused = resume_rules.refused_changes(old, recipe, allow_change)
    if refused:
        raise CheckpointError(
            [f"--run-dir {run} holds a run of another recipe:", *refused, "Name another --run-dir, or undo the change."]
        )


def refuse_own_base(run: Path, base: Path) -> None:
    """Raise ConfigError if the base model is a checkpoint of the run that is trained."""
    if base.resolve().is_relative_to(run.resolve()):
        raise ConfigError(
            f"--base {base} lies in --run-dir {run}, which this launch trains: name another --run-dir to begin a new "
            "run with it, or leave out --base to go on with that run."
        )


def _refuse_unless_trained_with(run: Path, recipe: Recipe, damage: RecipeError) -> None:
    """Check a folder whose recipe.toml is damaged: its other files hold the hash of the recipe it was trained with."""
    newest_first = sorted(run.glob("checkpoints/step-*/state.json"), reverse=True)
    kept = (read_json(path) for path in (*newest_first, run / "done.json", run / "env.json"))
    trained_with = next((found["recipe_sha256"] for found in kept if found and "recipe_sha256" in found), None)
    if trained_with not in (None, recipe.identity_sha256()):
        raise CheckpointError(
            [
                f"--run-dir {run}:",
                *damage.problems,
                f"This launch has the recipe {recipe.identity_sha256()}, the run was trained with {trained_with}.",
            ]
        )


def refuse_unusable(run: Path) -> None:
    """Raise if a launch could not write: something is in the way of its files, or a disk refuses. Changes nothing.

    Raises:
        CheckpointError: for each name that is not what it must be, such as a link to nothing.
        OSError: the run folder, or its checkpoints folder, cannot be written to.
    """
    in_the_way = [path for path in (run / name for name in FOLDERS) if os.path.lexists(path) and not path.is_dir()]
    problems = [
        f"{path} is {'a file' if path.exists() else 'a link to nothing'}, expected a folder: mend or remove it."
        for path in in_the_way
    ]
    folders = [path for path in (run / name for name in FILES) if path.is_dir()]
    problems += [f"{path} is a folder, expected a file: move it away." for path in folders]
    if problems:
        raise CheckpointError(problems)
    for folder in (run, run / "checkpoints"):
        refuse_unwritable(folder)


def finished(run: Path) -> dict[str, Any]:
    """What the run left when it was finished: its step, losses and hashes; empty if it is not finished.

    A damaged done.json counts as missing: the run's end, its last evaluation, is then done again.
    """
    done = read_json(run / "done.json") or {}
    return done if isinstance(done.get("step"), int) else {}


def tell_stopped(run: Path, step: int) -> None:
    """Record that a signal ended the run, with a whole checkpoint of this step."""
    write_json(run / STOPPED, {"step": step, "generation": generation(run)})


def tell_saved(run: Path, step: int, held_by: Sequence[str]) -> None:
    """Record that a checkpoint of this step is whole on some hosts' disks."""
    write_json(run / SAVED, {"step": step, "held_by": list(held_by)})


def newest_saved(run: Path) -> tuple[int, list[str]]:
    """The newest step that was saved, by a folder's records, and the hosts that held it; 0 if none was.

    Older versions left no saved.json. There a save counts if another save followed, because then it was finished.
    """
    saved = read_json(run / SAVED)
    signs = [sign for sign in (saved, read_json(run / "done.json"), read_json(run / STOPPED)) if sign]
    found = {sign["step"]: sign.get("held_by") for sign in signs if isinstance(sign.get("step"), int)}
    if saved is None:
        found |= dict.fromkeys(_recorded_saves(run)[:-1])
    step = max(found, default=0)
    hosts = found.get(step)
    return step, [str(host) for host in hosts] if isinstance(hosts, list) else []


def _recorded_saves(run: Path) -> list[int]:
    """The steps whose saves had begun, by metrics.jsonl, in ascending order."""
    return sorted({record["step"] for record in metrics_file.read(run).get("save", [])})


def keep_records(run: Path, generation: int) -> Path | None:
    """Keep a copy of metrics.jsonl, because this launch takes its later steps again; None if there is none."""
    records, kept = run / METRICS, run / f"metrics.before-generation-{generation}.jsonl"
    if not records.is_file():
        return None
    replace_bytes(kept, records.read_bytes())
    return kept


def generation(run: Path) -> int:
    """Number of launches that wrote into this folder.

    If env.json does not say it: the greatest number in changes.jsonl or stopped.json. Checkpoints do not hold it, so
    that an interrupted run and one that was not interrupted write the same bytes.
    """
    recorded = (read_json(run / "env.json") or {}).get("generation")
    return recorded if isinstance(recorded, int) else generation_elsewhere(run)


def generation_elsewhere(run: Path) -> int:
    """The last launch that changes.jsonl or stopped.json names; 0 if there is none."""
    known = [*read_changes(run), read_json(run / STOPPED)]
    numbers = [found["generation"] for found in known if found and isinstance(found.get("generation"), int)]
    return max(numbers, default=0)


def describe(run: Path, recipe: Recipe, deepspeed: dict[str, Any], facts: dict[str, Any], tokenizer: Path) -> list[str]:
    """Write recipe.toml, ds_config.json, env.json, saved.json and tokenizer/; changes of the recipe are recorded.

    recipe.toml comes first, because it marks a folder as a run folder: a kill after any of these writes leaves a folder
    that the same command accepts. The done.json of a run that now goes on longer is removed: it is the sign of success.

    Returns:
        A line for each thing that was damaged and is mended.
    """
    run.mkdir(parents=True, exist_ok=True)
    notes = []
    for sign in ("done.json", STOPPED):
        (run / sign).unlink(missing_ok=True)

    # What this launch changes is recorded before the old recipe is replaced.
    recorded = run / RECIPE_FILE
    old = None
    if recorded.is_file():
        try:
            old = loading.load_recorded(run)
        except RecipeError:
            notes.append(f"{recorded} was damaged: it is written anew, by the same recipe")
    changed = {place: list(pair) for place, pair in resume_rules.changes(old, recipe).items()} if old else {}
    if changed:
        record_change(run, facts, {"changes": changed})
    replace_text(recorded, loading.to_toml(recipe))
    if facts.get("skip_rows"):
        record_change(run, facts, {"skipped_rows": facts["skip_rows"]})

    notes += mend_tokenizer(run, tokenizer)
    if read_json(run / SAVED) is None:
        tell_saved(run, facts.get("begins_at_step", 0), [])
    write_json(run / "ds_config.json", deepspeed)
    write_json(run / "env.json", {**facts, **software.describe()})
    return notes


def mend_tokenizer(run: Path, prepared: Path) -> list[str]:
    """Give a run the tokenizer of its prepared data if it has none, or a damaged one.

    The caller has made sure that the run was trained with these data. The damaged one is kept in tokenizer.damaged/.

    Returns:
        Lines for the user.
    """
    mine = run / "tokenizer"
    problem = _tokenizer_problem(mine, prepared)
    if problem is None:
        return []

    # The copy is whole on the disk before it gets its name.
    temporary = run / ".tokenizer.tmp"
    new_folder(temporary)
    shutil.copytree(prepared, temporary, dirs_exist_ok=True)
    for path in (*temporary.iterdir(), temporary):
        fsync(path)

    if os.path.lexists(mine):
        aside = run / "tokenizer.damaged"
        new_folder(aside)
        aside.rmdir()
        mine.rename(aside)
    temporary.rename(mine)
    fsync(run)

    # A new run, without a checkpoint, has no tokenizer yet: no line is needed.
    begun = any(run.glob("checkpoints/step-*"))
    return [f"{mine} {problem}: it is copied anew from {prepared}"] if begun else []


def _tokenizer_problem(mine: Path, prepared: Path) -> str | None:
    """What is wrong with a run's tokenizer; None if it is the tokenizer of the prepared data."""
    if not mine.is_dir():
        return "is missing"
    try:
        found, expected = load_tokenizer(mine), load_tokenizer(prepared)
    except DataError:
        return "is damaged"
    if (found.sha256, found.eos_id, found.pad_id) != (expected.sha256, expected.eos_id, expected.pad_id):
        return "is not the one of the data"
    if (prepared / CHAT_TEMPLATE_FILE).is_file() and not (mine / CHAT_TEMPLATE_FILE).is_file():
        return f"lacks its {CHAT_TEMPLATE_FILE}"
    return None


def read_changes(run: Path) -> list[dict[str, Any]]:
    """The lines of changes.jsonl; damaged ones, and those without a generation, are passed over."""
    return [one for one in read_json_lines(run / "changes.jsonl") if isinstance(one.get("generation"), int)]


def changes_by_step(run: Path, launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, each with the step after which its launch begins; if an older version left it out, from its record.

    If neither says it, the step is 0.
    """
    begins = {record.get("generation"): record["step"] for record in launches}
    return [{"step": begins.get(one["generation"], 0), **one} for one in read_changes(run)]


def record_change(run: Path, facts: Mapping[str, Any], what: dict[str, Any]) -> None:
    """Add a line to changes.jsonl: what a launch with these facts does differently from the launches before it."""
    path = run / "changes.jsonl"
    before = path.read_bytes() if path.is_file() else b""
    launch = {"generation": facts["generation"], "step": facts.get("begins_at_step", 0)}
    if before and not before.endswith(b"\n"):  # a line that was cut stays a separate line
        before += b"\n"
    replace_bytes(path, before + json.dumps({**launch, **what}).encode() + b"\n")


def merge_changes(run: Path, everyones: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Give changes.jsonl the lines of all hosts, in the order of launches.

    If several hosts describe the same launch, the first one counts: a host that was away compares with an old recipe.
    """
    first: dict[tuple[int, str], dict[str, Any]] = {}
    for change in (change for changes in everyones for change in changes):
        first.setdefault((change["generation"], ",".join(sorted(change))), change)
    merged = sorted(first.values(), key=lambda change: change["generation"])
    if merged != read_changes(run):
        replace_text(run / "changes.jsonl", "".join(f"{json.dumps(change)}\n" for change in merged))
