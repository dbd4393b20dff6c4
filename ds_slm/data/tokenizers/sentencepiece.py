"""A SentencePiece tokenizer.model as a tokenizer of the `tokenizers` library, with exactly its ids.

    tokenizer.model --> ModelProto --refuse what cannot be exact--> Prepend, Replace, BPE with byte fallback --> proved

SentencePiece's BPE joins the two neighbours whose union is the best-scored piece; if scores are equal, the leftmost. As
merges: every cut of a piece into two, ordered by its score. Runs of spaces share one score in some models (Mistral's);
with the longest first, the run that began on the left grows before another begins, which is the same.

Literals of control tokens are text here, as in SentencePiece. Each conversion is compared with the library itself
before it is used: all pieces, pieces that overlap themselves, runs of one letter, and random rows of pieces.

Source: bpe_model.cc and normalizer.cc of google/sentencepiece. Known gaps: `_problems` lists them.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_slm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""
LONGEST_RUN = 70
"""Runs of one letter are compared up to this length."""
RANDOM_ROWS, PIECES_IN_A_ROW = 8_192, 12


def read_sentencepiece(path: Path) -> "tokenizers.Tokenizer":
    """Convert a tokenizer.model.

    Raises:
        DataError: the file is not such a model, or its ids cannot be reproduced exactly; with all the reasons.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(path.read_bytes())
        oracle = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # protobuf's and the C++ side's own kinds
        raise DataError(f"{path} is no SentencePiece model ({error}): get an intact copy.") from error

    if problems := _problems(model):
        way_out = "name a tokenizer.json of the same tokenizer instead."
        raise DataError([f"{path}: {problem}; {way_out}" for problem in problems])

    backend = _converted(model)
    for text, found, expected in _compared(model, backend, oracle):
        if found != expected:
            raise DataError(
                f"{path}: its conversion gives {found} for {text!r} where SentencePiece gives {expected}: "
                "name a tokenizer.json of the same tokenizer instead."
            )

    return backend


def _problems(model: Any) -> list[str]:
    """Features of a model that this conversion does not support."""
    kinds = model.SentencePiece
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    letters = {piece.piece for piece in model.pieces if piece.type == kinds.NORMAL and len(piece.piece) == 1}
    pieces = [piece for piece in model.pieces if piece.type == kinds.NORMAL]

    checks = {
        f"it is of type {trained.ModelType.Name(trained.model_type)}, not BPE": trained.model_type != trained.BPE,
        "it has no byte fallback, so unknown letters would be lost": not trained.byte_fallback,
        "it writes spaces behind words": trained.treat_whitespace_as_suffix,
        f"it normalises text ({normalizer.name or 'a map of its own'})": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it has user-defined pieces": any(piece.type == kinds.USER_DEFINED for piece in model.pieces),
        "it has unused pieces": any(piece.type == kinds.UNUSED for piece in model.pieces),
        "some of its pieces have letters that are no pieces": any(not letters.issuperset(p.piece) for p in pieces),
    }

    return [problem for problem, is_so in checks.items() if is_so]


def _converted(model: Any) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    kinds = model.SentencePiece
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}

    # The merges: every cut of a piece into two others, the best score first.
    cuts = (
        (-score, -len(piece), vocab[piece], end, piece)
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:-end] in scores and piece[-end:] in scores
    )
    merges = [(piece[:-end], piece[-end:]) for *_, end, piece in sorted(cuts)]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))

    # Write spaces as SentencePiece does, and change them back when decoding.
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    undone: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        undone.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undone)

    controls = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return backend


def _compared(model: Any, backend: "tokenizers.Tokenizer", oracle: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """Texts with their ids by the conversion and by SentencePiece."""
    texts = [text.replace(SPACE, " ") for text in _trial_texts([piece.piece for piece in model.pieces])]
    backend.encode_special_tokens = True
    ours = backend.encode_batch_fast(texts, add_special_tokens=False)
    backend.encode_special_tokens = False
    return zip(texts, (encoding.ids for encoding in ours), oracle.encode(texts), strict=True)


def _trial_texts(pieces: list[str]) -> Iterator[str]:
    """Texts on which a conversion could differ: pieces with several cuts beside each other, equal scores."""
    known = set(pieces)
    rng = random.Random(0)
    for piece in pieces:
        yield piece
        yield from (piece + piece[shared:] for shared in range(1, len(piece)) if piece.endswith(piece[:shared]))
        if len(piece) == 1 and 2 * piece in known:
            yield from (count * piece for count in range(2, LONGEST_RUN))
    for _ in range(RANDOM_ROWS):
        yield "".join(rng.choices(pieces, k=PIECES_IN_A_ROW))
