"""What fine-tuning refuses before it trains: masks that cannot be meant, and settings that it cannot use."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_slm.errors import DataError
from sft import shards
from sft.chatml import Encoded
from sft.checks import first_unterminated
from sft.shards import BEGIN, CUT, IDS, TRAINED, Conversations, flagged
from tests.support import conversations

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@settings(max_examples=200)
@given(data=st.data(), scan=st.integers(1, 9), ending=st.sampled_from([[7], [7, 8], [7, 8, 9]]))
def test_missing_terminators_are_found(data: st.DataObject, scan: int, ending: list[int]) -> None:
    """Oracle: a search through each trained run; read in blocks of a few tokens, so that all lies on borders."""
    turn = st.tuples(st.integers(0, 2), st.booleans(), st.sampled_from([*[ending] * 12, [], ending[1:], [5]]))
    talks = data.draw(st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=6))
    arrays, expected = [], []
    for number, talk in enumerate(talks):
        ids, trained = [], []
        for words, is_trained, end in talk:
            answer = [4] * words + end
            ids += [2, *answer]
            trained += [False] + [is_trained] * len(answer)
        encoded = Encoded(np.array(ids), np.array(trained), np.array(trained))
        tokens = flagged(encoded, data.draw(st.integers(2, 12)))
        arrays.append(np.array([2 | BEGIN], np.uint32) if isinstance(tokens, str) else tokens)
        spelled = "".join("x" if token & TRAINED else " " for token in arrays[-1])
        for run in re.finditer("x+", spelled):
            answer = (arrays[-1][run.start() : run.end()] & IDS).tolist()
            was_cut = arrays[-1][0] & CUT and run.end() == len(spelled)
            if answer[-len(ending) :] != ending and not was_cut:
                expected.append(number)
    half = len(arrays) // 2 or 1
    sources = [np.concatenate(part) for part in (arrays[:half], arrays[half:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SCAN_TOKENS", scan)
        split = Conversations(sources)  # type: ignore[arg-type]
        assert split.lengths.tolist() == [len(tokens) for tokens in arrays]
        assert first_unterminated(split, ending) == (expected[0] if expected else None)
        assert split.counts["supervised_tokens"] == sum(int(((t & TRAINED) != 0).sum()) for t in arrays)
        assert split.counts["truncated"] == sum(int((t[0] & CUT) != 0) for t in arrays)
        assert [split[number].tolist() for number in range(len(arrays))] == [tokens.tolist() for tokens in arrays]


@pytest.mark.parametrize("mask", ["assistant", "card"])
def test_a_terminator_on_a_border_is_seen(mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: sound data stay sound, whatever they are read in blocks of."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    for size in (1 << 24, 17, 3):
        monkeypatch.setattr(shards, "SCAN_TOKENS", size)
        assert len(conversations.rows(path, tmp_path, f"sft.mask={mask}")._splits["train"]) > 90


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.last_batch=keep", "train.last_batch"),
        ("data.source.0.weight=2", "data.source.weight"),
    ],
)
def test_settings_that_conversations_lack_are_refused(tmp_path: Path, override: str, said: str) -> None:
    """Oracle: the message names the field and the way out."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    with pytest.raises(DataError, match=said):
        conversations.rows(path, tmp_path, override)
