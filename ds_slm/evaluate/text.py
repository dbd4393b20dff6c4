"""Contexts and continuations as ids, by lm-evaluation-harness's rules.

    [(context, continuation), ...] --TextEncoder.pairs--> [Request, ...]

Texts are encoded as transformers encodes them with the exported tokenizer: the literal of a control token is that
token, and a tokenizer that puts BOS before a text does so here. White space at the end of a context belongs to the
continuation. Both are encoded together, and the continuation's ids are the ids after the context's.
"""

from collections.abc import Sequence
from functools import cached_property

from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.evaluate.scoring import Request


class TextEncoder:
    """A tokenizer, as the harness uses one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        bos_id = tokenizer.bos_id
        self.prefix_id = tokenizer.eos_id if bos_id is None else bos_id
        """The id before a text that has no context: BOS, or EOS if the tokenizer has no BOS."""

    @cached_property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts tokens around a text, such as BOS; tokenizers trained here do not."""
        return self.tokenizer.encode_with_control_tokens([""], add_special_tokens=True) != [[]]

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """The ids of each text.

        Args:
            texts: the texts to encode.
            add_special_tokens: None: the tokenizer decides, but a text that begins with BOS does not get a second one.
        """
        plain = self.tokenizer.encode_with_control_tokens(texts, add_special_tokens=False)
        if add_special_tokens is False or not self.adds_special_tokens:
            return plain

        full = self.tokenizer.encode_with_control_tokens(texts, add_special_tokens=True)
        bos = self.tokenizer.decode([self.prefix_id]) if add_special_tokens is None else ""
        begun = [bool(bos) and text.startswith(bos) for text in texts]
        return [one if stays else other for one, other, stays in zip(plain, full, begun, strict=True)]

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Request]:
        """Each context and continuation as ids. Raises DataError for continuations that have no ids of their own."""
        moved = [_trailing_space_moved(context, text) for context, text in texts]
        whole = self.encode([context + text for context, text in moved])
        contexts = list(dict.fromkeys(context for context, _ in moved))
        context_ids = dict(zip(contexts, self.encode(contexts), strict=True))

        pairs = []
        for (context, text), ids in zip(moved, whole, strict=True):
            if context:
                pairs.append(Request(context_ids[context], ids[len(context_ids[context]) :]))
                continue
            (alone,) = self.encode([text], add_special_tokens=False)
            has_prefix = alone[:1] == [self.prefix_id]
            pairs.append(Request(alone[:1], alone[1:]) if has_prefix else Request([self.prefix_id], alone))

        # A choice without ids would always win.
        empty = [asked for pair, asked in zip(pairs, texts, strict=True) if not pair.continuation_ids]
        if empty:
            raise DataError(
                [f"{text!r} after {context[-40:]!r} has no token of its own in this tokenizer: it cannot be scored."
                 for context, text in empty]
            )  # fmt: skip
        return pairs


def _trailing_space_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
