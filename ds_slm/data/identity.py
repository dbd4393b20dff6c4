"""What belongs to which recipe: prepared data are used for the recipe that made them, or refused; never overwritten.

recipe --source_identity, tokenizer_identity--> plain data, kept in each manifest
folder + recipe --conflicts--> a problem for each part that something else has made
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_slm.data import corpus
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe, Source

FORMAT = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared tokenizer or source; None where there is none yet."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): remove {folder} and prepare again.") from error
    if (found := manifest.get("format")) != FORMAT:
        raise DataError(f"{path} has format {found}, this version reads {FORMAT}: remove {folder} and prepare again.")
    return manifest


def source_identity(recipe: Recipe, source: Source) -> dict[str, Any]:
    """The part of the recipe that decides a source's shards. Its weight and the run's length do not."""
    return {
        "source": source.model_dump(mode="json", exclude={"weight"}),
        "data": recipe.data.model_dump(mode="json", include={"val_fraction", "held_out", "split_seed"}),
        "tokenizer": recipe.tokenizer.model_dump(mode="json"),
    }


def tokenizer_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that decides the tokenizer: of a trained one, also its text and the mix."""
    identity = {"tokenizer": recipe.tokenizer.model_dump(mode="json")}
    if recipe.tokenizer.kind == "bpe":
        identity["data"] = recipe.data.model_dump(
            mode="json", include={"val_fraction", "held_out", "split_seed", "source"}
        )
    return identity


def conflicts(recipe: Recipe, folder: Path, replacements: Mapping[str, Path], encoding: Mapping[str, Any]) -> list[str]:
    """A problem for each part of the folder that another recipe, encoding, or other local files, have made."""
    way_out = f"name another --data-root, or remove {folder} to prepare anew"
    identities = {TOKENIZER: tokenizer_identity(recipe)}
    identities |= {source.name: {**source_identity(recipe, source), **encoding} for source in recipe.data.source}
    problems = []
    for part, identity in identities.items():
        if (manifest := read_manifest(folder / part)) and manifest["identity"] != identity:
            differences = ", ".join(_differences(manifest["identity"], identity))
            problems.append(f"{folder / part} belongs to another recipe ({differences}): {way_out}.")
    for source in recipe.data.source:
        manifest = read_manifest(folder / source.name)
        if manifest and _has_other_files(source, manifest, replacements.get(source.name)):
            problems.append(f"{folder / source.name} was made from other local files: {way_out}.")
    return problems


def _differences(before: Any, now: Any, place: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{place}.{key}")]
    return [] if before == now else [f"{place.lstrip('.')} was {before!r}, is {now!r}"]


def _has_other_files(source: Source, manifest: dict[str, Any], replacement: Path | None) -> bool:
    """Whether the source's local files differ in name or size; files that have moved away since are not missed."""
    if replacement is None and manifest["replaced"]:
        return False
    root = replacement or (Path(source.path) if source.path else None)
    if root is None or ((replacement is None or manifest["replaced"]) and _is_gone(root)):
        return False
    return corpus.locate(source, replacement).file_sizes() != manifest["files"]


def _is_gone(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))
