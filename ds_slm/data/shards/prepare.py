"""From a recipe to its tokenizer and token shards: makes the parts that are missing.

    recipe --prepare--> tokenizer/, then for each source: shards, then manifest.json --open_prepared--> Prepared

One process of a host prepares, under a lock; the others wait and find the work done. Complete data are only read,
without a lock and without writing, so they may lie on a read-only mount. The same text gives the same bytes, even if
preparing was interrupted: a source goes on where its journal says.

A document is held out if its keyed hash falls below `data.val_fraction`. Sources of one single document, and
ready-made token files, hold out their last `data.val_fraction`. Train and validation share no document.

Known gaps: a source on the hub is read twice, once for a trained tokenizer. How far a long source was read is not part
of the data's identity, so a longer run finds the same shards and repeats them; removing the folder prepares more.
"""

import errno
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ds_slm.data.shards.identity import (
    LEFT_OUT,
    MANIFEST,
    TOKENIZER,
    conflicts,
    doubts_of_older_data,
    read_manifest,
    tokenizer_identity,
)
from ds_slm.data.shards.journal import JOURNAL, tell_skipped
from ds_slm.data.shards.parts import Preparation, text_of, tokenizer_bytes
from ds_slm.data.shards.prepared import Prepared, open_prepared, refuse
from ds_slm.data.shards.writer import TEXT, DocumentFormat
from ds_slm.data.sources.documents import SourceFiles, locate, stand_ins, tell_left_out
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from ds_slm.files import CANNOT_WRITE, NeededFolder, locked, obstacle, shortened
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.problems import nearest
from ds_slm.recipe.schema import Recipe

WHOLE_SOURCE_TOKENS = 20_000_000
"""A source is read at least to this number of tokens: about a minute's work, which allows a longer run later."""
MARGIN = 1.01
"""Training tokens that are prepared for each one that the run draws."""


def prepare(
    recipe: Recipe,
    folder: Path,
    sources: Mapping[str, Path] | None = None,
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
    document_format: DocumentFormat = TEXT,
) -> Prepared:
    """Make the missing parts of a recipe's tokenizer and shards in a folder, and open them.

    Args:
        recipe: the recipe to prepare.
        folder: the folder of its prepared data, usually DATA_ROOT/RECIPE.
        sources: a local file or folder in place of a source, by the source's name.
        max_tokens: training tokens of all sources together, to try things out; None prepares what the run needs.
        report: takes lines of progress.
        document_format: what the sources' documents are, and which tokenizer encodes them.

    Raises:
        DataError: with every problem found; no existing file is overwritten.
    """
    replacements = {name: Path(path) for name, path in (sources or {}).items()}
    _refuse_unknown_sources(recipe, replacements)
    if in_the_way := obstacle(folder):
        raise DataError(f"--data-root: {in_the_way}")

    # Complete data are only read, without a lock.
    places: dict[str, SourceFiles] = {}
    if _missing(recipe, folder):
        with _locked(recipe, folder, report), _room_on_disk(folder):
            if document_format.tokenizer_folder is None:
                _drop_lonely_tokenizer(recipe, folder, replacements)
            refuse(conflicts(recipe, folder, replacements, document_format.identity))
            places = _places(recipe.data.source, folder, replacements, report)
            if _missing(recipe, folder):  # no other process has prepared it meanwhile
                limits = {source.name: _token_limit(recipe, source, max_tokens) for source in recipe.data.source}
                if document_format.as_json and max_tokens is None:
                    limits = dict.fromkeys(limits, math.inf)  # conversations are few, and an epoch holds all of them

                preparation = Preparation(recipe, folder, replacements, limits, max_tokens, document_format, report)
                tokenizer = preparation.make_tokenizer()
                refuse(_differs_from_base(recipe, folder, document_format))
                for source in recipe.data.source:
                    if files := places.get(source.name):
                        preparation.make_shards(source, files, tokenizer)
    else:
        refuse(conflicts(recipe, folder, replacements, document_format.identity))

    for source in recipe.data.source:
        with suppress(OSError):  # left by a kill right after the manifest; useless, and harmless on a read-only mount
            (folder / source.name / JOURNAL).unlink(missing_ok=True)

    prepared = open_prepared(recipe, folder, document_format.identity, report)
    refuse(_differs_from_base(recipe, folder, document_format))
    for line in _notes(recipe, prepared, replacements, max_tokens, told=places.keys()):
        report(line)
    return prepared


