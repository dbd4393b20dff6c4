"""Conversations as ids and masks, written by hand; those of other programs: test_sft_transformers.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from sft.chatml import ChatML, Encoded, Mask, problem_of
from tests.support import conversations, data_recipes


@pytest.fixture(scope="module")
def ours() -> ChatML:
    return ChatML(conversations.tokenizer())


@settings(max_examples=150)
@given(
    contents=st.lists(
        st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n<|>_imstarend")), max_size=30),
        min_size=1,
        max_size=5,
    ),
    literals=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]), max_size=3),
)
def test_any_content_stays_text(ours: ChatML, contents: list[str], literals: list[str]) -> None:
    """Oracle: counting: one im_start and one im_end for each turn, whatever is said; the text comes back."""
    contents = [text + "".join(literals) for text in contents]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    encoded = ours.encode(messages)
    ids = encoded.ids.tolist()
    assert ids.count(ours.start_id) == ids.count(ours.end_id) == len(messages)
    assert ours.tokenizer.eos_id not in ids
    assert int((encoded.trained & (encoded.ids == ours.end_id)).sum()) == len(messages) // 2
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    assert ours.tokenizer.decode(ids) == text


def spelled(ours: ChatML, encoded: Encoded) -> str:
    """The text, what is trained in brackets."""
    pieces = []
    for ids, trained in zip(encoded.ids, encoded.trained, strict=True):
        text = ours.tokenizer.decode([int(ids)])
        pieces.append(f"[{text}]" if trained else text)
    return "".join(pieces).replace("][", "")


S, E = "<|im_start|>", "<|im_end|>"
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
HEAD = f"{S}system\ns{E}\n{S}user\na{E}\n"
SPELLED: list[tuple[Mask, tuple[int, ...], str]] = [
    ("assistant", (), f"{HEAD}{S}assistant\n[b{E}]\n{S}user\nc{E}\n{S}assistant\n[d{E}]\n"),
    ("assistant", (2,), f"{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\n[d{E}]\n"),
    ("assistant", (2, 4), f"{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\nd{E}\n"),
    ("last", (), f"{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\n[d{E}]\n"),
    ("last", (2,), f"{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\n[d{E}]\n"),
    ("last", (4,), f"{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\nd{E}\n"),
    ("card", (), f"{HEAD}[{S}assistant\nb{E}\n]{S}user\nc{E}\n[{S}assistant\nd{E}\n]"),
    ("card", (4,), f"{HEAD}[{S}assistant\nb{E}\n]{S}user\nc{E}\n{S}assistant\nd{E}\n"),
    ("all", (), f"[{HEAD}{S}assistant\nb{E}\n{S}user\nc{E}\n{S}assistant\nd{E}\n]"),
    ("all", (0, 3), f"{S}system\ns{E}\n[{S}user\na{E}\n{S}assistant\nb{E}\n]{S}user\nc{E}\n[{S}assistant\nd{E}\n]"),
]


@pytest.mark.parametrize(("mask", "unweighted", "expected"), SPELLED)
def test_masks_as_written_by_hand(ours: ChatML, mask: Mask, unweighted: tuple[int, ...], expected: str) -> None:
    """Oracle: the trained text in brackets, by hand; messages of weight 0 are trained by no mask."""
    messages = [{**message, "weight": int(place not in unweighted)} for place, message in enumerate(TALK)]
    encoded = ours.encode(messages, mask)
    assert spelled(ours, encoded) == expected
    counted = Encoded(encoded.ids, encoded.answers, encoded.answers)
    answers = "".join(
        f"[{S}assistant\n{message['content']}{E}\n]"
        for place, message in enumerate(TALK)
        if message["role"] == "assistant" and place not in unweighted
    )
    assert "".join(re.findall(r"\[.*?\]", spelled(ours, counted), re.DOTALL)) == answers


def test_truth_values_are_weights(ours: ChatML) -> None:
    """Oracle: false is 0, null and true are 1: what JSON and parquet files may hold."""
    for weight, is_trained in ((False, False), (0.0, False), (None, True), (True, True), (1, True)):
        messages = [TALK[1], {**TALK[2], "weight": weight}]
        assert problem_of(messages) is None
        assert ours.encode(messages).trained.any() == is_trained


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
PROBLEMS = [
    ([], "no list of messages"),
    (None, "no list of messages"),
    ("text", "no list of messages"),
    ({"role": "user"}, "no list of messages"),
    (["text"], "a message without a role"),
    ([{"content": "a"}], "a message without a role"),
    ([{"role": 1, "content": "a"}], "a message without a role"),
    ([{"role": "tool", "content": "a"}, A], "unknown role 'tool'"),
    ([U, {"role": "Assistant", "content": "a"}], "unknown role 'Assistant'"),
    ([U, {"role": "assistant"}], "content that is no string"),
    ([U, {"role": "assistant", "content": None}], "content that is no string"),
    ([U, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "content that is no string"),
    ([U, {"role": "assistant", "content": "half a pair: \ud83d"}], "content that is no valid Unicode"),
    ([U, {**A, "weight": 0.5}], "a weight that is neither 0 nor 1"),
    ([U, {**A, "weight": "0"}], "a weight that is neither 0 nor 1"),
    ([SYSTEM], "turns that do not alternate"),
    ([A], "turns that do not alternate"),
    ([A, U], "turns that do not alternate"),
    ([U, U, A], "turns that do not alternate"),
    ([U, A, A], "turns that do not alternate"),
    ([SYSTEM, SYSTEM, U, A], "turns that do not alternate"),
    ([U, SYSTEM, A], "turns that do not alternate"),
    ([U, A, SYSTEM, U, A], "turns that do not alternate"),
    ([U], None),
    ([U, A], None),
    ([SYSTEM, U, A, U], None),
    ([U, {**A, "content": ""}], None),
    ([U, {**A, "name": "x", "weight": 0}], None),
]


@pytest.mark.parametrize(("messages", "problem"), PROBLEMS)
def test_problems_of_conversations(messages: Any, problem: str | None) -> None:
    """Oracle: the reason, by hand; it is what a user reads beside a count."""
    assert problem_of(messages) == problem


def test_a_tokenizer_without_control_tokens_is_refused(tmp_path: Path) -> None:
    """Oracle: a tokenizer of two letters; the message names the token and the way out."""
    folder = data_recipes.character_folder(tmp_path / "letters", "ab")
    letters = Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), eos_token="a", pad_token="b")
    with pytest.raises(
        DataError, match=r"no '<\|im_start\|>' and no '<\|im_end\|>'.*fine-tune a base whose tokenizer has both"
    ):
        ChatML(letters)
