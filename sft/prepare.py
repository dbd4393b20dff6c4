"""From a recipe's conversations to shards, in the tokenizer of the base that is fine-tuned.

sources --ds_slm.data.shards.prepare, with sft.encode's format--> shards, journal, manifest
--checks of the base's tokenizer and of older versions' ids--> Prepared, its chat template beside it
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from ds_slm.data.shards.identity import TOKENIZER
from ds_slm.data.shards.prepare import prepare
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE
from ds_slm.errors import DataError
from ds_slm.files import replace_text
from ds_slm.recipe.schema import Recipe
from sft.encode import conversation_format
from sft.older import refuse_older_ids


def prepare_conversations(
    recipe: Recipe,
    folder: Path,
    tokenizer_folder: Path | None,
    sources: Mapping[str, Path] | None = None,
    report: Callable[[str], None] = print,
) -> Prepared:
    """Prepare conversations as shards, in the base's tokenizer, with `ds_slm.data.shards.prepare.prepare`.

    Without a `tokenizer_folder` the tokenizer is the one with which they were prepared before, or the recipe's if that
    needs no training.

    Raises:
        DataError: with every problem found, such as a base whose tokenizer is not the one that made the data.
    """
    if tokenizer_folder is None and recipe.tokenizer.kind == "bpe" and not (folder / TOKENIZER).exists():
        raise DataError(
            f"recipe {folder.name!r} has a tokenizer that is trained with its base: name that one, --base MODEL."
        )

    document_format = conversation_format(recipe, tokenizer_folder)
    prepared = prepare(recipe, folder, sources, report=report, document_format=document_format)

    refuse_older_ids(prepared)

    # An export copies the tokenizer's folder, and the chat template with it.
    template = prepared.tokenizer_folder / CHAT_TEMPLATE_FILE
    if not template.is_file():
        replace_text(template, CHAT_TEMPLATE)
    return prepared
