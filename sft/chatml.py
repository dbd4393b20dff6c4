r"""Conversations as token ids, and which of them are trained: one function for training, evaluation, chat and export.

    messages --check--> problems
             --encode--> [im_start] role \n content [im_end] \n, for each turn; ids and a mask of the same length

Every segment is encoded by itself as ordinary text and control tokens come by id alone, so a literal `<|im_end|>` in a
message stays text, and a prompt's ids are a prefix of the whole conversation's.

Masks, each True where the token is a target:
    assistant  content and im_end of every assistant turn; not the header, which a prompt supplies, nor the newline
               after im_end, before which decoding stops
    last       the same of the last assistant turn alone
    card       the whole segment of every assistant turn, header and newline included
    all        every token
A message with "weight": 0 is trained by none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ds_slm.data.readers import is_unicode
from ds_slm.data.tokenizer import IM_END, IM_START, Tokenizer

Mask = Literal["assistant", "last", "card", "all"]
Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""The same encoding for transformers, with the trained part of `assistant` marked."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray
    """int64 [N]."""
    trained: np.ndarray
    """bool [N]: the tokens that are targets."""
    answers: np.ndarray
    """bool [N]: the tokens of assistant turns, header and newline included."""


def problem_of(messages: Any) -> str | None:
    """Why these are no conversation that can be trained on; None where they are one.

    A system turn may come first; after it user and assistant take turns, the user begins.
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
        """Raises DataError where the tokenizer lacks a control token."""
        self.tokenizer = tokenizer
        self.start_id = tokenizer.token_id(IM_START)
        self.end_id = tokenizer.token_id(IM_END)

    @cached_property
    def _newline(self) -> list[int]:
        return self.tokenizer.encode("\n")

    @cached_property
    def _headers(self) -> dict[str, list[int]]:
        return {role: [self.start_id, *self.tokenizer.encode(role + "\n")] for role in ROLES}

    def encode(self, messages: Sequence[Message], mask: Mask = "assistant") -> Encoded:
        """The ids of a conversation that `problem_of` finds right, and its mask."""
        return self.encode_batch([messages], mask)[0]

    def encode_batch(self, conversations: Sequence[Sequence[Message]], mask: Mask = "assistant") -> list[Encoded]:
        """The same for many conversations, their contents encoded on all cores."""
        contents = iter(self.tokenizer.encode_batch([turn["content"] for turns in conversations for turn in turns]))
        return [self._join(turns, [next(contents) for _ in turns], mask) for turns in conversations]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's next answer begins."""
        return [*self.encode(messages).ids.tolist(), *self._headers["assistant"]] if messages else []

    def ending(self, mask: Mask) -> list[int]:
        """The last ids that are trained of a finished answer."""
        return [self.end_id, *(self._newline if mask in ("card", "all") else [])]

    def _join(self, turns: Sequence[Message], contents: Sequence[Sequence[int]], mask: Mask) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        in_answers: list[bool] = []
        answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        for place, (turn, content) in enumerate(zip(turns, contents, strict=True)):
            header = self._headers[turn["role"]]
            ids += [*header, *content, self.end_id, *self._newline]
            wanted = turn.get("weight") != 0 and (
                mask == "all" or (place in answers[-1:] if mask == "last" else place in answers)
            )
            around = wanted and mask in ("card", "all")
            trained += [around] * len(header) + [wanted] * (len(content) + 1) + [around] * len(self._newline)
            in_answers += [place in answers and turn.get("weight") != 0] * (len(ids) - len(in_answers))
        return Encoded(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool), np.array(in_answers, dtype=bool))
