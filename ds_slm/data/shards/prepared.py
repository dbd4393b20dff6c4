"""Token shards on disk: what the manifests say, every byte against its hash, and the tokens as memory maps.

    folder --open_prepared--> Prepared --tokens--> Tokens: a split's shards, one after the other
           --verify--> every shard read and compared with its manifest

Layout: DATA_ROOT/NAME/tokenizer/ and DATA_ROOT/NAME/SOURCE/{train,val}-00000.bin, ... + manifest.json; little-endian
uint16, or uint32 where the vocabulary needs it, EOS after each document. The manifest comes last: what has one is
whole.

Opening reads manifests, file sizes and the tokenizer. A shard is read and compared with its hash if its size,
times of change or inode differ from when it was last found right (.verified.json; git's index works the same way). An
edited shard is refused; one from another host is checked once, by one process while the others of its host wait.
Checking data that are right takes no lock. Where nothing can be written they are checked at every launch, with a note.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.shards.identity import TOKENIZER, conflicts, read_manifest
from ds_slm.data.shards.journal import SPLITS, Split
from ds_slm.data.shards.writer import decode_documents
from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.errors import DataError
from ds_slm.files import locked, read_json, sha256_of, sha256_of_json, write_json
from ds_slm.recipe.schema import Recipe

STAMPS = ".verified.json"


class Tokens:
    """The tokens of one split of a source: its shards one after the other, as memory maps."""

    def __init__(self, paths: list[Path], dtype: np.dtype) -> None:
        """Opens the files; reads nothing of them."""
        self._paths = paths
        self._maps = [np.memmap(path, dtype, mode="r").view(np.ndarray) for path in paths]  # memmap's slices are slow
        self._ends = list(accumulate(len(shard) for shard in self._maps))

    def __len__(self) -> int:
        """Tokens of all shards."""
        return self._ends[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        """Consecutive tokens, across the borders of shards."""
        begin, end, _ = span.indices(len(self))
        pieces = []
        number = bisect_right(self._ends, begin)
        while begin < end:
            shard_begin = self._ends[number] - len(self._maps[number])
            pieces.append(self._maps[number][begin - shard_begin : end - shard_begin])
            begin, number = self._ends[number], number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self._maps[0][:0]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All tokens in memory."""
        return np.asarray(self[:], dtype=dtype)

    def place(self, position: int) -> tuple[Path, int]:
        """The file that holds the token at a position, and its place there."""
        number = bisect_right(self._ends, position)
        return self._paths[number], position - (self._ends[number] - len(self._maps[number]))


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
        """The id with which rows are filled up."""
        return self.tokenizer_manifest["pad_id"]

    @property
    def sha256(self) -> str:
        """One hash of the tokenizer and all shards: equal if the same rows will be read, wherever they come from."""
        return self._sha256_with(self.tokenizer_sha256)

    @property
    def older_sha256s(self) -> dict[str, str]:
        """The hashes that an older version gave the same tokenizer and data, by name; empty if they are the same.

        Older versions left padding, truncation and dropout of a tokenizer on, and hashed them.
        """
        older = self.tokenizer_manifest.get("older_sha256")
        return {"tokenizer_sha256": older, "data_sha256": self._sha256_with(older)} if older else {}

    def _sha256_with(self, tokenizer_sha256: str) -> str:
        shards = [[name, manifest["dtype"], manifest["shards"]] for name, manifest in self.manifests.items()]
        return sha256_of_json([tokenizer_sha256, *shards])

    @property
    def replaced_sources(self) -> list[str]:
        """Sources that were read from other local files than the recipe names."""
        return [name for name, manifest in self.manifests.items() if manifest["replaced"]]

    @property
    def max_tokens(self) -> int | None:
        """The --max-tokens at which a source was cut; None if only the run's length decided."""
        return next((cut for manifest in self.manifests.values() if (cut := manifest.get("max_tokens"))), None)

    def summary(self) -> dict[str, Any]:
        """What was prepared, for people and --json."""
        names = ("train_tokens", "val_tokens", "val_bytes", "vocab_size", "sha256")
        return {"folder": str(self.folder), **{name: getattr(self, name) for name in names}}

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources, EOS included."""
        return self._count("train")

    @property
    def val_tokens(self) -> int:
        """Held-out tokens of all sources, EOS included."""
        return self._count("val")

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the held-out text; EOS tokens do not count.

        Raises:
            DataError: the data have no text, so nothing can be measured for each byte.
        """
        total = sum(manifest["bytes"]["val"] for manifest in self.manifests.values())
        if not total:
            raise DataError(
                f"{self.folder}: what is held out holds no text, only control tokens: {_again(self.folder)}."
            )
        return total

    def _count(self, split: Split) -> int:
        return sum(shard["tokens"] for manifest in self.manifests.values() for shard in manifest["shards"][split])

    def val_text(self) -> str:
        """The held-out text, decoded from its tokens, documents one after the other."""
        tokenizer = load_tokenizer(self.tokenizer_folder)
        return "".join(decode_documents(tokenizer, np.asarray(tokens)) for tokens in self.tokens("val"))

    def tokens(self, split: Split) -> list[Tokens]:
        """A split's tokens of each source, in the recipe's order."""
        return [
            Tokens(
                [self.folder / name / shard["file"] for shard in manifest["shards"][split]],
                np.dtype(manifest["dtype"]).newbyteorder("<"),
            )
            for name, manifest in self.manifests.items()
        ]

    def shard_files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every shard file with its entry in the manifest."""
        for name, manifest in self.manifests.items():
            for split in SPLITS:
                yield from ((self.folder / name / shard["file"], shard) for shard in manifest["shards"][split])


def _quiet(line: str) -> None:
    """A report that discards its lines."""


def open_prepared(
    recipe: Recipe,
    folder: Path,
    encoding: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = _quiet,
) -> Prepared:
    """Open what `prepare` has made, reading only manifests, file sizes and the tokenizer.

    Args:
        recipe: the recipe that was prepared.
        folder: the folder of its prepared data.
        encoding: everything that decided the encoding, except the recipe.
        report: takes a line if shards are checked at every launch.

    Raises:
        DataError: data are missing, cut short, of another recipe or another tokenizer.
    """
    expected = [TOKENIZER, *(source.name for source in recipe.data.source)]
    manifests = {part: manifest for part in expected if (manifest := read_manifest(folder / part))}
    if missing := [part for part in expected if part not in manifests]:
        raise DataError(f"{folder} lacks {', '.join(missing)}: run ds-slm prepare {folder.name}.")
    refuse(conflicts(recipe, folder, {}, encoding or {}))

    tokenizer_manifest, tokenizer = manifests.pop(TOKENIZER), load_tokenizer(folder / TOKENIZER)
    problems = _tokenizer_problems(folder, tokenizer, tokenizer_manifest, manifests)

    # An older version hashed the tokenizer with settings that are switched off now.
    if not problems and tokenizer_manifest["sha256"] != tokenizer.sha256:
        tokenizer_manifest |= {"sha256": tokenizer.sha256, "older_sha256": tokenizer.older_sha256}
        report(
            f"warning: {folder} was prepared by an older version, which used its tokenizer with "
            f"{', '.join(tokenizer.switched_off)}: its shards may hold other ids than their text has now. A run on "
            "them goes on; for a new one name another --data-root"
        )

    prepared = Prepared(folder, tokenizer_manifest=tokenizer_manifest, manifests=manifests)
    refuse([*problems, *(_size_problems(prepared) or _changed_shards(prepared, report))])
    return prepared


def verify(prepared: Prepared) -> None:
    """Read every shard and compare its hash with the manifest. Raises DataError naming all that differ."""
    refuse(_size_problems(prepared) or _differing(prepared, {}, _quiet))


def _changed_shards(prepared: Prepared, report: Callable[[str], None]) -> list[str]:
    """Read the shards that changed since they were last found right; a problem for each that is wrong."""
    stamps = _read_stamps(prepared.folder)
    if all(stamps.get(name) == _stamp(path, shard["sha256"]) for name, path, shard in _named_shards(prepared)):
        return []
    with ExitStack() as held:
        with suppress(OSError):  # if nothing can be written, every process reads for itself
            held.enter_context(locked(prepared.folder, report))
        return _differing(prepared, _read_stamps(prepared.folder), report)


def _differing(prepared: Prepared, trusted: Mapping[str, Any], report: Callable[[str], None]) -> list[str]:
    """Read all shards except trusted ones; a problem for each that does not match its manifest."""
    problems = []
    found_right = {}
    for name, path, shard in _named_shards(prepared):
        found_right[name] = _stamp(path, shard["sha256"])
        if trusted.get(name) == found_right[name]:
            continue

        found = sha256_of(path)
        if found != shard["sha256"]:
            del found_right[name]
            problems.append(
                f"{path} was changed: sha256 {found}, its manifest says {shard['sha256']}: {_again(path.parent)}."
            )

    # With the stamps, the next launch need not read the shards.
    if found_right != trusted and (unwritten := _write_stamps(prepared.folder, found_right)):
        size_gb = sum(shard["bytes"] for _, shard in prepared.shard_files()) / 1e9
        report(
            f"warning: {prepared.folder} cannot be written to ({unwritten}): its shards, {size_gb:.2g} GB, are read "
            "and compared with their hashes at every launch"
        )
    return problems


def _named_shards(prepared: Prepared) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Every shard with its name among the stamps."""
    for path, shard in prepared.shard_files():
        yield str(path.relative_to(prepared.folder)), path, shard


