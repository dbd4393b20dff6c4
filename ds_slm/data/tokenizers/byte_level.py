"""Byte-level BPE by rank: kept as a Hugging Face tokenizer, and encoded in bulk by tiktoken, several times faster.

    vocabulary --> merges by rank --> tokenizers.Tokenizer --save, load--> bulk_encoder --> tiktoken, with the same ids

tiktoken takes a piece that is a token as it is; otherwise it joins the two neighbours whose union has the lowest id.
`tokenizers` does the second with P = {(l, r): l + r is a token} as merges, ordered by the id of l + r. It does the
first with `ignore_merges`, or without it if the merges lead to every token anyway. tiktoken is used for a tokenizer
whose file says exactly that, `tokenizers` itself for any other.

Source: src/lib.rs of openai/tiktoken. Known gaps: tiktoken's regex engine gives up within a million characters of white
space; texts with LONGEST_SPACE of them in a row are left to `tokenizers`.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ds_slm.data.background import in_background, result_of

if TYPE_CHECKING:
    import tokenizers

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""tiktoken's older one: the engine of `tokenizers` reads the newer one's possessive quantifiers differently."""
PATTERNS = (GPT2_PATTERN, CL100K_PATTERN)
"""The patterns that both engines are known to read in the same way."""
LONGEST_SPACE = 500_000
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_SPACE}}}")


def byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Bytes that are printable in Latin-1 stand for themselves; characters from U+0100 on stand for the others, in order.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


def filler(token_id: int) -> str:
    """The entry in the vocabulary for an id that no text gives."""
    return f"<|unused_{token_id}|>"


def by_rank(
    tokens: Mapping[str, int],
    others: Mapping[str, int],
    specials: Iterable[str],
    pattern: str,
    ignore_merges: bool = False,
) -> "tokenizers.Tokenizer":
    """A tokenizer whose special tokens already stand in the vocabulary, under the ids they must have.

    Args:
        tokens: the tokens of which text is made, in byte letters; a lower id is joined first.
        others: the rest of the vocabulary.
        specials: the control tokens among the others.
        pattern: cuts text into pieces.
        ignore_merges: take a piece that is in the vocabulary as it is; then none of the others may be a piece.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab={**tokens, **others}, merges=_merges(tokens), ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def _merges(tokens: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = sorted(
        (rank, tokens[token[:cut]], tokens[token[cut:]], token[:cut], token[cut:])
        for token, rank in tokens.items()
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    )
    return [(left, right) for *_, left, right in merges]


def bulk_encoder(backend: "tokenizers.Tokenizer") -> Callable[[Sequence[str]], list[list[int]]] | None:
    """tiktoken with the same ids for any text, or None if `by_rank` did not make the tokenizer.

    The tokenizer itself encodes the texts that tiktoken cannot; it must not parse control tokens.
    """
    import tiktoken

    tokens, pattern = _ranks(backend)
    if not tokens:
        return None
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes(bytes_of[letter] for letter in token): rank for token, rank in tokens.items()}
    encoding = tiktoken.Encoding("by rank", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    threads = len(os.sched_getaffinity(0))

    def encode_one(text: str) -> list[int]:
        if len(text) >= LONGEST_SPACE and _LONG_SPACE.search(text):
            return backend.encode(text, add_special_tokens=False).ids
        return encoding.encode_ordinary(text)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = [[]] * len(texts)
        waiting = iter(range(len(texts)))

        def work() -> None:
            for place in waiting:
                encoded[place] = encode_one(texts[place])

        # tiktoken's own threads are not used: the end of the process would wait for all their texts.
        for thread in [in_background(work) for _ in range(threads)]:
            result_of(thread)
        return encoded

    return encode


def _ranks(backend: "tokenizers.Tokenizer") -> tuple[dict[str, int], str]:
    """The tokens of which text is made, and the pattern; no tokens if tiktoken's ids could differ."""
    content = json.loads(backend.to_str())
    try:
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        vocab, ignore_merges = content["model"]["vocab"], content["model"]["ignore_merges"]
    except (KeyError, TypeError, IndexError):
        return {}, ""

    specials = [token["content"] for token in content["added_tokens"]]
    others = {token: number for token, number in vocab.items() if token in specials or token == filler(number)}
    tokens = {token: number for token, number in vocab.items() if token not in others}
    letters = set(byte_letters())
    if (
        pattern not in PATTERNS
        or not letters <= tokens.keys()
        or not all(letters.issuperset(token) for token in tokens)
    ):
        return {}, ""

    # The rest of the file could change ids as well, so it must be what `by_rank` writes.
    if content != json.loads(by_rank(tokens, others, specials, pattern, ignore_merges).to_str()):
        return {}, ""

    # tiktoken takes a piece that is a token as it is: here it must give the same token.
    if ignore_merges:
        pieces = (other for other in others if len(backend.pre_tokenizer.pre_tokenize_str(other)) < 2)
    else:
        pieces = (token for token, rank in tokens.items() if [t.id for t in backend.model.tokenize(token)] != [rank])
    return ({}, "") if any(True for _ in pieces) else (tokens, pattern)
