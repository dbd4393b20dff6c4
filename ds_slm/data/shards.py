"""Token shards: from a recipe's sources to flat files of ids, and back to arrays.

    recipe --prepare--> tokenizer/, then for each source: shards, then manifest.json
    folder --open_prepared--> Prepared: memory maps; only sizes, manifests and the tokenizer are read
           --verify--> every byte against its hash

Layout: DATA_ROOT/NAME/tokenizer/ and DATA_ROOT/NAME/SOURCE/{train,val}-00000.bin + manifest.json; little-endian uint16,
or uint32 where the vocabulary needs it, EOS after each document. The manifest comes last: what has one is whole. One
process of a host prepares, under a lock; the others wait and find the work done. The same text gives the same bytes,
however often preparing was interrupted.

Held out are the documents whose keyed hash falls below `data.val_fraction`; of a source that is one single document,
and of ready-made token files, the last `data.val_fraction`. Train and validation share no document.

Known gaps: an interrupted source starts again from its beginning. How far a long source was read is not part of the
data's identity, so a longer run finds the same shards and repeats them; removing the folder prepares more.
"""

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data import corpus
from ds_slm.data.identity import MANIFEST, TOKENIZER, conflicts, read_manifest, source_identity, tokenizer_identity
from ds_slm.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from ds_slm.data.writer import (
    SPLITS,
    Split,
    decode_documents,
    id_dtype,
    split_documents,
    write_documents,
    write_token_files,
)
from ds_slm.errors import DataError
from ds_slm.files import fsync, write_json
from ds_slm.recipe.problems import nearest
from ds_slm.recipe.schema import Recipe, Source

FORMAT = 1

WHOLE_SOURCE_TOKENS = 20_000_000
"""A source is read at least this far: about a minute's work, and room for a longer run."""
MARGIN = 1.01
"""Training tokens prepared for each that the run draws."""


@dataclass(frozen=True)
class Prepared:
    """The prepared data of a recipe: what its manifests say, and its tokens as memory maps."""

    folder: Path
    manifests: dict[str, dict[str, Any]]
    """Source name -> manifest, in the recipe's order."""
    tokenizer_manifest: dict[str, Any]

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer folder."""
        return self.folder / TOKENIZER

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's content."""
        return self.tokenizer_manifest["sha256"]

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer."""
        return self.tokenizer_manifest["vocab_size"]

    @property
    def eos_id(self) -> int:
        """The id after each document."""
        return self.tokenizer_manifest["eos_id"]

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""
        return self.tokenizer_manifest["pad_id"]

    @property
    def sha256(self) -> str:
        """One hash of tokenizer, text and shards: equal wherever the same rows will be read."""
        content = [self.tokenizer_sha256, *({**manifest, "files": None} for manifest in self.manifests.values())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources, EOS included."""
        return self._tokens("train")

    @property
    def val_tokens(self) -> int:
        """Held-out tokens of all sources, EOS included."""
        return self._tokens("val")

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the held-out text, without anything for the EOS tokens."""
        return sum(manifest["bytes"]["val"] for manifest in self.manifests.values())

    def _tokens(self, split: Split) -> int:
        return sum(shard["tokens"] for manifest in self.manifests.values() for shard in manifest["shards"][split])

    def val_text(self) -> str:
        """The held-out text, decoded from its tokens, documents one after the other."""
        tokenizer = load_tokenizer(self.tokenizer_folder)
        return "".join(decode_documents(tokenizer, tokens) for tokens in self.val_token_arrays())

    def train_token_arrays(self) -> list[np.ndarray]:
        """The training tokens of each source, uint16 or uint32 memory maps."""
        return [self._map(source, "train") for source in range(len(self.manifests))]

    def val_token_arrays(self) -> list[np.ndarray]:
        """The held-out tokens of each source, uint16 or uint32 memory maps."""
        return [self._map(source, "val") for source in range(len(self.manifests))]

    def _map(self, source: int, split: Split) -> np.ndarray:
        return np.memmap(self.shard_path(source, split), id_dtype(self.vocab_size), mode="r")

    def shard_path(self, source: int, split: Split) -> Path:
        """The shard file of a source, given by its place in the recipe."""
        name = list(self.manifests)[source]
        return self.folder / name / self.manifests[name]["shards"][split][0]["file"]

    def shard_files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every shard file with its entry in the manifest."""
        for name, manifest in self.manifests.items():
            for split in SPLITS:
                yield from ((self.folder / name / shard["file"], shard) for shard in manifest["shards"][split])


