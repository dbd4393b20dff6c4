"""Mistakes that only show when two sections of a recipe, each right by itself, are compared.

sections by name --disagreements--> problems, a sentence each
"""

from collections.abc import Mapping

from ds_slm.recipe.data_sections import Data, Tokenizer
from ds_slm.recipe.section import Section
from ds_slm.recipe.sections import Model, Optimizer, Train


def disagreements(sections: Mapping[str, Section]) -> list[str]:
    """The problems that two sections have together. An absent section has none."""
    model, tokenizer, data = sections.get("model"), sections.get("tokenizer"), sections.get("data")
    optimizer, train = sections.get("optimizer"), sections.get("train")
    problems = []

    if isinstance(train, Train) and isinstance(data, Data) and train.global_batch_tokens % data.seq_len:
        lower = train.global_batch_tokens // data.seq_len * data.seq_len
        problems.append(
            f"train.global_batch_tokens = {train.global_batch_tokens} cannot be split into rows of "
            f"data.seq_len = {data.seq_len}: use {f'{lower} or ' if lower else ''}{lower + data.seq_len}"
        )

    if isinstance(model, Model) and isinstance(data, Data) and data.seq_len > model.max_position_embeddings:
        problems.append(
            f"data.seq_len = {data.seq_len} is longer than model.max_position_embeddings = "
            f"{model.max_position_embeddings}: shorten the first or raise the second"
        )

    if isinstance(model, Model) and isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size > model.vocab_size:
        problems.append(
            f"tokenizer.vocab_size = {tokenizer.vocab_size} has ids beyond model.vocab_size = {model.vocab_size}: "
            "make the model's at least as large"
        )

    if isinstance(optimizer, Optimizer) and optimizer.min_lr > optimizer.lr:
        problems.append(f"optimizer.min_lr = {optimizer.min_lr} exceeds optimizer.lr = {optimizer.lr}: lower the first")

    return problems
