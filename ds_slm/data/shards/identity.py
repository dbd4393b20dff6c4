"""Which data belong to which recipe: prepared data are used for the recipe that made them, else refused, and kept.

recipe --source_identity, tokenizer_identity--> plain data, kept in each manifest
folder + recipe --conflicts--> a problem for each part that was made with other settings
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, field_validator

from ds_slm.data.sources import documents
from ds_slm.data.sources.splits import ALL
from ds_slm.errors import DataError
from ds_slm.files import is_plain_name, read_json, shortened
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.problems import sentences
from ds_slm.recipe.schema import Recipe

FORMAT = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
LEFT_OUT = "left_out"
"""A manifest's key for files of a known kind that were not read. Manifests of older versions lack it."""


class _Absent:
    """Stands for a key that a part of a recipe lacks, because None is a value."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class _Shard(BaseModel):
    """What a manifest must say of a shard."""

    file: str
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str

    @field_validator("file")
    @classmethod
    def _beside_the_manifest(cls, name: str) -> str:
        if not is_plain_name(name):
            raise ValueError(f"{name!r} is a path, expected the name of a file beside the manifest")
        return name


class _Source(BaseModel):
    """What the manifest of a source must say; it may say more."""

    identity: dict[str, Any]
    replaced: bool
    files: list[tuple[str, int]]
    newest_change_ns: int
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    shards: dict[Literal["train", "val"], list[_Shard]] = Field(min_length=2)
    bytes: dict[Literal["train", "val"], int | None] = Field(min_length=2)
    skipped: dict[str, int]
    whole: bool
    max_tokens: int | None = None
    left_out: dict[str, list[str]] = {}
    notes: list[str] = []


class _Tokenizer(BaseModel):
    """What the manifest of a tokenizer must say; it may say more."""

    identity: dict[str, Any]
    sha256: str
    older_sha256: str | None = None
    vocab_size: NonNegativeInt
    eos_id: NonNegativeInt
    pad_id: NonNegativeInt
    cut_at_bytes: dict[str, float]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared tokenizer or source; None if there is none yet.

    Raises:
        DataError: it is damaged, has another format, or names files that are not beside it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    way_out = f"remove {folder} and prepare again"
    manifest = read_json(path)
    if manifest is None:
        raise DataError(f"{path} is damaged (it holds no JSON object): {way_out}.")
    if (found := manifest.get("format")) != FORMAT:
        raise DataError(f"{path} has format {found}, this version reads {FORMAT}: {way_out}.")
    try:
        (_Tokenizer if folder.name == TOKENIZER else _Source).model_validate(manifest)
    except ValidationError as error:
        raise DataError(f"{path} is damaged ({'; '.join(sentences(error))}): {way_out}.") from error
    return manifest


def source_identity(recipe: Recipe, source: Source) -> dict[str, Any]:
    """The part of the recipe that decides a source's shards; its weight and the run's length do not count."""
    return {
        "source": source.dump_for_hash(exclude={"weight"}),
        "data": recipe.data.dump_for_hash(include={"val_fraction", "held_out", "split_seed"}),
        "tokenizer": recipe.tokenizer.dump_for_hash(),
    }


def tokenizer_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that decides the tokenizer; for a trained one also its text and the mix."""
    identity = {"tokenizer": recipe.tokenizer.dump_for_hash()}
    if recipe.tokenizer.kind == "bpe":
        included = {"val_fraction", "held_out", "split_seed", "source"}
        identity["data"] = recipe.data.dump_for_hash(include=included)
    return identity


def conflicts(recipe: Recipe, folder: Path, replacements: Mapping[str, Path], encoding: Mapping[str, Any]) -> list[str]:
    """A problem for each part of the folder that was made with another recipe, encoding, or other local files."""
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
        pairs = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in sorted(before.keys() | now.keys())}
        return [line for key, (old, new) in pairs.items() for line in _differences(old, new, f"{place}.{key}")]
    return [] if before == now else [f"{place.lstrip('.')} was {before!r}, is {now!r}"]


def _has_other_files(source: Source, manifest: Mapping[str, Any], replacement: Path | None) -> bool:
    """Whether the source's local files differ in name or size; files that have moved away since are not missed."""
    if not _is_local(source, manifest, replacement):
        return False
    if LEFT_OUT in manifest and documents.locate(source, replacement).file_sizes() == manifest["files"]:
        return False

    # Older versions knew fewer names of splits: they read all files that are read now, and more.
    everything = documents.locate(source.model_copy(update={"split": ALL}), replacement)
    found, chosen = Counter(map(tuple, manifest["files"])), Counter(map(tuple, _chosen(source, replacement)))
    return not chosen <= found <= Counter(map(tuple, everything.file_sizes()))


def doubts_of_older_data(source: Source, manifest: Mapping[str, Any], replacement: Path | None) -> Iterator[str]:
    """Data that an older version prepared and this one would not: files of another split, pointers in place of text.

    Older versions read nearly every file of a folder. Their data can still be read, so that a run on them can go on.
    """
    is_local = _is_local(source, manifest, replacement)
    names = Counter(name for name, _ in manifest["files"])

    # If files are gone, only their names can be judged.
    if is_local:
        others = sorted((names - Counter(name for name, _ in _chosen(source, replacement))).elements())
    elif LEFT_OUT in manifest:  # a file's folder may have named its split
        others = []
    else:
        others = documents.of_another_split(sorted(names.elements()), source.split)
    if others:
        yield (
            f"prepared by an older version, which read files of another split than {source.split!r} as well: "
            f"{shortened(others)}; their text is in the shards"
        )

    # Older versions read a download's stand-ins as text.
    everything = source.model_copy(update={"split": ALL})
    if (
        is_local
        and LEFT_OUT not in manifest
        and (pointers := documents.stand_ins(documents.locate(everything, replacement)))
    ):
        yield f"prepared by an older version, which took for text what is none: {shortened(pointers)}"


def _chosen(source: Source, replacement: Path | None) -> list[list[str | int]]:
    """Names and sizes of the local files that are read now; none if it is unclear which files are meant."""
    try:
        return documents.locate(source, replacement).file_sizes()
    except DataError:
        return []


def _is_local(source: Source, manifest: Mapping[str, Any], replacement: Path | None) -> bool:
    """Whether the source's files are local, so that they can be looked at."""
    if replacement is None and manifest["replaced"]:
        return False
    root = replacement or (Path(source.path) if source.path else None)
    return root is not None and not ((replacement is None or manifest["replaced"]) and _is_gone(root))


def _is_gone(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))
