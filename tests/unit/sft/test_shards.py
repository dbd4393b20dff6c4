"""Conversations as shards hold them: cutting, and which are left out."""

import numpy as np

from sft.chatml import Encoded
from sft.shards import ANSWER, BEGIN, CUT, IDS, NO_TARGETS, TRAINED, flagged


def test_cut_in_the_middle_of_an_answer() -> None:
    """Oracle: by hand: what is left is trained, nothing is put behind it; the conversation is marked as cut."""
    ids, trained = np.arange(10, 20), np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0], bool)
    answers = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], bool)
    cut = flagged(Encoded(ids, trained, answers), 7)
    assert isinstance(cut, np.ndarray)
    assert (cut & IDS).tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert [bool(token & TRAINED) for token in cut] == [0, 0, 0, 0, 1, 1, 1]
    assert [bool(token & ANSWER) for token in cut] == [0, 0, 1, 1, 1, 1, 1]
    assert np.flatnonzero(cut & BEGIN).tolist() == np.flatnonzero(cut & CUT).tolist() == [0]
    for limit in (10, 11):
        whole = flagged(Encoded(ids, trained, answers), limit)
        assert isinstance(whole, np.ndarray) and len(whole) == 10 and not (whole & CUT).any()


def test_a_conversation_without_a_target_is_left_out() -> None:
    """Oracle: by hand: its answers were all cut off, or its only target is its first token, which nothing predicts."""
    answers = np.zeros(5, bool)
    assert flagged(Encoded(np.arange(5), np.array([0, 0, 0, 1, 1], bool), answers), 3) == NO_TARGETS
    assert flagged(Encoded(np.arange(5), np.array([1, 0, 0, 0, 0], bool), answers), 5) == NO_TARGETS
    assert not isinstance(flagged(Encoded(np.arange(5), np.array([1, 0, 0, 1, 0], bool), answers), 4), str)
