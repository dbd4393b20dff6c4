"""Document sources: the built-in corpus, local files, datasets on the hub.

    Source (+ a local replacement) --locate--> SourceFiles --documents--> DocumentStream: one str per document
    DocumentStream --position--> plain data --documents--> the stream from there on

In a folder the files of the source's split are read (`ds_slm.data.sources.splits`); the files left out are reported.

A document that is empty, null or not valid Unicode is given as "": the consumer counts and skips it.
Ready-made token files hold no documents; `ds_slm.data.shards.prepared` copies them.

Known gaps: a local file is recognised by its name and size. If it was edited and kept its size, its time of change only
gives a warning. A folder to which two links lead is read once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Literal, assert_never

from ds_slm.data.sources.builtin import builtin_documents
from ds_slm.data.sources.hub import Hub, Report, way_out
from ds_slm.data.sources.readers import (
    READERS,
    START,
    Cursor,
    SourceError,
    TextFile,
    read_documents,
    suffix_of,
)
from ds_slm.data.sources.splits import ALL, TRAIN, UnclearSplit, canonical, choose, looks_held_out
from ds_slm.data.sources.stand_ins import HEAD_BYTES, stand_in_at
from ds_slm.errors import DataError
from ds_slm.files import NAMES_TOLD, shortened
from ds_slm.recipe.data_sections import OLD_WORD, Source

TOKENS_SUFFIX = ".bin"


def _quiet(line: str) -> None:
    """A report that discards its lines."""


@dataclass(frozen=True)
class SourceFiles:
    """The place from which a source is really read."""

    kind: Literal["builtin", "hub", "text", "tokens"]
    files: tuple[Path, ...] = ()
    """Local files, in reading order."""
    other_split: tuple[Path, ...] = ()
    """Left out: files that are named for another split."""
    beside: tuple[Path, ...] = ()
    """Left out: files that are named for no split, while others are."""
    strange: tuple[Path, ...] = ()
    """Left out: files of no known kind."""
    root: Path = Path()
    """The folder, or the one file, that was named."""

    @property
    def is_one_file(self) -> bool:
        """Whether a file was named, not a folder."""
        return self.files == (self.root,)

    @property
    def ignored(self) -> tuple[Path, ...]:
        """Every file that is left out."""
        return (*self.other_split, *self.beside, *self.strange)

    def left_out(self) -> dict[str, list[str]]:
        """Files of a known kind that are left out, relative to the root, by reason; for the manifest."""
        groups = {"another split": self.other_split, "no split": self.beside}
        return {reason: [str(path.relative_to(self.root)) for path in group] for reason, group in groups.items()}

    def tell(self, split: str) -> str | None:
        """A line on which local files are read, and which are not; None without local files."""
        if not self.files:
            return None

        below = [path.relative_to(self.root) if path != self.root else PurePath(path.name) for path in self.files]
        doubtful = [path for path in below if canonical(split) in (TRAIN, ALL) and looks_held_out(path)]
        first = dict.fromkeys([*doubtful, *below])  # of many names only the first are shown
        line = f"reads {shortened([str(path) for path in first])}"
        if len(doubtful) > NAMES_TOLD:
            line += f", {len(doubtful):,} with names as of held-out data"

        if parts := tell_left_out(self.left_out()):
            line += f" ({len(below):,} of {len(below) + len(self.other_split) + len(self.beside):,} files)"
            line += f", those of split {split!r}; left out: {parts}"
        if self.strange:
            names = [str(path.relative_to(self.root)) for path in self.strange]
            line += f"; {len(names):,} of no known kind: {shortened(names)}"
        return line

    def text_bytes(self) -> int | None:
        """The approximate bytes of the text; None if that is unknown before reading it."""
        plain = all(path.suffix.lower() not in (".gz", ".zst", ".parquet") for path in self.files)
        return sum(path.stat().st_size for path in self.files) if self.files and plain else None

    def file_sizes(self) -> list[list[str | int]]:
        """Name and bytes of every local file, which show without reading whether they are the same files."""
        return [[path.name, path.stat().st_size] for path in self.files]

    def newest_change_ns(self) -> int:
        """The newest time of change among local files, in ns; 0 if there are none."""
        return max((path.stat().st_mtime_ns for path in self.files), default=0)


def locate(source: Source, replacement: Path | None = None, report: Report = _quiet) -> SourceFiles:
    """Where to read a source: the replacement if there is one, else the place in the recipe.

    Token files on the hub are downloaded; `report` takes a line for every try that fails. In a folder, files that
    are named for another split than the source's are left out. A file that the recipe names is always read.

    Raises:
        DataError: a path does not exist, cannot be listed, or holds no file of a known kind or of the split; or a
            data file is really a broken link or a pipe.
    """
    if replacement is not None:
        root = replacement
    elif source.kind in ("builtin", "hub"):
        return SourceFiles(source.kind)
    elif source.kind in ("files", "tokens"):
        root = Path(source.path) if source.path else Hub(source, report).token_files(TOKENS_SUFFIX)
    else:
        assert_never(source.kind)

    who = f"source {source.name!r}"
    if not root.exists():
        state = "is a link to nothing" if root.is_symlink() else "does not exist"
        raise SourceError(f"{who}: {root} {state}", way_out(source))

    try:
        candidates = _files_under(root)
    except OSError as error:
        problem = f"{who}: {error.filename or root} cannot be read ({error.strerror})"
        raise SourceError(problem, way_out(source)) from error

    text = tuple(path for path in candidates if suffix_of(path.name))
    tokens = tuple(path for path in candidates if path.name.lower().endswith(TOKENS_SUFFIX))
    if unreadable := [path for path in (*text, *tokens) if not path.is_file()]:
        raise DataError([f"{who}: {path} is no file or a link to nothing: mend or remove it." for path in unreadable])

    known = ", ".join([*READERS, TOKENS_SUFFIX])
    if not text and not tokens:
        raise SourceError(f"{who}: {root} holds no file of a known kind ({known})", way_out(source))
    if text and tokens:
        raise DataError(f"{who}: {root} holds both text ({text[0].name}) and token ids ({tokens[0].name}): part them.")

    known_kind = text or tokens
    strange = tuple(sorted(set(candidates) - set(known_kind)))
    if root == known_kind[0]:
        return SourceFiles("text" if text else "tokens", known_kind, root=root)

    # The names of files and folders give their split.
    try:
        choice = choose([_without_suffix(path.relative_to(root)) for path in known_kind], source.split)
    except UnclearSplit as reason:
        raise SourceError(
            f"{who}: {root}: {reason}",
            f"name the file or folder to read with --source {source.name}=PATH, rename the files, or read all of them "
            f"with data.source.split = {ALL!r}",
        ) from reason

    groups = ([known_kind[place] for place in places] for places in (choice.read, choice.other_split, choice.beside))
    return SourceFiles("text" if text else "tokens", *map(tuple, groups), strange=strange, root=root)


def _without_suffix(path: PurePath) -> PurePath:
    suffix = suffix_of(path.name) or TOKENS_SUFFIX
    return path.with_name(path.name[: -len(suffix)] or path.name)


def of_another_split(names: Sequence[str], split: str) -> list[str]:
    """The file names that are left out of a split, if only the names are known."""
    try:
        read = set(choose([_without_suffix(PurePath(name)) for name in names], split).read)
    except UnclearSplit:
        read = set()
    return [name for place, name in enumerate(names) if place not in read]


def stand_ins(place: SourceFiles) -> list[str]:
    """A problem for each local file that a download left in place of the data, and for each empty token file."""
    problems = []
    for path in place.files:
        size_bytes = path.stat().st_size
        if place.kind == "tokens" and not size_bytes:
            problems.append(f"{path} is empty, 0 bytes: replace the file or leave it out.")
        may_be = size_bytes < HEAD_BYTES or place.kind == "tokens"
        if may_be and (what := stand_in_at(path, pages=path.suffix.lower() != ".txt")):
            problems.append(f"{path} cannot be read ({what}).")
    return problems


def tell_left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    """Counts and names of the files that `SourceFiles.left_out` gives; empty if there are none."""
    return "; ".join(f"{len(names):,} of {reason}: {shortened(names)}" for reason, names in left_out.items() if names)


def _files_under(root: Path) -> list[Path]:
    """All files of a folder and its subfolders, sorted; without hidden ones, following links, each folder once."""
    if not root.is_dir():
        return [root]

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


class DocumentStream:
    """The documents of a source, in a fixed order, from a position on."""

    def __init__(
        self,
        made_from: dict[str, Any],
        read: Callable[[Any], Iterator[tuple[str, Any]]],
        mark: Any,
        names: list[str] | None = None,
    ) -> None:
        """Begin at a mark.

        Args:
            made_from: data that distinguish this source from others.
            read: gives its documents with their marks.
            mark: where to begin.
            names: names of the files; None if the documents do not come from files.
        """
        self.made_from, self._read, self._mark, self._names = made_from, read, mark, names

    def __iter__(self) -> Iterator[str]:
        """The documents after the last one yielded; "" for one that is empty, null or undecodable.

        Raises:
            DataError: for a damaged or unreadable file, a missing column (with the columns there are), a silent hub.
        """
        for text, mark in self._read(self._mark):
            self._mark = mark
            yield text

    def find(self, places: Sequence[int]) -> list[str]:
        """File and row of the documents at these places in the stream, counted from 0; reads up to the last one."""
        found: dict[int, str] = {}
        first_row: dict[str, int] = {}
        for place, (_, mark) in enumerate(islice(self._read(self._mark), max(places) + 1)):
            name = self._names[mark[0]] if self._names else "the built-in source"
            row = place - first_row.setdefault(name, place) + 1
            if place in places:
                is_lines = (suffix_of(name) or "").startswith(".jsonl")
                found[place] = f"{name}, {f'line {mark[2]:,}' if is_lines else f'row {row:,}'}"
        return [found[place] for place in places]

    def position(self) -> dict[str, Any]:
        """Where the document after the last one yielded begins, as plain JSON data."""
        return {"made_from": self.made_from, "mark": self._mark}


def documents(
    source: Source,
    replacement: Path | None = None,
    position: dict[str, Any] | None = None,
    report: Report = _quiet,
    as_json: bool = False,
    builtin: Callable[[], Sequence[str]] = builtin_documents,
) -> DocumentStream:
    """The documents of a source, from its beginning or from a position of an earlier stream on.

    The sequence is the same, no matter how many times reading was interrupted. `report` takes a line for every try that
    fails. With `as_json` the column holds lists or tables, and a document is one of them as JSON; `builtin` gives the
    documents of a built-in source.

    Raises:
        DataError: a place is missing, files are token files, the hub does not answer, or a position is in other files.
    """
    place = locate(source, replacement, report)
    say = _once(lambda line: report(f"{source.name}: {line}"))
    files: list[TextFile] = []
    if place.kind == "tokens":
        raise DataError(
            f"source {source.name!r} holds token ids, no text to train a tokenizer on: set tokenizer.kind to the one "
            "that made them, 'hf' or 'cl100k'."
        )

    # `made_from` shows later whether a position belongs to this text.
    if place.kind == "builtin":
        texts = builtin()
        made_from: dict[str, Any] = {"kind": OLD_WORD, "sha256": _sha256(texts)}
        read: Callable[[Any], Iterator[tuple[str, Any]]] = partial(_read_builtin, texts)
        start: Any = 0
    elif place.kind == "hub":
        hub = Hub(source, report)
        commit = hub.commit((position or {}).get("made_from", {}).get("commit") or source.revision)
        made_from = {"commit": commit, **source.model_dump(include={"kind", "id", "config", "split", "column"})}
        files, start = hub.text_files(commit), [0, *START]
        read = partial(_read_files, files, source.column, as_json, say)
    elif place.kind == "text":
        files = [TextFile(str(path), partial(path.open, "rb")) for path in place.files]
        made_from = {"kind": "files", "column": source.column, "sha256": _sha256(place.file_sizes())}
        read, start = partial(_read_files, files, source.column, as_json, say), [0, *START]
    else:
        assert_never(place.kind)

    names = [file.name for file in files]
    if position is None:
        return DocumentStream(made_from, read, start, names)
    if position.get("made_from") != made_from:
        raise DataError(
            f"source {source.name!r}: its text is not what it was when reading it was interrupted (other files, names "
            "or sizes): bring that back, or remove the source's prepared folder to begin anew."
        )
    return DocumentStream(made_from, read, position["mark"], names)


def _once(report: Report) -> Report:
    """A report that takes each line once."""
    told: set[str] = set()

    def say(line: str) -> None:
        if line not in told:
            told.add(line)
            report(line)

    return say


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_builtin(texts: Sequence[str], mark: int) -> Iterator[tuple[str, int]]:
    for place in range(mark, len(texts)):
        yield texts[place], place + 1


def _read_files(
    files: Sequence[TextFile], column: str, as_json: bool, say: Report, mark: Sequence[int]
) -> Iterator[tuple[str, list[int]]]:
    """The documents of many files; a mark is the file's place and the mark in it."""
    first, *within = mark
    begin: Cursor = (within[0], within[1])
    for place in range(first, len(files)):
        for text, end in read_documents(files[place], column, begin, as_json, say):
            yield text, [place, *end]
        begin = START
