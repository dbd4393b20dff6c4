"""Text with control tokens at chosen places, encoded as a whole like a rendered chat template.

    text with marks --> the tokenizer, in which only marks are control tokens --> ids, spans

Added tokens that are not special, such as <think>, are found in the text as in a template's text.

The text beside a control token may depend on the token: a space may be put before a word, or white space removed. So
the tokenizer itself cuts the text, with marks in the tokens' places. A mark is random for each encoder, so no text can
hold one, and the literal of a control token stays text.
"""

import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ds_slm.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class ControlText:
    """A tokenizer that reads marks as control tokens."""

    def __init__(self, backend: "tokenizers.Tokenizer", tokens: Sequence[str], plain: Sequence[str]) -> None:
        """Treat the literals of all added tokens as text, except the `plain` ones.

        Raises DataError for control tokens that the tokenizer would not cut out of a text.
        """
        from tokenizers import Tokenizer

        content = json.loads(backend.to_str())
        added = {token["content"]: token for token in content["added_tokens"]}
        if missing := [token for token in tokens if token not in added]:
            raise DataError(
                [
                    f"the tokenizer has {token!r} in its vocabulary, but not among its added tokens, so a chat "
                    "template's text would not give it: add it there (added_tokens in tokenizer.json)."
                    for token in missing
                ]
            )

        for token in added.values():
            token["special"] = token["content"] not in plain

        self.marks = {token: f"<|{secrets.token_hex(16)}|>" for token in tokens}
        """The mark that stands for each token in a text."""
        for token, mark in self.marks.items():
            added[token] |= {"content": mark, "special": False}
        self._backend = Tokenizer.from_str(json.dumps(content))
        self._backend.encode_special_tokens = True

        # Marks are new words, so the ids of all added tokens may differ from the tokenizer's.
        written = dict(zip(added, added, strict=True)) | self.marks
        ids = {self._backend.token_to_id(text): backend.token_to_id(token) for token, text in written.items()}
        self._ids = {here: there for here, there in ids.items() if here is not None and there is not None}

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """The ids of each text, and the span of each token in it: int64 [N, 2], in characters."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            ([self._ids.get(number, number) for number in one.ids], np.array(one.offsets, np.int64).reshape(-1, 2))
            for one in encodings
        ]
