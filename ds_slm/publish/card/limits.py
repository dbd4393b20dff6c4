"""What a model cannot do, as far as its run shows: the last part of a model card."""

from collections.abc import Mapping
from typing import Any

from ds_slm.publish.card.facts import RunFacts
from ds_slm.publish.card.markdown import in_words
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.hub_names import language_name
from ds_slm.run.scores import rows_of

TOKENS_PER_PARAMETER = 20
"""Tokens per parameter in compute-optimal training (arXiv 2203.15556, table 3)."""


def limits(facts: RunFacts, scored: Mapping[str, Any]) -> list[str]:
    """The limits as a list, in one paragraph.

    Args:
        facts: the checkpoint and its run.
        scored: eval.json of these weights; empty if they were not scored.
    """
    recipe, count = facts.recipe, parameters(facts.recipe.model)
    languages = recipe.card.language
    lines = [
        f"Size: with {in_words(count)} parameters it holds few facts and makes up others. Do not rely on what it says.",
        f"Context: it reads at most {recipe.model.max_position_embeddings:,} tokens, prompt and answer together"
        + (
            f", and was trained on rows of {recipe.data.seq_len:,}: beyond that this run did not test it."
            if recipe.data.seq_len < recipe.model.max_position_embeddings
            else "."
        ),
    ]

    if recipe.sft is None:
        lines.append("Use: it continues text. It does not answer questions, and does not follow instructions.")
        share = facts.tokens / count
        few = (
            f", fewer than the {TOKENS_PER_PARAMETER} of compute-optimal training"
            if share < TOKENS_PER_PARAMETER
            else ""
        )
        lines.append(
            f"Data: this run added {share:.2g} tokens for each parameter to what the base had seen; it may have cost "
            "some of what the base knew."
            if facts.has_base
            else f"Data: it saw {share:.2g} tokens for each parameter{few}."
        )
    else:
        lines.append("Use: this fine-tuning taught it answers by examples alone, without anybody's preferences.")
    if languages and "multilingual" not in languages:
        named = ", ".join(map(language_name, languages))
        lines.append(f"Language: text in other languages than {named} is not what it was trained on.")

    # A trial with a limit has such a wide margin that guessing always lies within it.
    whole = {name: task for name, task in scored.get("tasks", {}).items() if not task["limited"]}
    rows = rows_of({**scored, "tasks": whole}, None) if whole else []
    accuracies = [row for row in rows if row.chance is not None]
    if accuracies and all(_is_near_chance(row.ours, row.chance, row.plus_minus) for row in accuracies):
        lines.append("Knowledge: on no benchmark above can its accuracy be told from guessing.")
    lines.append(
        "Safety: this run did not teach it to refuse anything, its output is not filtered, and it was not tested for "
        "bias or for harmful text. What its data hold, it may repeat."
    )
    return ["\n".join(f"- {line}" for line in lines)]


def _is_near_chance(ours: float | None, chance: float | None, plus_minus: float | None) -> bool:
    return None not in (ours, chance, plus_minus) and ours - chance <= plus_minus  # pyright: ignore