def prepare(
    recipe: Recipe,
    name: str,
    data_root: Path,
    sources: Mapping[str, Path] | None = None,
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> Prepared:
    """Make whatever is missing of a recipe's tokenizer and shards in `data_root/name`, and open them.

    Args:
        recipe: what to prepare.
        name: the folder's name, usually the recipe's.
        data_root: where prepared data live.
        sources: a local file or folder in place of a source, by the source's name.
        max_tokens: training tokens of all sources together, to try things out; None prepares what the run needs.
        report: takes lines of progress.

    Raises:
        DataError: with every problem found; nothing that exists is overwritten.
    """
    replacements = {name: Path(path) for name, path in (sources or {}).items()}
    known = [source.name for source in recipe.data.source]
    unknown = [name for name in replacements if name not in known]
    if unknown:
        raise DataError([f"--source {name}: the recipe has no such source{nearest(name, known)}." for name in unknown])
    folder = Path(data_root) / name
    with _locked(folder, report):
        _refuse(conflicts(recipe, folder, replacements))
        places = _places(recipe, folder, replacements)
        if places or not (folder / TOKENIZER).exists():
            tokenizer = _prepare_tokenizer(recipe, folder, replacements, report)
            for source in recipe.data.source:
                if source.name in places:
                    limit = _token_limit(recipe, source, max_tokens)
                    _prepare_source(recipe, source, replacements.get(source.name), folder, tokenizer, limit, report)
        prepared = open_prepared(recipe, name, data_root)
    for line in _notes(recipe, prepared):
        report(line)
    return prepared


def open_prepared(recipe: Recipe, name: str, data_root: Path) -> Prepared:
    """Open what `prepare` has made, reading no more than manifests, file sizes and the tokenizer.

    Raises:
        DataError: where data are missing, cut short, of another recipe or another tokenizer.
    """
    folder = Path(data_root) / name
    expected = [TOKENIZER, *(source.name for source in recipe.data.source)]
    manifests = {part: manifest for part in expected if (manifest := read_manifest(folder / part))}
    if missing := [part for part in expected if part not in manifests]:
        raise DataError(f"{folder} lacks {', '.join(missing)}: run ds-slm prepare {name}.")
    _refuse(conflicts(recipe, folder, {}))
    prepared = Prepared(folder, tokenizer_manifest=manifests.pop(TOKENIZER), manifests=manifests)
    _refuse([*_tokenizer_problems(prepared), *_size_problems(prepared)])
    return prepared


def verify(prepared: Prepared) -> None:
    """Read every shard and compare its hash with the manifest. Raises DataError naming all that differ."""
    problems = _size_problems(prepared)
    for path, shard in prepared.shard_files():
        if path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                problems.append(
                    f"{path} has sha256 {found}, its manifest says {shard['sha256']}: {_again(path.parent)}."
                )
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise DataError(problems)


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare again"


def _size_problems(prepared: Prepared) -> list[str]:
    problems = []
    for path, shard in prepared.shard_files():
        size_bytes = path.stat().st_size if path.is_file() else 0
        if size_bytes != shard["bytes"]:
            state = "was cut short" if size_bytes < shard["bytes"] else "has grown"
            problems.append(f"{path} {state}: {size_bytes} bytes where {shard['bytes']} belong; {_again(path.parent)}.")
    return problems


def _tokenizer_problems(prepared: Prepared) -> list[str]:
    found, expected = load_tokenizer(prepared.tokenizer_folder).sha256, prepared.tokenizer_sha256
    if found != expected:
        return [f"{prepared.tokenizer_folder} was changed: sha256 {found}, not {expected}; {_again(prepared.folder)}."]
    return [
        f"{prepared.folder / name} was made with the tokenizer {manifest['tokenizer_sha256']}, and the one beside it "
        f"is {expected}: {_again(prepared.folder / name)}."
        for name, manifest in prepared.manifests.items()
        if manifest["tokenizer_sha256"] != expected
    ]


def _places(recipe: Recipe, folder: Path, replacements: Mapping[str, Path]) -> dict[str, corpus.Place]:
    """Where to read each source that has no shards yet. Raises DataError with every path that is wrong."""
    places, problems = {}, []
    for source in recipe.data.source:
        if not (folder / source.name / MANIFEST).exists():
            try:
                places[source.name] = corpus.locate(source, replacements.get(source.name))
            except DataError as error:
                problems += error.problems
    _refuse(problems)
    return places


def _token_limit(recipe: Recipe, source: Source, max_tokens: int | None) -> float:
    """Training tokens at which a source may be cut: its share of `max_tokens`, or of what the run draws."""
    share = source.weight / sum(other.weight for other in recipe.data.source)
    if max_tokens is not None:
        return math.ceil(max_tokens * share)
    drawn = recipe.train.steps * recipe.train.global_batch_tokens * share
    return max(math.ceil(drawn * MARGIN) + recipe.data.seq_len + 1, WHOLE_SOURCE_TOKENS)


def _prepare_tokenizer(
    recipe: Recipe, folder: Path, replacements: Mapping[str, Path], report: Callable[[str], None]
) -> Tokenizer:
    target = folder / TOKENIZER
    if read_manifest(target):
        return load_tokenizer(target)

    def training_texts(source: Source) -> Iterator[str]:
        texts = filter(None, corpus.documents(source, replacements.get(source.name)))
        return (text for split, text in split_documents(texts, recipe.data) if split == "train")

    report(f"{TOKENIZER}: {recipe.tokenizer.kind}, {recipe.tokenizer.vocab_size} ids")
    tokenizer = build_tokenizer(recipe, training_texts)
    temporary = folder / f"{TOKENIZER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    manifest = {
        "format": FORMAT,
        "identity": tokenizer_identity(recipe),
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }
    write_json(temporary / MANIFEST, manifest)
    for path in (*temporary.iterdir(), temporary):
        fsync(path)
    temporary.rename(target)
    fsync(folder)
    return tokenizer