def _stamp(path: Path, sha256: str) -> list[Any]:
    found = path.stat()  # a copy may keep size and time of change, but not the inode and the time it changed
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, sha256]


def _read_stamps(folder: Path) -> dict[str, Any]:
    return read_json(folder / STAMPS) or {}


def _write_stamps(folder: Path, stamps: dict[str, Any]) -> str | None:
    """Write the stamps; returns why that failed, in which case the shards are read again the next time."""
    try:
        write_json(folder / STAMPS, stamps)
    except OSError as error:
        return error.strerror or str(error)
    return None


def stamp_written(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Remember that a source's shards were just written as its manifest says."""
    written = {
        f"{name}/{shard['file']}": _stamp(folder / name / shard["file"], shard["sha256"])
        for split in SPLITS
        for shard in manifest["shards"][split]
    }
    _write_stamps(folder, _read_stamps(folder) | written)


def refuse(problems: list[str]) -> None:
    """Raise DataError if there are problems."""
    if problems:
        raise DataError(problems)


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare again"


def _size_problems(prepared: Prepared) -> list[str]:
    problems = []
    for path, shard in prepared.shard_files():
        if path.is_symlink():
            problems.append(
                f"{path} is a link, expected the shard itself: copy what it leads to in its place, or let the whole "
                f"folder {path.parent} be a link."
            )
            continue
        size_bytes = path.stat().st_size if path.is_file() else 0
        if size_bytes != shard["bytes"]:
            state = "was cut short" if size_bytes < shard["bytes"] else "has grown"
            problems.append(f"{path} {state}: {size_bytes} bytes where {shard['bytes']} belong; {_again(path.parent)}.")
    return problems


def _tokenizer_problems(
    folder: Path, tokenizer: Tokenizer, manifest: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Problems if the tokenizer is not the one in its manifest, or if sources were made with another."""
    found, expected = tokenizer.sha256, manifest["sha256"]
    if not tokenizer.has_sha256(expected):
        return [f"{folder / TOKENIZER} was changed: sha256 {found}, not {expected}; {_again(folder)}."]
    return [
        f"{folder / name} was made with the tokenizer {source['tokenizer_sha256']}, and the one beside it is "
        f"{expected}: {_again(folder / name)}."
        for name, source in sources.items()
        if not tokenizer.has_sha256(source["tokenizer_sha256"])
    ]
