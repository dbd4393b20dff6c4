"""Continuations of a context in order of their log-probabilities, for `ds-slm rank`.

context, choices --rank--> each choice with its sum and mean of log-probabilities, the likeliest first
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ds_slm.evaluate.opening import Opened
from ds_slm.evaluate.scoring import score
from ds_slm.evaluate.text import TextEncoder


@dataclass(frozen=True)
class Ranked:
    """One choice."""

    choice: str
    log_probability: float
    """The sum over all its tokens, in nats."""
    mean_log_probability: float
    """The mean of a token, in nats."""
    tokens: int


def rank(opened: Opened, questions: Sequence[tuple[str, Sequence[str]]], by_mean: bool = False) -> list[list[Ranked]]:
    """The choices of each context, the likeliest first.

    A choice is scored literally: if it begins a word, it must begin with a space.

    Args:
        opened: the model.
        questions: each context with its choices.
        by_mean: order by the mean of a token instead of the sum.
    """
    encoder = TextEncoder(opened.tokenizer)
    items = [encoder.pairs([(context, choice) for choice in choices]) for context, choices in questions]

    ranked = []
    for (_, choices), requests, scores in zip(questions, items, score(opened.scorer, items), strict=True):
        found = []
        for choice, request, one in zip(choices, requests, scores, strict=True):
            tokens = len(request.continuation_ids)
            found.append(Ranked(choice, one.log_probability, one.log_probability / max(1, tokens), tokens))
        key = "mean_log_probability" if by_mean else "log_probability"
        ranked.append(sorted(found, key=lambda one: -getattr(one, key)))
    return ranked
