"""The forms in which conversations are published, and the one that is trained on.

    one value of the column --read_messages--> messages of `role` and `content`, and why they cannot be used

    role, content                      as they are
    from, value                        human, user: user; gpt, chatgpt, assistant, bot, model: assistant; system: system
    content or value as a list of      joined, where every part is {"type": "text", "text": ...}
    parts

A message that has both pairs of keys, and a conversation with messages of both forms, say two things at once: they
cannot be used. Other keys of a message are left alone.
"""

from typing import Any

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
"""Who speaks in messages of `from` and `value`, and the role that is."""

TWO_FORMS = "messages of two forms at once"
FROM_VALUE = "messages of 'from' and 'value' are read as 'role' and 'content' (human: user, gpt: assistant)"
TEXT_PARTS = "contents that are lists of text parts are joined"


def read_messages(value: Any, notes: set[str]) -> tuple[Any, str | None]:
    """A conversation in the one form, and why it cannot be told which one it has; else None.

    Args:
        value: what the column holds. What is no list of messages comes back as it is.
        notes: gets a line for each form that was found, beside `role` and `content`.
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
        notes.add(FROM_VALUE)
        messages = [_with_role(message) for message in value]
    return [_with_text(message, notes) for message in messages], None


def _with_role(message: dict[str, Any]) -> dict[str, Any]:
    speaker = message["from"]
    role = SPEAKERS.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker
    return {**message, "role": role, "content": message["value"]}


def _with_text(message: dict[str, Any], notes: set[str]) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list) or not parts or not all(map(_is_text, parts)):
        return message
    notes.add(TEXT_PARTS)
    return {**message, "content": "".join(part["text"] for part in parts)}


def _is_text(part: Any) -> bool:
    """Whether a part is a text and nothing else; keys that hold nothing are parquet's."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return False
    return all(held is None for key, held in part.items() if key not in ("type", "text"))
