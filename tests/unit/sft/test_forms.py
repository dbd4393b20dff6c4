"""The forms in which conversations are published: read where they are unambiguous, else shown and refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data.shards import writer
from ds_slm.data.shards.prepared import Prepared
from ds_slm.errors import DataError
from sft import forms
from sft.chatml import problem_of
from sft.forms import read_messages
from sft.prepare import prepare_conversations
from sft.shards import Conversations
from tests.support import conversations
from tests.support.faults import fail_at

ASKED, SAID = "what is it?", "it is a cat."
TURNS = [("user", ASKED), ("assistant", SAID)]
PLAIN = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]


REASONING = forms.UNREAD_KEY.format("reasoning_content")


def parts(*texts: str, **extra: Any) -> list[dict[str, Any]]:
    """A content of text parts."""
    return [{"type": "text", "text": text, **extra} for text in texts]


@pytest.mark.parametrize(
    ("value", "notes"),
    [
        (PLAIN, []),
        (SHAREGPT, [forms.FROM_VALUE]),
        ([{"from": "User", "value": ASKED}, {"from": "ChatGPT", "value": SAID}], [forms.FROM_VALUE]),
        ([PLAIN[0], {"role": "assistant", "content": parts(SAID[:3], SAID[3:])}], [forms.TEXT_PARTS]),
        ([{"role": "user", "content": parts(ASKED, image=None)}, PLAIN[1]], [forms.TEXT_PARTS]),
        ([{"from": "human", "value": parts(ASKED)}, SHAREGPT[1]], [forms.FROM_VALUE, forms.TEXT_PARTS]),
        ([{**turn, "role": None, "content": None} for turn in SHAREGPT], [forms.FROM_VALUE]),
        ([PLAIN[0], {**PLAIN[1], "reasoning_content": "hm", "tool_calls": []}], [REASONING]),
        ([{**PLAIN[0], "train": False}, {**PLAIN[1], "train": True, "weight": 1}], [forms.NOT_TRAINED]),
        ([{"role": role, "content": f"\ufeff{text}"} for role, text in TURNS], []),
        ([{**turn, "from": None, "value": None, "name": "x"} for turn in PLAIN], []),
    ],
)
def test_common_forms_are_one_conversation(value: Any, notes: list[str]) -> None:
    """Oracle: the two turns; parquet fills keys that a message lacks with null."""
    found: Counter[str] = Counter()
    messages, problem = read_messages(value, found)
    assert problem is None and problem_of(messages) is None
    assert [(message["role"], message["content"]) for message in messages] == TURNS
    assert set(found) == set(notes)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([PLAIN[0], SHAREGPT[1]], forms.TWO_FORMS),
        ([{**PLAIN[0], **SHAREGPT[0]}, PLAIN[1]], forms.TWO_FORMS),
        ([{**SHAREGPT[0], "from": "tool"}, SHAREGPT[1]], "unknown role 'tool'"),
        ([{**SHAREGPT[0], "from": 3}, SHAREGPT[1]], "a message without a role"),
        ([{**SHAREGPT[0], "value": 3}, SHAREGPT[1]], "content that is no string"),
        ([{"role": "user", "value": "a"}, PLAIN[1]], "content that is no string"),
        ([{"role": "user", "content": []}, PLAIN[1]], "content that is no string"),
        ([{"role": "user", "content": [{"type": "image", "url": "a"}]}, PLAIN[1]], "content that is no string"),
        ([{"role": "user", "content": parts("a", image="b")}, PLAIN[1]], "content that is no string"),
        ([{"role": "user", "content": [{"text": "a"}]}, PLAIN[1]], "content that is no string"),
        ([PLAIN[0], {**PLAIN[1], "train": False, "weight": 1}], forms.TWO_WEIGHTS),
        ([PLAIN[0], {**PLAIN[1], "train": False, "loss": True}], forms.TWO_WEIGHTS),
        ([{"user": "a", "assistant": "b"}], "a message without a role"),
        ({"user": "a"}, "no list of messages"),
        ([], "no list of messages"),
        (["a", "b"], "a message without a role"),
        (None, "no list of messages"),
    ],
)
def test_other_forms_are_no_conversation(value: Any, problem: str) -> None:
    """Oracle: the reason, by hand; what is ambiguous is not guessed."""
    messages, unclear = read_messages(value, Counter())
    assert (unclear or problem_of(messages)) == problem


def prepare(path: Path, folder: Path, told: list[str], *overrides: str) -> Prepared:
    """Conversations of a file, with a tokenizer of our own."""
    conversations.tokenizer().save(folder / "base")
    recipe = conversations.recipe(path, *overrides)
    return prepare_conversations(recipe, folder / "data" / "made", folder / "base", report=told.append)


def all_of(prepared: Prepared) -> list[list[int]]:
    """The flagged ids of every conversation, of both splits, sorted: a hash of what was read says which is held out."""
    splits = [Conversations(prepared.tokens("train")), Conversations(prepared.tokens("val"))]
    return sorted(split[number].tolist() for split in splits for number in range(len(split)))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sharegpt_gives_the_tokens_of_plain_messages(suffix: str, tmp_path: Path) -> None:
    """Oracle: the ids of the same conversations as `role` and `content`; what was read is told at every launch."""
    made = conversations.made(60)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    theirs = [[{"from": names[turn["role"]], "value": turn["content"]} for turn in turns] for turns in made]
    plain = prepare(conversations.write(tmp_path / "plain.jsonl", made), tmp_path / "plain", [])

    path = tmp_path / f"theirs{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"conversations": turns}) + "\n" for turns in theirs))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": range(60), "conversations": theirs}), path)
    told: list[str] = []
    found = prepare(path, tmp_path / "theirs", told)
    assert all_of(found) == all_of(plain)
    messages = sum(len(turns) for turns in theirs)
    assert f"made: {messages:,} {forms.FROM_VALUE}" in told
    assert told.count("made: there is no column 'messages', 'conversations' is read instead") == 1
    told.clear()
    prepare(path, tmp_path / "theirs", told)
    assert f"made: {messages:,} {forms.FROM_VALUE}" in told


def test_what_is_not_trained_or_not_read_is_counted(tmp_path: Path) -> None:
    """Oracle: the shards of the same conversations with weights and without what is not read; counts by hand."""
    made = conversations.made(40)
    flagged = [[{**turn, "train": turn["role"] == "user", "thinking": "hm"} for turn in turns] for turns in made[:10]]
    weighted = [[{**turn, "weight": int(turn["role"] == "user")} for turn in turns] for turns in made[:10]]
    expected = prepare(conversations.write(tmp_path / "w.jsonl", [*weighted, *made[10:]]), tmp_path / "w", [])
    told: list[str] = []
    found = prepare(conversations.write(tmp_path / "f.jsonl", [*flagged, *made[10:]]), tmp_path / "f", told)
    assert all_of(found) == all_of(expected)
    answers = sum(turn["role"] != "user" for turns in made[:10] for turn in turns)
    assert f"made: {answers:,} {forms.NOT_TRAINED}" in told
    messages = sum(map(len, made[:10]))
    assert f"made: {messages:,} {forms.UNREAD_KEY.format('thinking')}" in told


def test_counts_are_those_of_all_messages_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the lines of a preparation that nothing ended; it is ended behind the third journal, and goes on."""
    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(writer, "JOURNAL_TOKENS", 1)
    talks = [[{**turn, "thinking": "hm"} for turn in turns] for turns in conversations.made(90)]
    path = conversations.write(tmp_path / "made.jsonl", talks)
    whole: list[str] = []
    prepare(path, tmp_path / "whole", whole)

    told: list[str] = []
    third_save = fail_at("replaced", "journal.json", KeyboardInterrupt(), after=2)
    with third_save, pytest.raises(KeyboardInterrupt):
        prepare(path, tmp_path / "cut", [])
    [journal] = (tmp_path / "cut").rglob("journal.json")
    rows_read = json.loads(journal.read_text())["totals"]["rows_read"]
    prepare(path, tmp_path / "cut", told)
    assert any("goes on behind" in line for line in told) and 0 < rows_read < 90
    notes = [line for line in whole if "beside their content" in line]
    assert len(notes) == 1 and notes == [line for line in told if "beside their content" in line]