def _prepare_source(
    recipe: Recipe,
    source: Source,
    replacement: Path | None,
    folder: Path,
    tokenizer: Tokenizer,
    token_limit: float,
    report: Callable[[str], None],
) -> None:
    target = folder / source.name
    place = corpus.locate(source, replacement)
    if place.kind == "tokens":
        written = write_token_files(source.name, target, place.files, tokenizer, recipe.data, token_limit)
    else:
        texts = corpus.documents(source, replacement)
        written = write_documents(source.name, target, texts, tokenizer, recipe.data, token_limit, report)
    manifest = {
        "format": FORMAT,
        "identity": source_identity(recipe, source),
        "kind": place.kind,
        "replaced": replacement is not None,
        "files": place.file_sizes(),
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": id_dtype(tokenizer.vocab_size).name,
    }
    fsync(target)
    write_json(target / MANIFEST, manifest | written)
    tokens = {split: written["shards"][split][0]["tokens"] for split in SPLITS}
    report(f"{source.name}: {tokens['train']:,} training and {tokens['val']:,} held-out tokens")


@contextmanager
def _locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """One process of this host at a time; the lock goes with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{folder}: another process prepares it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _notes(recipe: Recipe, prepared: Prepared) -> Iterator[str]:
    """What a user may not expect of data that were found ready."""
    for source in recipe.data.source:
        manifest = prepared.manifests[source.name]
        tokens = manifest["shards"]["train"][0]["tokens"]
        if manifest["skipped_documents"]:
            yield f"{source.name}: {manifest['skipped_documents']:,} empty or unreadable documents were skipped"
        if manifest["replaced"]:
            yield f"{source.name}: read from local files ({', '.join(name for name, _ in manifest['files'])})"
        if not manifest["whole"] and tokens < _token_limit(recipe, source, None):
            yield f"{source.name}: cut at {tokens:,} training tokens, the run will repeat them (remove it for more)"
