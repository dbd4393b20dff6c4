"""Preparing conversations: what sources and which base it refuses."""

from pathlib import Path

import pytest

from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from sft.prepare import prepare_conversations
from tests.support import conversations


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


def test_another_base_is_refused(tmp_path: Path) -> None:
    """Oracle: both tokenizers' hashes, and the ways out."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    recipe = conversations.recipe(path)
    conversations.prepare(recipe, tmp_path)
    conversations.tokenizer(seed=1).save(tmp_path / "other")
    other = load_tokenizer(tmp_path / "other").sha256
    with pytest.raises(DataError, match=f"has {other}: name the base it was made for"):
        prepare_conversations(recipe, tmp_path / "data" / "tiny", tmp_path / "other", report=lambda line: None)
