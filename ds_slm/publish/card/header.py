"""The head of a model card, which the hub reads: licence, language, data, base, and results.

RunFacts, eval.json --card_data--> huggingface_hub's ModelCardData --> YAML

It holds hub ids only of things that are on the hub, and figures only of whole sets with the published questions. If a
set's published questions are not known, the name of its metric says so.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_slm.errors import DataError, RecipeError
from ds_slm.model.hf import hf_config
from ds_slm.publish.card.facts import RunFacts
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.hub_names import is_repo_id
from ds_slm.run.scores import DOCUMENTATION, EVAL_FILE, remarks_on

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LIBRARY, PIPELINE = "transformers", "text-generation"


class HubDataset(NamedTuple):
    """The dataset of a benchmark on the hub."""

    id: str
    config: str | None
    split: str | None


def card_data(
    facts: RunFacts, title: str, scored: Mapping[str, Any], datasets: Mapping[str, HubDataset]
) -> "ModelCardData":
    """The head of the card of an exported checkpoint.

    Args:
        facts: the checkpoint and its run.
        title: the model's name.
        scored: eval.json of these weights; empty if they were not scored.
        datasets: task -> its dataset on the hub.

    Raises:
        RecipeError: a source has an id that no dataset of the hub can have, or another licence has no name.
        DataError: a figure is impossible for any model.
    """
    from huggingface_hub import ModelCardData

    card = facts.recipe.card
    if card.license == "other" and card.license_name is None:
        raise RecipeError(
            "card.license = 'other' does not say which: --set card.license_name=NAME, and with "
            "--set card.license_link=URL where its text is."
        )
    base = card.base_model if facts.has_base else None
    results = [one for name, task in scored.get("tasks", {}).items() for one in _results(name, task, datasets)]
    accuracy = ["accuracy"] if any(one.metric_type == "accuracy" for one in results) else []
    return ModelCardData(
        language=card.language or None,
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=_tags(facts),
        datasets=hub_sources(facts) or None,
        base_model=base,
        base_model_relation="finetune" if base else None,
        metrics=[*accuracy, *(["perplexity"] if facts.held_out else [])] or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def hub_sources(facts: RunFacts) -> list[str]:
    """Ids of the datasets of the hub that were read. Raises RecipeError if one is not a valid id."""
    ids = [source.id for source in facts.recipe.data.source if source.id and is_from_hub(source, facts)]
    if wrong := [one for one in ids if not is_repo_id(one)]:
        raise RecipeError([f"data.source.id: {one!r} is not a dataset's id on the hub." for one in wrong])
    return list(dict.fromkeys(ids))


def is_from_hub(source: Source, facts: RunFacts) -> bool:
    """Whether a source was read from the hub, and not from local files in its place."""
    replaced = facts.environment.get("replaced_sources") or ()
    by_id = source.kind == "hub" or (source.kind == "tokens" and not source.path)
    return by_id and source.name not in replaced


def _tags(facts: RunFacts) -> list[str]:
    shape = facts.recipe.model
    config = hf_config(shape, eos_id=None, dtype="float32")
    own = ["custom_code"] if "auto_map" in config else []
    kind = "pretraining" if facts.recipe.sft is None else "conversational"
    return ["ds_slm", "small-language-model", config["model_type"], kind, *own]


def _results(name: str, task: Mapping[str, Any], datasets: Mapping[str, HubDataset]) -> "list[EvalResult]":
    """One task's figures for the model-index; empty for a trial with a limit, or if rows are not the published ones."""
    from huggingface_hub import EvalResult

    if task["limited"] or task["published"] is False:
        return []

    for metric, figure in task["figures"].items():
        _refuse_impossible(f"{name}/{metric}", metric, figure["value"])

    rows = datasets.get(name, HubDataset(name, None, None))
    remarks = remarks_on(name, task)
    if name == DOCUMENTATION:
        remarks = [f"{task['items']:,} questions made from the documentation of the scoring machine"]
    return [
        EvalResult(
            task_type=PIPELINE,
            dataset_type=rows.id,
            dataset_name=name,
            dataset_config=rows.config,
            dataset_split=rows.split,
            metric_type=_metric_type(metric),
            metric_name=f"{metric} ({', '.join(remarks)})" if remarks else metric,
            metric_value=round(figure["value"], 4),
        )
        for metric, figure in task["figures"].items()
    ]


def _refuse_impossible(name: str, metric: str, value: float) -> None:
    """Raise DataError for a figure that no model can have; for other metrics the range is not known."""
    kind = _metric_type(metric)
    least = 0.0 if kind in ("accuracy", "perplexity") else -math.inf
    most = 100.0 if kind == "accuracy" else math.inf
    if not math.isfinite(value) or not least <= value <= most:
        expected = {"accuracy": "0 to 100", "perplexity": "a number of 0 or more"}.get(kind, "a number")
        raise DataError(f"{EVAL_FILE}: {name} is {value}, expected {expected}: score the model again.")


def _metric_type(metric: str) -> str:
    if metric.startswith("acc") or metric == "exact_match":
        return "accuracy"
    return "perplexity" if metric.endswith("perplexity") else metric
