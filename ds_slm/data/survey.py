"""The amount of text, before anything is prepared: bytes, documents, approximate tokens, and what to hold out.

    a source --documents--> counted one by one; its first SAMPLE_BYTES --tokenizer--> bytes a token --> Text

All of the text is read once, so that a damaged file or a missing column is found here and not in the middle of a run.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ds_slm.data.shards.writer import HASHES, hash_position
from ds_slm.data.sources.documents import documents
from ds_slm.data.tokenizers.bpe_training import train_bpe
from ds_slm.data.tokenizers.byte_level import GPT2_PATTERN, bulk_encoder, by_rank
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.own_text import Text
from ds_slm.recipe.schema import Recipe

SAMPLE_BYTES = 4 << 20
"""Bytes of text on which the bytes of a token are measured."""
SAMPLE_VOCAB = 32_000
"""Size of the largest vocabulary that is learned from the sample; it stands for larger ones."""
HELD_OUT = 0.02
"""Share of the text that is held out if there are many documents."""
FEW_DOCUMENTS = 2_000
"""Up to this number of documents, the position of each one matters for the held-out share, so all are looked at."""
LEAST_HELD_OUT, MOST_HELD_OUT = 0.005, 0.5
FRACTION_DIGITS = 6


def survey(source: Source, recipe: Recipe) -> Text:
    """Read all of a source's text.

    Args:
        source: a file or a folder of text.
        recipe: the recipe in whose vocabulary tokens are counted.

    Raises:
        DataError: the text cannot be read, or no part of it can be held out.
    """
    sample: list[str] = []
    sampled_bytes = text_bytes = count = empty = 0
    positions: list[tuple[float, int]] = []
    for text in documents(source):
        if not text.strip():
            empty += 1
            continue
        size_bytes = len(text.encode())
        count += 1
        text_bytes += size_bytes

        if count <= FEW_DOCUMENTS + 1:
            positions.append((hash_position(text, recipe.data.split_seed) / HASHES, size_bytes))
        if sampled_bytes < SAMPLE_BYTES:
            sample.append(text[: SAMPLE_BYTES - sampled_bytes])
            sampled_bytes += len(sample[-1].encode())

    if not count:
        raise DataError(f"{source.path} holds no text: every document is empty.")
    is_cut = count == 1 and not empty  # one document alone is cut in two
    if is_cut or count > FEW_DOCUMENTS:
        fraction, share, held_out = HELD_OUT, HELD_OUT, 0 if is_cut else round(HELD_OUT * count)
    else:
        fraction, share, held_out = _fraction(positions)
    return Text(
        path=str(source.path), column=source.column, documents=count, text_bytes=text_bytes,
        **_measure(sample, recipe), val_fraction=fraction, held_out_share=share, beginnings=_beginnings(sample),
        held_out_documents=held_out, split=source.split,
    )  # fmt: skip


def _fraction(positions: Sequence[tuple[float, int]]) -> tuple[float, float, int]:
    """The `val_fraction` that holds out nearest to HELD_OUT of the bytes, the share of them, and how many documents."""
    ordered = sorted(positions)
    whole = sum(size_bytes for _, size_bytes in ordered)
    shares = [held / whole for held in accumulate(size_bytes for _, size_bytes in ordered)]

    # Somewhere between two documents' positions, so that no rounding moves one across.
    borders = [(one + other) / 2 for (one, _), (other, _) in pairwise(ordered)]
    choices = [
        (abs(share - HELD_OUT), round(border, FRACTION_DIGITS), share, number)
        for number, (border, share, ((one, _), (other, _))) in enumerate(
            zip(borders, shares, pairwise(ordered), strict=False), start=1
        )
        if one < round(border, FRACTION_DIGITS) <= other and LEAST_HELD_OUT <= share <= MOST_HELD_OUT
    ]
    if not choices:
        raise DataError(
            f"{len(ordered):,} documents cannot be parted into some to train on and some to hold out: one of them is "
            "most of the text, or they are the same. Cut it into smaller files, each of which is one document."
        )
    _, fraction, share, held_out = min(choices)
    return fraction, share, held_out


def _measure(sample: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The size of a sample's vocabulary, at most the recipe's; and the mean bytes of a token in it."""
    section = recipe.tokenizer
    sample_bytes = sum(len(text.encode()) for text in sample)

    # A model that is trained further has its tokenizer.
    if section.kind == "hf" and section.path and Path(section.path).is_dir():
        tokenizer = build_tokenizer(recipe, lambda source: iter(()))
        tokens = sum(map(len, tokenizer.encode_batch(sample)))
        return {"learnable_ids": section.vocab_size, "bytes_per_token": sample_bytes / tokens}

    # A tokenizer that is learned from the sample stands for any other.
    size = min(section.vocab_size, SAMPLE_VOCAB) - len(section.special_tokens)
    learned, _ = train_bpe(sample, size, section.min_frequency)

    backend = by_rank({token: rank for rank, token in enumerate(learned)}, {}, (), GPT2_PATTERN)
    encode = bulk_encoder(backend)
    assert encode is not None, "a vocabulary of ranks"
    tokens = sum(map(len, encode(sample)))
    return {
        "learnable_ids": len(learned) + len(section.special_tokens),
        "bytes_per_token": sample_bytes / tokens,
    }


def _beginnings(sample: Sequence[str], documents: int = 2, words: int = 5) -> tuple[str, ...]:
    firsts = (" ".join(text.split()[:words])[:60] for text in sample)
    return tuple(dict.fromkeys(first for first in firsts if first))[:documents]