def refuse_wrong_sources(recipe: Recipe, folder: Path, replacements: Mapping[str, Path]) -> None:
    """Raise DataError if `prepare` would, judged by the names and sizes of local files; does not ask the hub.

    Args:
        recipe: the recipe to prepare.
        folder: the folder of its prepared data.
        replacements: a local file or folder in place of a source, by the source's name.
    """
    _refuse_unknown_sources(recipe, replacements)
    if in_the_way := obstacle(folder):
        raise DataError(f"--data-root: {in_the_way}")
    _places([one for one in recipe.data.source if one.path or one.name in replacements], folder, replacements)


def needed_folders(
    recipe: Recipe,
    folder: Path,
    sources: Mapping[str, Path] | None = None,
    document_format: DocumentFormat = TEXT,
) -> list[NeededFolder]:
    """The folders that `prepare` makes; whole on this host if they belong to this recipe and have their manifest.

    If a part is another recipe's, or damaged, no folder is whole and none is absent: `prepare` says what is wrong.
    """
    try:
        usable = not conflicts(recipe, folder, sources or {}, document_format.identity)
    except DataError:
        usable = False

    found = []
    for part in (TOKENIZER, *(source.name for source in recipe.data.source)):
        place, files = folder / part, None
        if usable and (manifest := read_manifest(place)):
            shards = [shard["file"] for split in manifest.get("shards", {}).values() for shard in split]
            others = [path.name for path in sorted(place.iterdir()) if path.is_file()] if part == TOKENIZER else shards
            files = (*(one for one in others if one != MANIFEST), MANIFEST)
        found.append(
            NeededFolder(f"{folder.name}/{part}", place, files, is_absent=usable and files is None, lock=folder)
        )
    return found


def _differs_from_base(recipe: Recipe, folder: Path, document_format: DocumentFormat) -> list[str]:
    """The problem if the prepared tokenizer is not the base model's."""
    of_base = document_format.tokenizer_folder or document_format.tokenizer_of_base
    if of_base is None:
        return []
    ours, theirs = load_tokenizer(folder / TOKENIZER), load_tokenizer(of_base)

    # The base's own tokenizer encodes conversations; the recipe's encodes text, and must give the same ids.
    if document_format.tokenizer_folder:
        if ours.sha256 == theirs.sha256:
            return []
        return [
            f"{folder} was made with the tokenizer {ours.sha256}, the base in {of_base} has {theirs.sha256}: name the "
            "base it was made for, another --data-root, or remove the folder."
        ]
    if ours.text_sha256 == theirs.text_sha256:
        return []
    return [
        f"the recipe's tokenizer (kind {recipe.tokenizer.kind!r}, made in {folder / TOKENIZER}) gives other ids than "
        f"that of --base, {of_base}: set tokenizer.kind = 'hf', tokenizer.path = {str(of_base)!r} and "
        f"tokenizer.vocab_size = {theirs.vocab_size} in the recipe, as `ds-slm init NAME --from RUN --text PATH` does "
        f"for a run folder, and remove {folder}, or name another --data-root."
    ]


def _missing(recipe: Recipe, folder: Path) -> list[str]:
    """The parts of a recipe's data that are not there yet: a part's manifest is written last, when it is whole."""
    parts = [TOKENIZER, *(source.name for source in recipe.data.source)]
    return [part for part in parts if not (folder / part / MANIFEST).exists()]


def _drop_lonely_tokenizer(recipe: Recipe, folder: Path, replacements: Mapping[str, Path]) -> None:
    """Remove a tokenizer with which no source was prepared, if this launch would train it on other text."""
    manifest = read_manifest(folder / TOKENIZER)
    if manifest is None or any((folder / source.name / MANIFEST).exists() for source in recipe.data.source):
        return
    if (manifest["identity"], manifest.get("text")) != (tokenizer_identity(recipe), text_of(recipe, replacements)):
        shutil.rmtree(folder / TOKENIZER)


def _refuse_unknown_sources(recipe: Recipe, replacements: Mapping[str, Path]) -> None:
    known = [source.name for source in recipe.data.source]
    there = f"; it has {', '.join(known)}"
    refuse(
        [
            f"--source {name}: the recipe has no such source{nearest(name, known) or there}."
            for name in replacements
            if name not in known
        ]
    )


