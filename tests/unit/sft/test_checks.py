"""What fine-tuning refuses: masks that cannot be meant, settings and conversations that it cannot use."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_slm.data.shards.writer import NAMED_PROBLEMS
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from sft import data as sft_data
from sft.chatml import Encoded, problem_of
from sft.data import BEGIN, CUT, IDS, TRAINED, Conversations, flagged
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
        patch.setattr(sft_data, "SCAN_TOKENS", scan)
        split = Conversations(sources)  # type: ignore[arg-type]
        assert split.lengths.tolist() == [len(tokens) for tokens in arrays]
        assert split.first_unterminated(ending) == (expected[0] if expected else None)
        assert split.counts["supervised_tokens"] == sum(int(((t & TRAINED) != 0).sum()) for t in arrays)
        assert split.counts["truncated"] == sum(int((t[0] & CUT) != 0) for t in arrays)
        assert [split[number].tolist() for number in range(len(arrays))] == [tokens.tolist() for tokens in arrays]


@pytest.mark.parametrize("mask", ["assistant", "card"])
def test_a_terminator_on_a_border_is_seen(mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: sound data stay sound, whatever they are read in blocks of."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    for size in (1 << 24, 17, 3):
        monkeypatch.setattr(sft_data, "SCAN_TOKENS", size)
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


def test_invalid_conversations_are_refused_if_asked(tmp_path: Path) -> None:
    """Oracle: what is wrong with each, where it is shown, and the way out; by default they are left out and counted."""
    wrong, lonely = [{"role": "tool", "content": "who said that"}], [{"role": "assistant", "content": "nobody asked"}]
    path = conversations.write(tmp_path / "made.jsonl", [*conversations.made(), wrong, *[lonely] * NAMED_PROBLEMS])
    with pytest.raises(DataError, match=r"unknown role 'tool'.*who said that.*sft\.invalid = 'drop'") as refused:
        conversations.rows(path, tmp_path, "sft.invalid=refuse")
    assert len(refused.value.problems) == NAMED_PROBLEMS + 1
    first = len(conversations.made()) + 1
    for line, problem in enumerate(refused.value.problems[:-1], start=first):
        assert problem.startswith(f"{path}, line {line:,}: a conversation has ")
    assert "nobody asked" in str(refused.value) and "and 1 more among these" in refused.value.problems[-1]
    assert problem_of(wrong) == "unknown role 'tool'"
    rows = conversations.rows(path, tmp_path)
    assert rows.summary()["dropped"]["unknown role 'tool'"] == 1


def test_a_refused_conversation_is_found_in_any_file(tmp_path: Path) -> None:
    """Oracle: the file and the row, counted by hand, behind another file, an empty row and a row group's end."""
    talks, folder = conversations.made(30), tmp_path / "talks"
    folder.mkdir()
    conversations.write(folder / "a.jsonl", talks)
    rows = [*talks[:20], None, [{"role": "tool", "content": "x"}], *talks[20:]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), folder / "b.parquet", row_group_size=7)
    with pytest.raises(DataError, match=r"b\.parquet, row 21: .*no list.*b\.parquet, row 22: .*unknown role 'tool'"):
        conversations.rows(folder, tmp_path, "sft.invalid=refuse")


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    """Oracle: counted as no valid Unicode: JSON can spell it, no tokenizer can read it."""
    path = conversations.write(tmp_path / "made.jsonl", [*conversations.made(), [U, {**A, "content": "\ud83d"}]])
    assert conversations.rows(path, tmp_path).summary()["dropped"]["content that is no valid Unicode"] == 1


def test_what_is_no_list_is_refused_if_asked(tmp_path: Path) -> None:
    """Oracle: rows whose messages are null, a text, a number: refused, or counted, as any other that is invalid."""
    wrong: list[Any] = [None, "hello", 5]
    path = conversations.write(tmp_path / "made.jsonl", [*conversations.made(), *wrong])
    with pytest.raises(DataError, match="no list of messages"):
        conversations.rows(path, tmp_path, "sft.invalid=refuse")
    assert conversations.rows(path, tmp_path).summary()["dropped"]["no list of messages"] == 3


@pytest.mark.parametrize(
    ("name", "said"), [("notes.txt", "notes.txt: plain text has no column"), ("ids.bin", "ids.bin")]
)
def test_what_holds_no_conversations(name: str, said: str, tmp_path: Path) -> None:
    """Oracle: the file at fault is named; no traceback, and nothing is left behind that would be taken for data."""
    (tmp_path / "some").mkdir()
    if name.endswith(".txt"):
        conversations.write(tmp_path / "some" / "a.jsonl", conversations.made())
    (tmp_path / "some" / name).write_bytes(b"four" * 100)
    with pytest.raises(DataError, match=said):
        conversations.rows(tmp_path / "some", tmp_path)
    assert not list(tmp_path.glob("data/*/made/manifest.json"))


def test_one_conversation_is_too_few(tmp_path: Path) -> None:
    """Oracle: said in a sentence: a single document of text is cut in two, a conversation is not."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made(1))
    with pytest.raises(DataError, match=r"nothing is left for (train|val); it needs more text"):
        conversations.rows(path, tmp_path)


def test_the_cards_measure_needs_answers(tmp_path: Path) -> None:
    """Oracle: under `all` a conversation may hold no answer, so the card's mean over answers may be of nothing."""
    path = conversations.write(tmp_path / "made.jsonl", [[{**U, "content": str(number)}] for number in range(60)])
    rows = conversations.rows(path, tmp_path, "sft.mask=all")
    assert list(rows.measures.values()) == ["val"]
    answers = conversations.write(tmp_path / "answers.jsonl", conversations.made())
    assert list(conversations.rows(answers, tmp_path / "answers").measures.values()) == ["val", "val_card"]
    assert rows.read(rows.val_row_ids(), "val_card").weights.sum() == 0


def test_another_base_is_refused(tmp_path: Path) -> None:
    """Oracle: both tokenizers' hashes, and the ways out."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    recipe = conversations.recipe(path)
    conversations.prepare(recipe, tmp_path)
    conversations.tokenizer(seed=1).save(tmp_path / "other")
    other = load_tokenizer(tmp_path / "other").sha256
    with pytest.raises(DataError, match=f"has {other}: name the base it was made for"):
        sft_data.prepare_conversations(recipe, "tiny", tmp_path / "data", tmp_path / "other", report=lambda line: None)
