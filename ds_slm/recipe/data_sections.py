"""The sections of a recipe that say what is read: tokenizer, sources, and what of them is held out.

Written as in sections.py: the string under a field is its description, and a new field is marked NEWER.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    FieldSerializationInfo,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from ds_slm.recipe.section import HASHED, Section, raise_together

BYTES = 256
LEGACY_SEEDS = range(1 << 32)
"""What numpy's legacy generator takes for a seed."""
MIX_ENTRIES = 1_000_000
"""Rows of one cycle of the mix at most: it is held in memory."""
SmallInt = Annotated[PositiveInt, Field(lt=1 << 31)]


class Tokenizer(Section):
    """How text becomes ids."""

    kind: Literal["bpe", "cl100k", "hf"]
    """bpe: byte-level BPE trained on the sources; cl100k: tiktoken's ranks; hf: an existing tokenizer."""
    vocab_size: PositiveInt
    """Ids, control tokens included."""
    special_tokens: dict[str, int] = {}
    """Control tokens and their ids."""
    eos_token: str = "<|endoftext|>"
    """Ends every document."""
    pad_token: str = "<|endoftext|>"
    """Fills rows up; never trained on."""
    min_frequency: PositiveInt = 2
    """bpe: a merge must have been seen this often."""
    documents_per_weight: SmallInt = 2_000_000
    """bpe: trained on the first documents_per_weight x weight documents of each source."""
    path: str | None = None
    """hf: a local folder, a tokenizer.model, or a hub id; cl100k: a local ranks file instead of the download."""

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        problems = [
            f"special_tokens: {token!r} = {token_id} lies outside 0..{self.vocab_size - 1}: choose an id within"
            for token, token_id in self.special_tokens.items()
            if not 0 <= token_id < self.vocab_size
        ]
        if len(set(self.special_tokens.values())) < len(self.special_tokens):
            problems.append("special_tokens: two tokens have the same id: give each its own")

        smallest = BYTES + len(self.special_tokens)
        if self.kind == "bpe":
            problems += [
                f"{role}_token = {token!r} is none of special_tokens: give it an id there"
                for role, token in (("eos", self.eos_token), ("pad", self.pad_token))
                if token not in self.special_tokens
            ]
        if self.kind == "bpe" and self.vocab_size < smallest:
            problems.append(
                f"vocab_size = {self.vocab_size} is too small for byte-level BPE: {BYTES} bytes and the special tokens "
                f"need {smallest}"
            )

        if self.kind == "hf" and not self.path:
            problems.append("kind = 'hf' names no path: add a folder, a tokenizer.model or a hub id")

        raise_together(problems)
        return self


OLD_WORD = "embedded"
"""What version 0.1 called the builtin kind of source."""


class Source(Section):
    """One corpus of documents."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """A slug: the folder of its shards."""
    kind: Literal["builtin", "files", "hub", "tokens"]
    """builtin: the documentation every installation has; files: local text; hub: a dataset; tokens: raw ids."""
    id: str | None = None
    """hub: the dataset's id."""
    config: str | None = None
    """hub: the dataset's configuration."""
    split: str = Field("train", min_length=1)
    """The split that is read, by its name on the hub or in the names of local files (sources/splits.py); "all" reads
    every file."""
    column: str = "text"
    """The column that holds the text."""
    path: str | None = None
    """files, tokens: a file or a folder."""
    dtype: Literal["uint16", "uint32"] | None = None
    """tokens: of the files' ids; by default the smallest that holds the vocabulary."""
    revision: str | None = None
    """hub: a branch, tag or commit; by default the newest state there is when the source is prepared."""
    weight: SmallInt = 1
    """Integer share of the mix."""

    @field_validator("kind", mode="before")
    @classmethod
    def _new_word(cls, kind: Any) -> Any:
        return "builtin" if kind == OLD_WORD else kind

    @field_serializer("kind")
    def _old_word_in_hashes(self, kind: str, info: FieldSerializationInfo) -> str:
        return OLD_WORD if kind == "builtin" and info.context == HASHED else kind

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        missing = {"hub": not self.id, "files": not self.path}.get(self.kind, False)
        if self.kind == "tokens":
            missing = not (self.path or self.id)
        wanted = {"hub": "id", "files": "path", "tokens": "path or id"}.get(self.kind)
        problem = f"source {self.name!r} of kind {self.kind!r} names no {wanted}: add it"
        problems = [problem] if missing else []
        if self.name in ("tokenizer", "tokenizer.tmp"):
            problems.append(f"source name {self.name!r} is the tokenizer's folder beside the sources': choose another")
        raise_together(problems)
        return self


class Data(Section):
    """Where rows come from."""

    seq_len: PositiveInt
    """Targets in a row, in tokens."""
    val_fraction: float = Field(0.001, gt=0, lt=1)
    """Share of documents held out."""
    held_out: Literal["hash", "draw"] = "hash"
    """hash: those whose keyed hash says so; draw: one draw of numpy's legacy generator for each row, in order."""
    split_seed: int = 0
    """Any whole number for hash; one from 0 to 2^32 - 1 for draw."""
    source: list[Source] = Field(min_length=1)
    """The corpora, a table each."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [source.name for source in self.source]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems = [f"source name {name!r} is used twice: rename one" for name in twice]

        if self.held_out == "draw" and self.split_seed not in LEGACY_SEEDS:
            problems.append(
                f"split_seed = {self.split_seed} is no seed of held_out = 'draw': choose one from 0 to "
                f"{LEGACY_SEEDS.stop - 1}"
            )

        weights = [source.weight for source in self.source]
        if (entries := sum(weights) // math.gcd(*weights)) > MIX_ENTRIES:
            problems.append(
                f"source weights add up to {entries:,} without their common divisor, and one cycle of the mix has at "
                f"most {MIX_ENTRIES:,} rows: round them"
            )

        raise_together(problems)
        return self
