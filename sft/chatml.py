r"""Conversations as token ids, and which of them are trained: one function for training, evaluation, chat and export.

    messages --check--> problems
             --encode--> [im_start] role \n content [im_end] \n, for each turn; ids and a mask of the same length

Ids and masks are what the exported tokenizer gives for the chat template's text (`sft.probe` proves it), with one
exception: control tokens are inserted only by id, so a literal `<|im_end|>` in a message stays text. The literal of an
added token that is not special (such as `<think>` in many bases) gives its id, as in the template's text. A prompt's
ids are a prefix of the whole conversation's ids, unless an answer begins with white space that the tokenizer joins with
the header's newline: then that token is a target.

Masks, each True where the token is a target:
    assistant  content and im_end of every assistant turn; not the header, which a prompt supplies, nor the newline
               after im_end, before which decoding stops
    last       the same, for the last assistant turn only
    card       the whole segment of every assistant turn, including header and newline
    all        every token
No mask trains a message with "weight": 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ds_slm.data.sources.readers import is_unicode
from ds_slm.data.tokenizers.control_text import ControlText
from ds_slm.data.tokenizers.tokenizer import IM_END, IM_START, Tokenizer
from ds_slm.errors import DataError

Mask = Literal["assistant", "last", "card", "all"]
Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray
    """int64 [N]."""
    trained: np.ndarray
    """bool [N]: the tokens that are targets."""
    answers: np.ndarray
    """bool [N]: the tokens of assistant turns, including header and newline."""


def problem_of(messages: Any) -> str | None:
    """Why these messages cannot be used for training; None if they can.

    A system turn may come first. Then user and assistant alternate, beginning with the user.
    """
    if not isinstance(messages, list) or not messages:
        return "no list of messages"

    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a role"
        if message["role"] not in ROLES:
            return f"unknown role {message['role'][:20]!r}"
        if not isinstance(message.get("content"), str):
            return "content that is no string"
        if not is_unicode(message["content"]):
            return "content that is no valid Unicode"

        weight = message.get("weight")
        if weight is not None and weight not in (0, 1):
            return "a weight that is neither 0 nor 1"

    turns = [message["role"] for message in messages]
    spoken = turns[1:] if turns[0] == "system" else turns
    if spoken != [("user", "assistant")[place % 2] for place in range(len(spoken))] or not spoken:
        return "turns that do not alternate"
    return None


class ChatML:
    """ChatML in the ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError if the tokenizer lacks a control token."""
        if missing := [token for token in (IM_START, IM_END) if not tokenizer.has_token(token)]:
            raise DataError(
                f"the tokenizer has no {' and no '.join(map(repr, missing))}, which ChatML puts around every turn: "
                "fine-tune a base whose tokenizer has both, or train one with both in tokenizer.special_tokens."
            )
        self.tokenizer = tokenizer
        self.start_id = tokenizer.token_id(IM_START)
        self.end_id = tokenizer.token_id(IM_END)

    @cached_property
    def _newline(self) -> list[int]:
        """The ids of the newline after an im_end."""
        if self.tokenizer.cuts_alone:
            return self.tokenizer.encode("\n")
        ids = self.encode([{"role": "user", "content": "a"}]).ids.tolist()
        return ids[ids.index(self.end_id) + 1 :] if self.end_id in ids else []

    @cached_property
    def _headers(self) -> dict[str, list[int]]:
        return {role: [self.start_id, *self.tokenizer.encode(role + "\n")] for role in ROLES}

    @cached_property
    def _control_text(self) -> ControlText:
        return self.tokenizer.control_text((IM_START, IM_END))

    def encode(self, messages: Sequence[Message], mask: Mask = "assistant") -> Encoded:
        """The ids and the mask of a conversation in which `problem_of` finds no problem."""
        return self.encode_batch([messages], mask)[0]

    def encode_batch(self, conversations: Sequence[Sequence[Message]], mask: Mask = "assistant") -> list[Encoded]:
        """The same for many conversations, their contents encoded on all cores."""
        if not self.tokenizer.cuts_alone:
            return self._encode_whole(conversations, mask)

        # A turn's header and content are one text; most often its ids begin with the header's ids.
        texts = [f"{turn['role']}\n{turn['content']}" for turns in conversations for turn in turns]
        segments = iter(self.tokenizer.encode_batch(texts))
        encoded = [self._join(turns, [next(segments) for _ in turns], mask) for turns in conversations]

        # For the others, find the header's end in the text.
        joined = [place for place, one in enumerate(encoded) if one is None]
        whole = iter(self._encode_whole([conversations[place] for place in joined], mask))
        return [next(whole) if one is None else one for one in encoded]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's next answer begins."""
        if not messages:
            return []
        if self.tokenizer.cuts_alone:
            return [*self.encode(messages).ids.tolist(), *self._headers["assistant"]]
        text = self._written(messages)[0] + self._control_text.marks[IM_START] + "assistant\n"
        return self._control_text.encode_batch([text])[0][0]

    def ending(self, mask: Mask) -> list[int]:
        """The last trained ids of a finished answer."""
        return [self.end_id, *(self._newline if mask in ("card", "all") else [])]

    def _join(self, turns: Sequence[Message], segments: Sequence[Sequence[int]], mask: Mask) -> Encoded | None:
        """Turns joined one after the other; None if a header and its content share a token."""
        ids: list[int] = []
        trained: list[bool] = []
        in_answers: list[bool] = []
        for turn, segment, (wanted, around, answer) in zip(turns, segments, _targets(turns, mask), strict=True):
            header = self._headers[turn["role"]]
            if list(segment[: len(header) - 1]) != header[1:]:
                return None
            ids += [self.start_id, *segment, self.end_id, *self._newline]
            content_tokens = len(segment) - len(header) + 2
            trained += [around] * len(header) + [wanted] * content_tokens + [around] * len(self._newline)
            in_answers += [answer] * (len(ids) - len(in_answers))
        return Encoded(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool), np.array(in_answers, dtype=bool))

    def _encode_whole(self, conversations: Sequence[Sequence[Message]], mask: Mask) -> list[Encoded]:
        """Encode each conversation as one text; its masks follow from the places of tokens in the text."""
        written = [self._written(turns) for turns in conversations]
        encoded = self._control_text.encode_batch([text for text, _ in written])
        return [
            _located(ids, spans, turns, borders, mask)
            for turns, (_, borders), (ids, spans) in zip(conversations, written, encoded, strict=True)
        ]

    def _written(self, turns: Sequence[Message]) -> tuple[str, list[tuple[int, int, int, int]]]:
        """The template's text with marks, and where each turn, its content, its newline and the next turn begin."""
        start, end = (self._control_text.marks[token] for token in (IM_START, IM_END))
        text, borders = [], []
        begin = 0
        for turn in turns:
            header, content = f"{start}{turn['role']}\n", turn["content"] + end
            text += [header, content, "\n"]
            content_begin = begin + len(header)
            newline = content_begin + len(content)
            borders.append((begin, content_begin, newline, newline + 1))
            begin = newline + 1
        return "".join(text), borders


