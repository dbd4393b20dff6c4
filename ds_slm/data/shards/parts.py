"""The parts of a recipe's data: its tokenizer, and the shards of each source.

text --make_tokenizer--> tokenizer.tmp/ --rename--> tokenizer/
text, or ids --make_shards--> shards, with a journal; then manifest.json, which says that they are whole
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.shards.identity import (
    FORMAT,
    LEFT_OUT,
    MANIFEST,
    TOKENIZER,
    read_manifest,
    source_identity,
    tokenizer_identity,
)
from ds_slm.data.shards.journal import JOURNAL, SPLITS, ShardsInProgress, id_dtype
from ds_slm.data.shards.prepared import stamp_written
from ds_slm.data.shards.progress import Amount, Progress
from ds_slm.data.shards.writer import (
    Destination,
    DocumentFormat,
    split_documents,
    write_documents,
    write_token_files,
)
from ds_slm.data.sources.documents import DocumentStream, SourceFiles, documents, locate
from ds_slm.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, existing_tokenizer, load_tokenizer
from ds_slm.errors import DataError
from ds_slm.files import fsync, new_folder, write_json
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.schema import Recipe

TOKENIZER_BYTES_PER_TOKEN = 5
"""A trained tokenizer sees at most about the text that the run reads: this many bytes for each token of the run."""


@dataclass(frozen=True)
class Preparation:
    """What is prepared, from which sources, and how far."""

    recipe: Recipe
    folder: Path
    replacements: Mapping[str, Path]
    """Local files in place of a source, by its name."""
    limits: Mapping[str, float]
    """Training tokens at which a source may be cut, by its name."""
    max_tokens: int | None
    """The number from which the limits were made, if a user asked for less than the run reads."""
    document_format: DocumentFormat
    report: Callable[[str], None]

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer, made if it is missing: the recipe's, or the one in the format's folder."""
        recipe, folder, tokenizer_from = self.recipe, self.folder, self.document_format.tokenizer_folder
        target = folder / TOKENIZER
        if read_manifest(target):
            return load_tokenizer(target)

        def training_texts(source: Source) -> Iterator[str]:
            texts = documents(source, self.replacements.get(source.name), report=self.report)
            limit_bytes = left_bytes = tokenizer_bytes(self.limits[source.name])
            for split, text in split_documents(texts, recipe.data):
                if split == "train" and text:
                    yield text
                    left_bytes -= len(text.encode())
                    if left_bytes <= 0:
                        cut_at_bytes[source.name] = limit_bytes
                        break

        cut_at_bytes: dict[str, float] = {}

        if tokenizer_from is None:
            self.report(f"{TOKENIZER}: {recipe.tokenizer.kind}, {recipe.tokenizer.vocab_size} ids")
            tokenizer = build_tokenizer(recipe, training_texts, self.report)
        else:
            self.report(f"{TOKENIZER}: that of {tokenizer_from}")
            tokenizer = existing_tokenizer(tokenizer_from, recipe.tokenizer)

        # The folder gets its name once all of it is on the disk.
        temporary = folder / f"{TOKENIZER}.tmp"
        new_folder(temporary)
        tokenizer.save(temporary)

        manifest = {
            "format": FORMAT,
            "identity": tokenizer_identity(recipe),
            "sha256": tokenizer.sha256,
            "older_sha256": tokenizer.older_sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "cut_at_bytes": cut_at_bytes,
            "text": text_of(recipe, self.replacements) if tokenizer_from is None else {},
        }

        write_json(temporary / MANIFEST, manifest)
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        temporary.rename(target)
        fsync(folder)
        return tokenizer

    def make_shards(self, source: Source, files: SourceFiles, tokenizer: Tokenizer) -> None:
        """The shards of one source and, last, its manifest."""
        recipe, document_format, report = self.recipe, self.document_format, self.report
        replacement, token_limit = self.replacements.get(source.name), self.limits[source.name]

        target = self.folder / source.name
        dtype = document_format.dtype or id_dtype(tokenizer.vocab_size)
        described = {
            "identity": {**source_identity(recipe, source), **document_format.identity},
            "kind": files.kind,
            "replaced": replacement is not None,
            "files": files.file_sizes(),
            "newest_change_ns": files.newest_change_ns(),
            "tokenizer_sha256": tokenizer.sha256,
            **document_format.version,
        }

        # A journal is used only under the same description and limit.
        shards = ShardsInProgress(target, dtype, {**described, "token_limit": token_limit})
        if shards.position is not None:
            report(f"{source.name}: goes on behind {shards.tokens('train'):,} training tokens")
        done = Amount(shards.tokens("train") + shards.tokens("val"), sum(shards.totals.text_bytes.values()))

        try:
            wanted = Amount(token_limit, files.text_bytes())
            with Progress(source.name, wanted, report, done) as progress:
                to = Destination(source.name, shards, tokenizer, recipe.data, token_limit, progress)
                if files.kind == "tokens" and document_format.as_json:
                    raise DataError(f"source {source.name!r} holds token ids ({files.files[0]}), no conversations.")
                if files.kind == "tokens":
                    file_dtype = (
                        np.dtype(source.dtype).newbyteorder("<") if source.dtype else id_dtype(tokenizer.vocab_size)
                    )
                    written = write_token_files(to, files.files, file_dtype)
                else:

                    def stream_from(position: dict[str, Any] | None) -> DocumentStream:
                        return documents(
                            source, replacement, position, report, document_format.as_json, document_format.builtin
                        )

                    written = write_documents(to, stream_from, document_format)
        except BaseException:
            shards.abandon()
            raise

        # Shards without a manifest count as unfinished, so it comes last.
        fsync(target)
        manifest = {"format": FORMAT, **described, "dtype": dtype.name, LEFT_OUT: files.left_out(), **written}
        manifest["max_tokens"] = self.max_tokens
        stamp_written(self.folder, source.name, manifest)
        write_json(target / MANIFEST, manifest)
        (target / JOURNAL).unlink(missing_ok=True)

        tokens = {split: sum(shard["tokens"] for shard in written["shards"][split]) for split in SPLITS}
        report(f"{source.name}: {tokens['train']:,} training and {tokens['val']:,} held-out tokens")


def text_of(recipe: Recipe, replacements: Mapping[str, Path]) -> dict[str, Any]:
    """The local text from which a tokenizer is trained: names and sizes of each source's files."""
    if recipe.tokenizer.kind != "bpe":
        return {}
    found = {}
    for source in recipe.data.source:
        with suppress(DataError):  # reported when it is read
            found[source.name] = locate(source, replacements.get(source.name)).file_sizes()
    return found


def tokenizer_bytes(token_limit: float) -> float:
    """The most bytes of a source's text that a trained tokenizer sees."""
    return token_limit * TOKENIZER_BYTES_PER_TOKEN
