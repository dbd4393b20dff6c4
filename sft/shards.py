"""Conversations as shards hold them: written by `flagged`, read back by `Conversations`.

    ids, masks --flagged--> uint32: an id in the low bits, flags in the high ones --Conversations--> one by one

A shard is a flat file of them, so preparing, resuming, hashing and checking work as in pretraining.

    TRAINED      the token is a target under the recipe's mask
    ANSWER       it belongs to an assistant turn, including header and newline, which the `card` mask trains
    BEGIN, CUT   the first token of a conversation; of one that was truncated

A conversation longer than a row is cut: its partial content stays, and no terminator is invented. If all its targets
were cut off, it is left out and counted.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ds_slm.data.shards.prepared import Tokens
from sft.chatml import Encoded

TRAINED, BEGIN, ANSWER, CUT = (np.uint32(1 << bit) for bit in (31, 30, 29, 28))
IDS = np.uint32((1 << 28) - 1)

NO_TARGETS = "without a target"
SCAN_TOKENS = 1 << 24
"""Number of tokens that are read at once."""


def flagged(conversation: Encoded, limit: int) -> np.ndarray | str:
    """A conversation's ids with their flags, uint32 [N], cut to `limit` tokens; or why it is left out."""
    ids, trained, answers = (array[:limit] for array in (conversation.ids, conversation.trained, conversation.answers))
    if not trained[1:].any():
        return NO_TARGETS
    flags = np.where(trained, TRAINED, 0) | np.where(answers, ANSWER, 0)
    flags[0] |= BEGIN | (CUT if len(conversation.ids) > limit else 0)
    return ids.astype(np.uint32) | flags.astype(np.uint32)


class Conversations:
    """The conversations of one split, of all sources one after the other."""

    def __init__(self, sources: Sequence[Tokens]) -> None:
        """Reads every token once, to find where conversations begin."""
        self.sources = sources
        self.begins = [_begins(tokens) for tokens in sources]
        """For each source, the places of its conversations' first tokens."""
        lengths = [np.diff(begins, append=len(tokens)) for begins, tokens in zip(self.begins, sources, strict=True)]
        self.lengths = np.concatenate(lengths)
        """Tokens of each conversation."""
        self._source_of = np.repeat(np.arange(len(sources)), [len(begins) for begins in self.begins])
        self._begin_of = np.concatenate(self.begins)

    def __len__(self) -> int:
        """The number of conversations."""
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """The flagged ids of one conversation."""
        begin = int(self._begin_of[number])
        return self.sources[self._source_of[number]][begin : begin + int(self.lengths[number])]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Conversations, tokens, targets and cut conversations."""
        totals = dict.fromkeys(("tokens", "supervised_tokens", "truncated"), 0)
        for tokens in self.sources:
            for begin in range(0, len(tokens), SCAN_TOKENS):
                block = tokens[begin : begin + SCAN_TOKENS]
                totals["tokens"] += len(block)
                totals["supervised_tokens"] += int(np.count_nonzero(block & TRAINED))
                totals["truncated"] += int(np.count_nonzero(block & CUT))
        return {"conversations": len(self), **totals}


def _begins(tokens: Tokens) -> np.ndarray:
    """The places of first tokens."""
    blocks = range(0, len(tokens), SCAN_TOKENS)
    return np.concatenate([np.flatnonzero(tokens[begin : begin + SCAN_TOKENS] & BEGIN) + begin for begin in blocks])
