"""Conversations that an older version has prepared: what is refused of them, and what goes on."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ds_slm.data.shards.identity import MANIFEST
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.sentencepiece import read_sentencepiece
from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe import loading
from sft.chatml import ChatML, Encoded
from sft.encode import ENCODING
from sft.older import _encoded_alone
from sft.prepare import prepare_conversations
from tests.support import assistants, conversations
from tests.unit.data.test_sentencepiece import write_model
from tests.unit.sft.test_probe import assistant

PLAIN = [assistants.chat(f"what is {number}?", f"the cat is {number}.") for number in range(60)]
THINKS = [assistants.chat(f"what is {number}?", f"<think> the cat is {number}.") for number in range(60)]
PATTERN = r"\p{L}+|\p{N}|\s*\n+|\s|[^\s\p{L}\p{N}]"
"""Not one of those that are encoded in bulk; cuts behind a header's newline, as those of Llama 3 and Qwen do."""


def prefix_space(folder: Path) -> Tokenizer:
    """Llama-style: a space is put before each text."""
    return assistant(read_sentencepiece(write_model(folder / "tokenizer.model")).to_str(), normalized=False)


def thinking(folder: Path) -> Tokenizer:
    """Byte-level, with an added token that is not special."""
    content = json.loads(conversations.tokenizer()._backend.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN
    backend = Backend.from_str(json.dumps(content))
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(backend, "<|endoftext|>", "<|pad|>")


def prepared_by_an_older_version(
    folder: Path, tokenizer: Tokenizer, talk: Sequence[assistants.Messages], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Prepared]:
    """Prepares as older versions did; returns what opens the data."""
    tokenizer.save(folder / "tokenizer")
    text = assistants.write_sft(folder, list(talk)).read_text()
    section = f'kind = "hf"\npath = "{folder / "tokenizer"}"\nvocab_size = {tokenizer.vocab_size}\n'
    section += f'eos_token = "{tokenizer.eos_token}"\npad_token = "{tokenizer.pad_token}"\n'
    text = text.replace("vocab_size = 320", f"vocab_size = {tokenizer.vocab_size}")
    text = re.sub(r"(?<=\[tokenizer\]\n)[^\[]*\n(?=\[data\])", lambda match: section, text)
    recipe = loading.parse(text)

    def open_data() -> Prepared:
        return prepare_conversations(recipe, folder / "data" / "old", folder / "tokenizer", report=lambda line: None)

    def alone(self: ChatML, found: Sequence[assistants.Messages], mask: str) -> list[Encoded]:
        ids = [np.array(_encoded_alone(self, turns)) for turns in found]
        return [Encoded(one, one == self.end_id, one == self.end_id) for one in ids]

    with monkeypatch.context() as patched:
        patched.setattr(ChatML, "encode_batch", alone)
        patched.setattr("sft.encode.refuse_other_encoding", lambda tokenizer: None)
        open_data()
    path = folder / "data" / "old" / "chats" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key not in ENCODING}))
    return open_data


def test_prefix_space_conversations_of_an_older_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder, an example and the way out; prepared anew they open, at every launch."""
    open_data = prepared_by_an_older_version(tmp_path, prefix_space(tmp_path), PLAIN, monkeypatch)
    folder = tmp_path / "data" / "old" / "chats"
    with pytest.raises(DataError, match=rf"{folder} was prepared by an older version.*remove {folder} and prepare"):
        open_data()
    for path in folder.iterdir():
        path.unlink()
    assert open_data().sha256 == open_data().sha256


@pytest.mark.parametrize("talk", [PLAIN, THINKS], ids=["plain", "added tokens"])
def test_conversations_of_an_older_version_are_refused_for_what_they_hold(
    talk: list[assistants.Messages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a byte-level tokenizer, whose ids changed for conversations with literals of added tokens alone."""
    open_data = prepared_by_an_older_version(tmp_path, thinking(tmp_path), talk, monkeypatch)
    if talk is PLAIN:
        assert open_data().train_tokens
    else:
        with pytest.raises(DataError, match="the letters of '<think>' where the template gives its id"):
            open_data()