def _targets(turns: Sequence[Message], mask: Mask) -> list[tuple[bool, bool, bool]]:
    """For each turn: whether its content is trained, whether the text around it is, and whether it is an answer."""
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    found = []
    for place, turn in enumerate(turns):
        has_weight = turn.get("weight") != 0
        wanted = has_weight and (mask == "all" or place in (answers[-1:] if mask == "last" else answers))
        found.append((wanted, wanted and mask in ("card", "all"), has_weight and place in answers))
    return found


def _located(
    ids: list[int],
    spans: np.ndarray,
    turns: Sequence[Message],
    borders: Sequence[tuple[int, int, int, int]],
    mask: Mask,
) -> Encoded:
    """Masks by characters: a token belongs to a part of the text when it holds one of its characters."""
    trained, in_answers = (np.zeros(len(ids), dtype=bool) for _ in range(2))

    def tokens(begin: int, end: int) -> slice:
        first = int(np.argmax(spans[:, 1] > begin)) if (spans[:, 1] > begin).any() else len(ids)
        return slice(first, int(np.count_nonzero(np.maximum.accumulate(spans[:, 0]) < end)))

    for (begin, content, newline, end), (wanted, around, answer) in zip(borders, _targets(turns, mask), strict=True):
        trained[tokens(begin, end) if around else tokens(content, newline)] |= wanted
        in_answers[tokens(begin, end)] |= answer
    return Encoded(np.array(ids, dtype=np.int64), trained, in_answers)
