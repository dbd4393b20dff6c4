"""Byte-level BPE by rank: the same ids from the file's own encoder, from the one for bulk, and from the trainer's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from ds_slm.data.sources.builtin import builtin_documents
from ds_slm.data.tokenizers import byte_level
from ds_slm.data.tokenizers import tokenizer as tokenizing
from ds_slm.data.tokenizers.byte_level import bulk_encoder
from tests.support.data_recipes import character_folder, recipe, source

VOCAB_SIZE = 1_000
BPE = f'kind = "bpe"\nvocab_size = {VOCAB_SIZE}\nspecial_tokens = {{ "<|endoftext|>" = 0, "<|pad|>" = 700 }}'
TEXTS = builtin_documents()[:400]
SNIPPETS = [
    " ",
    "  ",
    "\n",
    "'",
    "'s",
    "'re",
    "'LL",
    "1",
    "23",
    ".",
    "...",
    "<|endoftext|>",
    "<|pad|>",
    "é",
    "日",
    "the",
]


def train() -> tokenizing.Tokenizer:
    return tokenizing.build_tokenizer(recipe(source("made", path="."), tokenizer=BPE), lambda _: iter(TEXTS))


@pytest.fixture(scope="module")
def bpe() -> tokenizing.Tokenizer:
    return train()


def learned() -> Backend:
    """What the trainer itself makes of the same text, with its own merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def test_merges_by_rank_are_those_of_the_trainer(bpe: tokenizing.Tokenizer) -> None:
    """Oracle: the trainer's own tokens, for the text it saw and for text it did not."""
    theirs = learned()
    for text in builtin_documents()[:800]:
        names = [bpe._backend.id_to_token(token_id) for token_id in bpe.encode(text)]
        assert names == theirs.encode(text).tokens


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.one_of(st.sampled_from(SNIPPETS), st.sampled_from(TEXTS).map(lambda text: text[:50]), st.text(max_size=9)),
        max_size=9,
    )
)
def test_bulk_has_the_same_ids(bpe: tokenizing.Tokenizer, parts: list[str]) -> None:
    """Oracle: the saved tokenizer's own encoder."""
    assert bpe._bulk is not None
    texts = ["".join(parts), *parts, ""]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_texts_that_tiktoken_cannot_take(bpe: tokenizing.Tokenizer) -> None:
    """Oracle: the saved tokenizer's own encoder, for a million spaces among other documents."""
    texts = ["a b", " " * 1_200_000 + "x", "c" + "\n" * 1_100_000, "d"]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def changed(content: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> Backend:
    content = json.loads(json.dumps(content))
    change(content)
    return Backend.from_str(json.dumps(content))


def test_bulk_is_for_nothing_else(bpe: tokenizing.Tokenizer, tmp_path: Path) -> None:
    """Oracle: None wherever a tokenizer's file says anything that tiktoken would not do."""
    content = json.loads(bpe._backend.to_str())
    assert bulk_encoder(changed(content, lambda file: None)) is not None
    others = {
        "fewer merges": lambda file: file["model"]["merges"].pop(),
        "another order": lambda file: file["model"]["merges"].reverse(),
        "a normalizer": lambda file: file.update(normalizer={"type": "NFC"}),
        "another pattern": lambda file: file["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\s+|\S+"}),
        "a prefix space": lambda file: file["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "dropout": lambda file: file["model"].update(dropout=0.1),
        "a plain added token": lambda file: file["added_tokens"][0].update(special=False),
    }
    for name, change in others.items():
        assert bulk_encoder(changed(content, change)) is None, name
    assert bulk_encoder(Backend.from_file(str(character_folder(tmp_path / "made", "abc") / "tokenizer.json"))) is None
    assert bulk_encoder(learned()) is None


def test_a_control_token_that_is_a_word(bpe: tokenizing.Tokenizer) -> None:
    """Oracle: a word in the text is never its control token, and bulk is refused where it would be."""
    letters = {letter: number for number, letter in enumerate(byte_level.byte_letters())}
    for ignore_merges in (False, True):
        made = byte_level.by_rank(letters, {"user": 256}, ["user"], byte_level.GPT2_PATTERN, ignore_merges)
        made.encode_special_tokens = True
        bulk = bulk_encoder(made)
        assert (bulk is None) is ignore_merges
        assert bulk is None or bulk(["user"]) == [made.encode("user").ids] == [[letters[letter] for letter in "user"]]
