"""How conversations are read and encoded: the document format with which `ds_slm.data.shards` prepares shards.

    a row's JSON --sft.forms--> messages --sft.chatml--> ids with masks --sft.shards.flagged--> ids with flags
                 --> a problem: left out and counted, or refused

`sft.invalid` decides between leaving out and refusing.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ds_slm.data.shards.writer import DocumentFormat, Encode, UnusableDocuments
from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Sft
from sft import builtin
from sft.chatml import ChatML, problem_of
from sft.checks import section
from sft.forms import EXPECTED, read_messages
from sft.probe import refuse_other_encoding
from sft.shards import flagged

ENCODING = {"conversations": 2}
"""The encoding's version in manifests: the chat template's text. Older versions, without it, encoded contents alone."""
WAY_OUT = f"expected: {EXPECTED}; mend them, or set sft.invalid = 'drop' to leave such ones out and count them."


def conversation_format(recipe: Recipe, tokenizer_folder: Path | None = None) -> DocumentFormat:
    """How conversations are read and encoded; with the recipe's tokenizer if no other is given."""
    settings = section(recipe)
    deciding = settings.dump_for_hash(include={"mask", "system_turns", "max_rows", "invalid"})
    notes: Counter[str] = Counter()

    return DocumentFormat(
        encode=lambda tokenizer: _encode(recipe, tokenizer, notes),
        tokenizer_folder=tokenizer_folder,
        expected=EXPECTED,
        notes=lambda: notes,
        builtin=lambda: [json.dumps(messages) for messages in builtin.conversations()],
        as_json=True,
        row_limit=settings.max_rows,
        dtype=np.dtype("<u4"),
        identity={"sft": {**deciding, "seq_len": recipe.data.seq_len}},
        version=ENCODING,
    )


def _encode(recipe: Recipe, tokenizer: Tokenizer, notes: Counter[str]) -> Encode:
    settings, chatml = section(recipe), ChatML(tokenizer)
    refuse_other_encoding(tokenizer)
    limit = recipe.data.seq_len + 1

    def encode(texts: list[str]) -> list[np.ndarray | str]:
        read = [read_messages(json.loads(text), notes) for text in texts]
        conversations = [messages for messages, _ in read]
        problems = [unclear or problem_of(messages) for messages, unclear in read]

        if settings.invalid == "refuse" and any(problems):
            checked = enumerate(zip(texts, problems, strict=True))
            wrong = {place: f"a conversation has {why}: {text[:200]}" for place, (text, why) in checked if why}
            raise UnusableDocuments(wrong, WAY_OUT)

        sound = [
            _turns(messages, settings) for messages, problem in zip(conversations, problems, strict=True) if not problem
        ]
        encoded = iter(chatml.encode_batch(sound, settings.mask))
        return [problem or flagged(next(encoded), limit) for problem in problems]

    return encode


def _turns(messages: list[dict[str, Any]], settings: Sft) -> list[dict[str, Any]]:
    keep = settings.system_turns == "keep"
    return [message for message in messages if keep or message["role"] != "system"]
