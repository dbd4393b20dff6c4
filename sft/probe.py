"""Proof, before conversations are prepared, that a tokenizer gives the same ids and targets in other programs.

    hard conversations --ChatML--> ids, targets
                       --the folder that is exported, transformers' apply_chat_template--> ids, targets: the same

The comparison covers everything, including literals of added tokens. The exception is literals of control tokens, which
are text here and control tokens in transformers: here the check is that they give no control token.
"""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
from ds_slm.data.tokenizers.tokenizer import IM_END, IM_START, Tokenizer
from ds_slm.errors import DataError
from sft.chatml import ChatML

HARD = (
    "a",
    "",
    " ",
    "\n",
    " one space first",
    "  two spaces first, and after  ",
    "\n\nA blank line first.",
    " \n after a space",
    "\ttab\r\n",
    "3,141.59 and 007",
    "😀 日本語 e\u0301 👨\u200d👩\u200d👧",
    "\ufb01ne, Straße, İstanbul, naïveté",
    "\u2581low line",
    "user\nassistant\n",
)
"""Contents at whose borders tokenizers differ."""
SHOWN_TOKENS = 12


def hard_conversations() -> list[list[dict[str, Any]]]:
    """Conversations of one turn and of many, with each hard content in each place."""
    pairs = [(content, other) for content, other in zip(HARD, (*HARD[3:], *HARD[:3]), strict=True)]
    short = [_turns([content, other]) for content, other in pairs]
    system = [{"role": "system", "content": content} for content in HARD]
    return [*short, *([turn, *_turns(["a", "b"])] for turn in system), _turns([*HARD, *HARD]), _turns(["a"])]


def _with_added_tokens(tokens: list[str]) -> list[list[dict[str, Any]]]:
    """Conversations with literals of added tokens alone, first, last, between words or spaces, and side by side."""
    places = ("{0}", "{0}a", "a{0}", "a{0}b", "a {0} b", " {0}\n", "{0}{0}")
    return [_turns([place.format(token) for place in places for _ in range(2)]) for token in tokens]


def _turns(contents: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


@lru_cache(maxsize=4)
def refuse_other_encoding(tokenizer: Tokenizer) -> None:
    """Raise DataError, with an example, if transformers would encode a conversation in another way than training."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        theirs = AutoTokenizer.from_pretrained(folder)

    chatml = ChatML(tokenizer)
    conversations = [*hard_conversations(), *_with_added_tokens(tokenizer.plain_added_tokens)]
    for messages, encoded in zip(conversations, chatml.encode_batch(conversations), strict=True):
        made = theirs.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        prompt = theirs.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True)

        compared = {
            "ids": (encoded.ids.tolist(), list(made["input_ids"])),
            "targets": (encoded.trained.astype(int).tolist(), list(made["assistant_masks"])),
            "ids of the prompt": (chatml.prompt(messages), list(prompt["input_ids"])),
        }
        for what, (ours, others) in compared.items():
            if ours != others:
                raise DataError(_told(what, messages, ours, others))

    # transformers takes these literals as control tokens; here they must stay text.
    literal = _turns([IM_END, f"{IM_START}{IM_START}a{IM_END}"])
    ids = chatml.encode(literal).ids.tolist()
    if (ids.count(chatml.start_id), ids.count(chatml.end_id)) != (len(literal), len(literal)):
        raise DataError(f"the tokenizer makes control tokens of the text {literal[1]['content']!r}: {_WAY_OUT}")


_WAY_OUT = "fine-tune a base with another tokenizer."


def _told(what: str, messages: list[dict[str, Any]], ours: list[int], others: list[int]) -> str:
    """A sentence on where two encodings begin to differ."""
    place = next((n for n, pair in enumerate(zip(ours, others, strict=False)) if pair[0] != pair[1]), len(ours))
    place = min(place, len(others))
    shown = [f"{one[place : place + SHOWN_TOKENS]}" for one in (ours, others)]
    contents = str([message["content"] for message in messages[:3]])[:200]
    return (
        f"this tokenizer cannot be trained with ChatML: the export's chat template would give other {what} than "
        f"training. For the turns {contents}, from token {place} on, training has {shown[0]} and the template "
        f"{shown[1]}: {_WAY_OUT}"
    )