def _places(
    sources: Collection[Source],
    folder: Path,
    replacements: Mapping[str, Path],
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, SourceFiles]:
    """Where to read each source that has no shards yet. Raises DataError with every path that is wrong."""
    places, problems = {}, []
    for source in sources:
        if not (folder / source.name / MANIFEST).exists():
            try:
                places[source.name] = place = locate(source, replacements.get(source.name), report)
                problems += stand_ins(place)
            except DataError as error:
                problems += error.problems
    refuse(problems)
    for source in sources:
        if (place := places.get(source.name)) and (line := place.tell(source.split)):
            report(f"{source.name}: {line}")
    return places


def _token_limit(recipe: Recipe, source: Source, max_tokens: int | None) -> float:
    """Training tokens at which a source may be cut: its share of `max_tokens`, or of what the run draws."""
    share = source.weight / sum(other.weight for other in recipe.data.source)
    if max_tokens is not None:
        return math.ceil(max_tokens * share)
    drawn = recipe.train.steps * recipe.train.global_batch_tokens * share
    return max(math.ceil(drawn * MARGIN) + recipe.data.seq_len + 1, WHOLE_SOURCE_TOKENS)


def _changed_since(manifest: Mapping[str, Any], source: Source, replacement: Path | None) -> bool:
    """Whether local files have the names and sizes of the prepared ones, but were changed later."""
    if source.kind in ("builtin", "hub") and replacement is None:
        return False
    if replacement is None and (manifest["replaced"] or source.path is None):
        return False
    try:
        return locate(source, replacement).newest_change_ns() > manifest["newest_change_ns"]
    except DataError:  # moved away since
        return False


@contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_mb = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"{folder}: the disk is full ({free_mb:,.0f} MB free): make room, or name another --data-root; preparing "
            "goes on where it stopped."
        ) from error


@contextmanager
def _locked(recipe: Recipe, folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """The folder's lock. Raises DataError if this user cannot write the missing parts there."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, report))
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise DataError(
                f"{folder} lacks {', '.join(_missing(recipe, folder))}, and nothing can be written there "
                f"({error.filename or folder}: {error.strerror}): name another --data-root, or prepare the data where "
                "they can be written."
            ) from error
        yield


def _notes(
    recipe: Recipe, prepared: Prepared, replacements: Mapping[str, Path], max_tokens: int | None, told: Collection[str]
) -> Iterator[str]:
    """Notes on data that were found ready. The user already knows the files of the sources in `told`."""
    wanted = {source.name: tokenizer_bytes(_token_limit(recipe, source, max_tokens)) for source in recipe.data.source}
    trained_on = prepared.tokenizer_manifest["cut_at_bytes"]
    if short := [name for name, cut_bytes in trained_on.items() if cut_bytes < wanted[name]]:
        read_mb, wanted_mb = (sum(sizes[name] for name in short) / 1e6 for sizes in (trained_on, wanted))
        yield (
            f"warning: {TOKENIZER} was trained for a shorter run, on {read_mb:,.1f} MB of {', '.join(short)} (this "
            f"one: up to {wanted_mb:,.1f} MB): remove {prepared.folder} to prepare all of it anew"
        )

    for source in recipe.data.source:
        manifest = prepared.manifests[source.name]
        tokens = sum(shard["tokens"] for shard in manifest["shards"]["train"])
        if skipped := manifest["skipped"]:
            what = "documents were skipped" if manifest["documents"] else "ids were skipped"
            yield f"{source.name}: {sum(skipped.values()):,} {what}: {tell_skipped(skipped)}"
        yield from (f"{source.name}: {note}" for note in manifest.get("notes", []))

        if _changed_since(manifest, source, replacements.get(source.name)):
            yield (
                f"warning: {source.name}: its files have changed since they were prepared, the shards hold what was "
                f"there before: remove {prepared.folder / source.name} to prepare it anew"
            )
        for doubt in doubts_of_older_data(source, manifest, replacements.get(source.name)):
            yield f"warning: {source.name}: {doubt}: remove {prepared.folder / source.name} to prepare it anew"

        if source.name not in told:
            if manifest["replaced"]:
                yield f"{source.name}: read from local files ({shortened([name for name, _ in manifest['files']])})"
            if left_out := tell_left_out(manifest.get(LEFT_OUT, {})):
                yield f"{source.name}: left out when it was prepared: {left_out}"

        if not manifest["whole"] and tokens < _token_limit(recipe, source, None):
            yield (
                f"{source.name}: cut at {tokens:,} training tokens, the run will repeat them (remove {prepared.folder} "
                "for more)"
            )
