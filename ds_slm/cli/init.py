"""`ds-slm init`: the text surveyed, a recipe of a dozen lines written, the commands that follow said."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

from ds_slm.cli.output import print_json, report_to
from ds_slm.data.sources.readers import is_unicode
from ds_slm.data.survey import survey
from ds_slm.errors import ConfigError, RecipeError
from ds_slm.files import obstacle, printable, replace_text
from ds_slm.recipe import own_text, schema
from ds_slm.recipe.own_text import ENOUGH_TOKENS_PER_PARAMETER
from ds_slm.recipe.schema import RECIPE_FILE, Source

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def run(name: str, base_name: str, text: Path, tokens: int | None, column: str, as_json: bool) -> None:
    """Write NAME.toml, from a recipe or, with the words of a run folder, for its model to be trained further.

    Raises UserError where the name is taken, the base fine-tunes, or the text does not do.
    """
    report = report_to(as_json)
    out = Path(f"{name}.toml")
    run_folder = Path(base_name) if (Path(base_name) / RECIPE_FILE).is_file() else None
    if run_folder:
        base_name = str(run_folder / RECIPE_FILE)
    base = schema.load(base_name)
    if run_folder:
        base = own_text.with_tokenizer_of(run_folder, base)
    _refuse(name, out, base_name, base, text, column)
    _refuse_own_run(name, run_folder)

    source = Source.model_validate({"name": "text", "kind": "files", "path": str(text), "column": column})
    report(f"{text}: reading all of it")
    found = survey(source, base)
    chosen = own_text.fit(base, found, tokens)
    replace_text(out, own_text.as_toml(name, base_name, base, found, chosen, run_folder))
    try:
        schema.load(str(out))
    except RecipeError:
        out.unlink()
        raise

    if as_json:
        print_json({"recipe": str(out), **asdict(found), "train_tokens": found.train_tokens, **asdict(chosen)})
        return
    print(f"{text}: {found}")
    print(f"{out}: {chosen.steps:,} steps of {chosen.rows} rows, {chosen.tokens_per_parameter:.1f} tokens a parameter")
    if chosen.tokens_per_parameter < ENOUGH_TOKENS_PER_PARAMETER and not run_folder:
        print(f"warning: {ENOUGH_TOKENS_PER_PARAMETER} tokens a parameter are usual. {own_text.what_fits(found)}")
    if chosen.epochs > own_text.EPOCHS:
        print(f"warning: the text is read {chosen.epochs:.1f} times; beyond {own_text.EPOCHS} little more is learned")
    print("now:")
    print(f"  ds-slm plan {out}")
    print(f"  ds-slm train {out} --devices N" + (f" --base {shlex.quote(str(run_folder))}" if run_folder else ""))
    print(f"  ds-slm export runs/{name} --out exports/{name}")


def _refuse(name: str, out: Path, base_name: str, base: schema.Recipe, text: Path, column: str) -> None:
    problems = []
    if not NAME.fullmatch(name):
        problems.append(f"NAME = {name!r}: expected small letters, digits, '.', '_' and '-', for a file and a folder.")
    if name in schema.library_names():
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
    """Raise ConfigError where the run of the new recipe would be the one whose model it begins with."""
    if run_folder and (Path("runs") / name).resolve() == run_folder.resolve():
        raise ConfigError(f"NAME = {name!r}: its run folder would be {run_folder}, which --from names: choose another.")
