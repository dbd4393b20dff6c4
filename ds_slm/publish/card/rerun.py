"""How to make the same model again: the part of a model card with commands, hashes and versions."""

import html
import shlex
from pathlib import Path
from typing import Any

import tomli_w

from ds_slm.checkpoint.files import BASE
from ds_slm.data.skipping import merged
from ds_slm.errors import RecipeError
from ds_slm.publish.card.facts import RunFacts
from ds_slm.publish.card.markdown import code, code_block, table
from ds_slm.recipe import loading
from ds_slm.recipe.hub_names import is_repo_id
from ds_slm.recipe.schema import Recipe

HIDDEN = ("run", "eval")
"""Sections that do not change the result, and may name folders of the machine."""


def rerun(facts: RunFacts) -> list[str]:
    """Commands, hashes and versions; the recipe itself if it is not the library's."""
    name, environment = facts.name, facts.environment
    in_library = _library_has(facts)
    recipe = shlex.quote(name if in_library else f"{name}.toml")
    replaced = "".join(f" --source {shlex.quote(one)}=FILES" for one in environment.get("replaced_sources") or ())
    skipped = "".join(f" --skip-rows {first}:{end}" for first, end in merged(facts.state.get("skipped_rows") or ()))
    base = " --base BASE" if facts.has_base else ""
    cut_short = "" if facts.is_finished else f" --max-steps {facts.step}"
    flags = f"{base}{replaced}{skipped}{cut_short}"
    if facts.recipe.sft is None:
        cut = f" --max-tokens {environment['max_tokens']}" if environment.get("max_tokens") else ""
        commands = [
            f"ds-slm prepare {recipe}{replaced}{cut}",
            f"deepspeed ds_slm/pretrain.py --recipe {recipe}{flags}",
        ]
    else:
        commands = [f"deepspeed sft/train.py --recipe {recipe}{flags}"]
    commands.append(f"ds-slm export {shlex.quote(f'runs/{name}')} --out {shlex.quote(name)}")

    text = (
        "In a checkout of ds_slm:" if in_library else f"In a checkout of ds_slm, with the recipe below as `{recipe}`:"
    )
    told = [text, code_block("\n".join(commands), "bash")]
    if facts.has_base:
        told.append(f"BASE is the folder of {code(facts.base_name) if facts.base_name else 'the base model'}.")
    if replaced:
        told.append("FILES are the local files that were read in place of a source.")
    told += _proof(facts)
    if not in_library:
        if _has_local_path(facts.recipe):
            told.append("Of local paths the recipe shows the last part alone: put in your own.")
        told.append(
            f"<details><summary>{html.escape(recipe)}</summary>\n\n{code_block(_shown(facts), 'toml')}\n\n</details>"
        )
    return told


def _library_has(facts: RunFacts) -> bool:
    """Whether the library's recipe of this name still trains the same model."""
    if facts.name not in loading.library_names():
        return False
    try:
        return loading.load(facts.name).identity_sha256() == facts.recipe.identity_sha256()
    except RecipeError:
        return False


def _proof(facts: RunFacts) -> list[str]:
    """What must be equal for the same rows in the same order, and the versions with which this was made."""
    environment, recipe_sha256 = facts.environment, facts.recipe.identity_sha256()
    shown_sha256 = loading.parse(_shown(facts), recorded=True).identity_sha256()
    hashes = {
        "recipe": recipe_sha256,
        "recipe as shown, without local paths": shown_sha256 if shown_sha256 != recipe_sha256 else None,
        "prepared data": environment.get("data_sha256"),
        "tokenizer": environment.get("tokenizer_sha256"),
        "base": environment.get(BASE),
        "rows drawn, in order": next((one.get("ledger") for one in reversed(facts.records.get("train", []))), None),
        "weights (model.safetensors of the checkpoint)": facts.weights_sha256,
        "source files of ds_slm": environment.get("sources_sha256"),
    }
    rows = [(what, f"`{sha256}`") for what, sha256 in hashes.items() if sha256]
    told = [table(("sha256 of", ""), rows)]

    versions = {"Python": environment.get("python"), **(environment.get("versions") or {})}
    listed = [f"{name} {version}" for name, version in versions.items() if version]
    if commit := environment.get("commit"):
        listed.insert(0, f"ds_slm {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}")
    return [*told, f"Versions: {', '.join(listed)}."] if listed else told


def _has_local_path(recipe: Recipe) -> bool:
    tokenizer = recipe.tokenizer.path
    return any(one.path for one in recipe.data.source) or (tokenizer is not None and not is_repo_id(tokenizer))


def _shown(facts: RunFacts) -> str:
    """The resolved recipe as TOML, without private parts: a local path is cut to its last part."""
    tables: dict[str, Any] = facts.recipe.model_dump(mode="json", exclude_none=True, exclude=set(HIDDEN))
    for table_ in (tables["tokenizer"], *tables["data"]["source"]):
        if (path := table_.get("path")) and not (table_ is tables["tokenizer"] and is_repo_id(path)):
            table_["path"] = Path(path).name or "FILES"
    return tomli_w.dumps(tables)