@pytest.mark.parametrize("invalid", ["drop", "refuse"])
def test_the_first_of_unusable_conversations_is_shown(invalid: str, tmp_path: Path) -> None:
    """Oracle: the record as the file has it, and every form that would be read."""
    first = [{"speaker": "A", "said": "hello"}]
    path = conversations.write(tmp_path / "made.jsonl", [first, *([{"speaker": "B"}] for _ in range(30))])
    with pytest.raises(DataError) as caught:
        prepare(path, tmp_path, [], f"sft.invalid={invalid}")
    message = "\n".join(caught.value.problems)
    assert json.dumps(first) in message and forms.EXPECTED in message
    assert "val_fraction" not in message
    if invalid == "drop":
        assert "none of the 31 documents can be used (31 a message without a role)" in message


def test_times_as_contents_are_refused_with_the_first_record(tmp_path: Path) -> None:
    """Oracle: never their spelling as text."""
    import datetime

    when = datetime.datetime(2020, 1, 2)
    talks = [[{"role": "user", "content": when}, {"role": "assistant", "content": when}]] * 20
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks}), tmp_path / "made.parquet")
    with pytest.raises(DataError, match=r"20 content that is no string.*\{\"datetime\": \"2020-01-02 00:00:00\"\}"):
        prepare(tmp_path / "made.parquet", tmp_path, [])
