"""`ds-slm init`: survey the text, write a recipe of a dozen lines, print the next commands."""

import contextlib
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ds_slm.cli.output import print_json, report_to
from ds_slm.data.sources.documents import locate
from ds_slm.data.sources.readers import ColumnError, SourceError, is_unicode
from ds_slm.data.sources.splits import ALL, are_titles
from ds_slm.data.survey import survey
from ds_slm.errors import ConfigError, DataError, RecipeError
from ds_slm.files import obstacle, printable, replace_text
from ds_slm.recipe import loading, own_text
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.loading import RECIPE_FILE
from ds_slm.recipe.own_text import ENOUGH_TOKENS_PER_PARAMETER, Fit, Text, TooLittleText
from ds_slm.recipe.schema import Recipe

MUCH_HELD_OUT = 0.2
"""Share of held-out text above which a warning is printed."""
TO_READ_THEM = "name them for one, move them, or write split = 'all' into the recipe's [[data.source]]"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def run(name: str, base_name: str, text: Path, tokens: int | None, column: str, as_json: bool) -> None:
    """Write NAME.toml from a recipe, or from a run folder, whose model is then trained further.

    Raises UserError if the name is taken, the base fine-tunes, or the text is not suitable.
    """
    report = report_to(as_json)
    name = name.removesuffix(".toml")
    out = Path(f"{name}.toml")
    run_folder = Path(base_name) if (Path(base_name) / RECIPE_FILE).is_file() else None
    if run_folder:
        base_name = str(run_folder / RECIPE_FILE)
    base = loading.load(base_name)
    if run_folder:
        base = own_text.with_tokenizer_of(run_folder, base)
    _refuse(name, out, base_name, base, text, column)
    _refuse_own_run(name, run_folder)

    source = Source.model_validate({"name": "text", "kind": "files", "path": str(text), "column": column})
    found, chosen = _survey(source, base_name, base, tokens, report)
    replace_text(out, own_text.as_toml(name, base_name, base, found, chosen, run_folder))
    try:
        loading.load(str(out))
    except RecipeError:
        out.unlink()
        raise

    if as_json:
        print_json({"recipe": str(out), **asdict(found), "train_tokens": found.train_tokens, **asdict(chosen)})
        return
    print(f"{text}: {found}")
    print(_held_out(found))
    print(f"{out}: {chosen.steps:,} steps of {chosen.rows} rows, {chosen.tokens_per_parameter:.1f} tokens a parameter")
    if chosen.tokens_per_parameter < ENOUGH_TOKENS_PER_PARAMETER and not run_folder:
        print(f"warning: {ENOUGH_TOKENS_PER_PARAMETER} tokens a parameter are usual. {own_text.what_fits(found)}")
    if chosen.epochs > own_text.EPOCHS:
        print(f"warning: the text is read {chosen.epochs:.1f} times; beyond {own_text.EPOCHS} little more is learned")
    print("now:")
    print(f"  ds-slm plan {out}")
    print(f"  ds-slm train {out} --devices N" + (f" --base {shlex.quote(str(run_folder))}" if run_folder else ""))
    print(f"  ds-slm export runs/{name} --out exports/{name}")


def _survey(
    source: Source, base_name: str, base: Recipe, tokens: int | None, report: Callable[[str], None]
) -> tuple[Text, Fit]:
    """What the text holds, and the run that fits it. Raises UserError, whose ways out name this command's flags."""
    try:
        everything = locate(source.model_copy(update={"split": ALL}))
        if are_titles([path.relative_to(everything.root) for path in everything.files]):
            source, place = source.model_copy(update={"split": ALL}), everything
        else:
            place = locate(source)
        report(f"{source.path}: {'reading all of it' if place.is_one_file else place.tell(source.split)}")
        if place.beside:
            report(f"warning: {len(place.beside):,} files are named for no split, and left out: {TO_READ_THEM}")
        found = survey(source, base)
    except ColumnError as error:
        raise DataError(f"{error.problem}; name one of them with --column.") from error
    except SourceError as error:
        raise DataError(f"{error.problem}; name another file or folder with --text.") from error

    try:
        return found, own_text.fit(base, found, tokens)
    except TooLittleText as error:
        raise DataError([*error.problems, _who_takes(source, base_name)]) from error


def _who_takes(source: Source, refused: str) -> str:
    """A sentence on the smallest other recipe that takes this little text; it is surveyed and fitted to be sure."""
    recipes = {name: recipe for name in loading.library_names() if not (recipe := loading.load(name)).sft}
    for name in sorted(recipes, key=lambda name: parameters(recipes[name].model)):
        with contextlib.suppress(TooLittleText):
            if name != refused:
                chosen = own_text.fit(recipes[name], survey(source, recipes[name]))
                return (
                    f"--from {name} takes it: {chosen.steps:,} steps, {chosen.tokens_per_parameter:.1f} tokens a "
                    f"parameter ({ENOUGH_TOKENS_PER_PARAMETER} are usual)."
                )
    return "No recipe of the library takes so little: add text."


def _held_out(found: Text) -> str:
    """A line on the text on which losses are measured; a warning if it is much of all text."""
    share = f"{found.held_out_share:.1%}"
    if not found.held_out_documents:
        return f"held out: the last {share} of the only document; text in more files is held out in whole documents"
    line = f"held out: {found.held_out_documents:,} of {found.documents:,} documents, {share} of the text"
    if found.held_out_share > MUCH_HELD_OUT:
        return f"warning: {line}, which nothing is trained on: cut the text into more files to hold out less"
    return line


def _refuse(name: str, out: Path, base_name: str, base: Recipe, text: Path, column: str) -> None:
    problems = []
    if not NAME.fullmatch(name):
        problems.append(f"NAME = {name!r}: expected small letters, digits, '.', '_' and '-', for a file and a folder.")
    if name in loading.library_names():
        problems.append(f"NAME = {name!r} is a recipe of the library: choose another.")
    if out.exists():
        problems.append(f"{out} exists already: choose another name, or delete it.")
    elif in_the_way := obstacle(out):
        problems.append(in_the_way)

    if base.sft is not None:
        problems.append(f"--from {base_name} fine-tunes a base: name a recipe that pretrains, such as demo.")
    for what, given in {"--text": str(text), "--from": base_name, "--column": column}.items():
        if not is_unicode(given):
            problems.append(f"{what} {printable(given)}: the name is not UTF-8, as a recipe must be: rename it.")
    if not text.exists():
        problems.append(f"--text {text} does not exist: name a file of text, or a folder of them.")
    if problems:
        raise ConfigError(problems)


def _refuse_own_run(name: str, run_folder: Path | None) -> None:
    """Raise ConfigError if the new recipe's run would be the run whose model it begins with."""
    if run_folder and (Path("runs") / name).resolve() == run_folder.resolve():
        raise ConfigError(f"NAME = {name!r}: its run folder would be {run_folder}, which --from names: choose another.")
