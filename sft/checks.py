"""What fine-tuning refuses before it trains: recipes that are not for conversations, and masks that must be mistakes.

recipe --section--> its [sft];  --refuse_unfit_settings--> a setting that rows of conversations do not have
shards --refuse_wrong_masks--> no token trained, every token trained, or an answer that does not end
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ds_slm.data.shards.prepared import Tokens
from ds_slm.data.tokenizers.tokenizer import IM_END
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Sft
from sft import shards
from sft.shards import CUT, IDS, TRAINED, Conversations


def section(recipe: Recipe) -> Sft:
    """The recipe's [sft]. Raises DataError if it has none."""
    if recipe.sft is None:
        raise DataError(f"recipe {recipe.card.name!r} has no [sft] section: pretrain it with ds_slm/pretrain.py.")
    return recipe.sft


def refuse_unfit_settings(recipe: Recipe) -> None:
    """Raise DataError if a recipe asks for something that rows of conversations do not have."""
    if recipe.train.last_batch != "wrap":
        raise DataError("train.last_batch: rows of conversations always run on into the next epoch, use 'wrap'.")
    if any(source.weight != 1 for source in recipe.data.source):
        raise DataError("data.source.weight: conversations of all sources are pooled, leave every weight at 1.")


def refuse_wrong_masks(conversations: Conversations, mask: str, ending: Sequence[int]) -> None:
    """Refuse data whose masks must be mistakes: all zero, all one, or a finished answer without its terminator.

    Args:
        conversations: the conversations of the training split.
        mask: the recipe's `sft.mask`.
        ending: the ids at the end of a trained answer.

    Raises:
        DataError: with what is wrong.
    """
    counts = conversations.counts
    share = f"{counts['supervised_tokens']:,} of {counts['tokens']:,} tokens are targets"
    if counts["supervised_tokens"] == 0:
        raise DataError(f"sft.mask = {mask!r}: nothing is trained, {share}. Are there assistant turns?")
    if mask == "all":
        return
    if counts["supervised_tokens"] >= counts["tokens"] - counts["conversations"]:
        raise DataError(f"sft.mask = {mask!r}: everything is trained, prompts too, {share}. Use 'all' to do so.")
    if (number := first_unterminated(conversations, ending)) is not None:
        raise DataError(
            f"conversation {number}: a trained answer ends without {IM_END}: a model taught that way never stops. "
            "Remove the prepared folder and prepare again."
        )


def first_unterminated(conversations: Conversations, ending: Sequence[int]) -> int | None:
    """The first conversation in which a trained answer does not end with `ending` although it was not cut."""
    conversations_before = 0
    for tokens, begins in zip(conversations.sources, conversations.begins, strict=True):
        for place in _wrong_ends(tokens, ending):
            # The last answer of a cut conversation may lack its ending.
            number = int(np.searchsorted(begins, place, side="right")) - 1
            last = begins[number + 1] - 1 if number + 1 < len(begins) else len(tokens) - 1
            if not (place == last and tokens[begins[number] : begins[number] + 1] & CUT):
                return conversations_before + number
        conversations_before += len(begins)
    return None


def _wrong_ends(tokens: Tokens, ending: Sequence[int]) -> Iterator[int]:
    """Places of the last tokens of trained answers that do not end with `ending`."""
    reach = len(ending) - 1
    for begin in range(0, len(tokens), shards.SCAN_TOKENS):
        # A block begins earlier, so that it holds the whole of an ending across its border.
        first, end = max(begin - reach, 0), begin + shards.SCAN_TOKENS
        block = tokens[first : end + 1]  # one more, to see whether an answer goes on

        # Find where answers end within this block.
        trained = np.append(block & TRAINED, 0) != 0
        ends = np.flatnonzero(trained[:-1] & ~trained[1:])
        ends = ends[(ends >= begin - first) & (ends < end - first)]

        found = np.stack([block[np.maximum(ends - back, 0)] & IDS for back in range(reach, -1, -1)])
        wrong = (found != np.array(ending)[:, None]).any(axis=0)
        yield from (ends[wrong] + first).tolist()
