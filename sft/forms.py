"""The forms in which conversations are published, and the one form that is used for training.

    one value of the column --read_messages--> messages of `role` and `content`, and why they cannot be used

    role, content                      as they are
    from, value                        human, user: user; gpt, chatgpt, assistant, bot, model: assistant; system: system
    content or value as a list of      joined, if every part is {"type": "text", "text": ...}
    parts

A message that has both pairs of keys, or a conversation with messages of both forms, is ambiguous and cannot be used.
The same holds for a message whose flags say both that it is trained and that it is not. `"train": false` (or
`training`, `loss`) is `"weight": 0`. Other text beside a content (UNREAD) is counted and left out; other keys of a
message are ignored. A byte order mark at the start of a content is not part of it.
"""

from collections import Counter
from typing import Any

from ds_slm.data.sources.readers import BYTE_ORDER_MARK

EXPECTED = (
    "a list of messages, each with 'role' (system, user or assistant) and 'content' (a string), or with 'from' "
    "(system, human or gpt) and 'value'; a content may be a list of "
    '{"type": "text", "text": ...}; a system message may come first, after it user and assistant take turns'
)
"""What a conversation must be, in one clause."""

SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model"), "assistant"),
}
"""The speaker in messages of `from` and `value` -> the role."""

FLAGS = ("train", "training", "loss")
"""Keys that say, as true or false, whether a message is trained."""
UNREAD = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "images", "audio", "videos")
"""Keys whose values are text, or other content, beside the message's content."""

UNREAD_KEY = "messages have {!r} beside their content, which is not read"
TWO_WEIGHTS = "a message that is to be trained and not to be trained"
NOT_TRAINED = "messages that say 'train': false are read as those of 'weight': 0"
TWO_FORMS = "messages of two forms at once"
FROM_VALUE = "messages of 'from' and 'value' are read as 'role' and 'content' (human: user, gpt: assistant)"
TEXT_PARTS = "contents that are lists of text parts are joined"


def read_messages(value: Any, notes: Counter[str]) -> tuple[Any, str | None]:
    """A conversation in the one form; and, if its form is unclear, the reason.

    Args:
        value: the column's value. Anything but a list of messages is returned unchanged.
        notes: counts the messages of each form other than `role` and `content`.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value, None
    named = [{key for key, held in message.items() if held is not None} for message in value]  # parquet fills up
    of_speakers = [{"from", "value"} <= keys for keys in named]
    of_roles = [{"role", "content"} <= keys for keys in named]
    if any(of_speakers) and any(of_roles):  # in one message, or in two
        return value, TWO_FORMS

    messages = value
    if value and all(of_speakers):
        notes[FROM_VALUE] += len(value)
        messages = [_with_role(message) for message in value]
    if any(len(_flags(message)) > 1 for message in messages):
        return value, TWO_WEIGHTS
    return [_with_weight(_with_text(message, notes), notes) for message in messages], None


def _with_role(message: dict[str, Any]) -> dict[str, Any]:
    speaker = message["from"]
    role = SPEAKERS.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker
    return {**message, "role": role, "content": message["value"]}


def _flags(message: dict[str, Any]) -> set[bool]:
    """Whether a message is trained, by its keys: no answer, one answer, or both."""
    weight = [bool(message["weight"])] if message.get("weight") in (0, 1) else []
    return {*weight, *(message[key] for key in FLAGS if isinstance(message.get(key), bool))}


def _with_weight(message: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """The message with its flags turned into its weight; counts what it holds beside its content."""
    notes.update(UNREAD_KEY.format(key) for key in UNREAD if message.get(key))
    if _flags(message) != {False} or message.get("weight") == 0:
        return message
    notes[NOT_TRAINED] += 1
    return {**message, "weight": 0}


def _with_text(message: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        notes[TEXT_PARTS] += 1
        content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        return {**message, "content": content.lstrip(BYTE_ORDER_MARK)}
    return message


def _is_text(part: Any) -> bool:
    """Whether a part is only a text; empty keys come from parquet."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return False
    return all(held is None for key, held in part.items() if key not in ("type", "text"))
