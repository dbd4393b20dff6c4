"""What a held-out text costs without a neural network: bits per byte of gzip, of a unigram and of a bigram model.

    training tokens --> counts --> bits of the held-out tokens / bytes of the held-out text

The bigram model is interpolated with the unigram (Jelinek-Mercer), the unigram with the uniform distribution. The
weights come from the last tenth of the training tokens, which is not counted: nothing is fitted on held-out text.
"""

import gzip
import math

import numpy as np


def gzip_bits_per_byte(text: str) -> float:
    """`gzip -9` of the whole text as one stream."""
    content = text.encode()
    return 8 * len(gzip.compress(content, compresslevel=9, mtime=0)) / len(content)


def ngram_bits_per_byte(
    train_ids: np.ndarray, held_out_ids: np.ndarray, vocab_size: int, first_context: int, held_out_bytes: int
) -> tuple[float, float]:
    """Bits per byte of an interpolated unigram and an interpolated bigram model over the same tokens.

    Args:
        train_ids: training tokens.
        held_out_ids: held-out tokens, every one a target.
        vocab_size: number of ids.
        first_context: the token before the first held-out one.
        held_out_bytes: bytes of the held-out text.
    """
    train, held_out = train_ids.astype(np.int64), held_out_ids.astype(np.int64)
    border = len(train) * 9 // 10
    counted, tuned = train[:border], train[border:]
    share = _best_weight(_unigram(counted, tuned, vocab_size), np.full(len(tuned), 1 / vocab_size))
    mixed = share * _unigram(counted, tuned, vocab_size) + (1 - share) / vocab_size
    pair_share = _best_weight(_bigram(counted, tuned, counted[-1], vocab_size), mixed)

    unigram = share * _unigram(train, held_out, vocab_size) + (1 - share) / vocab_size
    bigram = pair_share * _bigram(train, held_out, first_context, vocab_size) + (1 - pair_share) * unigram
    return _bits(unigram) / held_out_bytes, _bits(bigram) / held_out_bytes


def _bits(probabilities: np.ndarray) -> float:
    return float(-np.log2(probabilities).sum())


def _unigram(counted: np.ndarray, targets: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(counted, minlength=vocab_size)
    return counts[targets] / len(counted)


def _bigram(counted: np.ndarray, targets: np.ndarray, first_context: int, vocab_size: int) -> np.ndarray:
    """Maximum-likelihood probability of each target after the token before it; 0 after an unseen context."""
    pairs, pair_counts = np.unique(counted[:-1] * vocab_size + counted[1:], return_counts=True)
    contexts = np.concatenate([[first_context], targets[:-1]])
    wanted = contexts * vocab_size + targets
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    found = np.where(pairs[place] == wanted, pair_counts[place], 0)
    context_counts = np.bincount(counted[:-1], minlength=vocab_size)[contexts]
    return found / np.maximum(context_counts, 1)


def _best_weight(sharp: np.ndarray, broad: np.ndarray) -> float:
    """The share of `sharp` in the mixture that makes the targets likeliest, by expectation maximisation."""
    weight = 0.5
    for _ in range(50):
        weight = float((weight * sharp / (weight * sharp + (1 - weight) * broad)).mean())
    return min(max(weight, 1e-6), 1 - 1e-6)


def bits_per_byte(nats_per_token: float, tokens: int, held_out_bytes: int) -> float:
    """From a mean loss over all held-out tokens to bits per byte of their text."""
    return nats_per_token / math.log(2) * tokens / held_out_bytes
