"""Conversations that cannot be used: left out and counted, or refused where they stand."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data.shards.writer import NAMED_PROBLEMS
from ds_slm.errors import DataError
from sft.chatml import problem_of
from tests.support import conversations

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


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
