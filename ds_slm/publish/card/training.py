"""The parts of a model card on how the model was made: its data and its training."""

from collections.abc import Mapping
from typing import Any, assert_never

from ds_slm.publish.card import devices
from ds_slm.publish.card.facts import RunFacts
from ds_slm.publish.card.header import is_from_hub
from ds_slm.publish.card.markdown import number, percent, table, times
from ds_slm.publish.curves import is_number
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.schema import Recipe, changes_result

OF_TRAINING = ("val", "train")
"""Prefixes of published figures that training itself measures; the others are benchmarks."""
HUB = "https://huggingface.co/datasets"
OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW with 8-bit states"}
PRECISIONS = {
    "bf16": "bf16 in forward and backward, fp32 weights in the optimiser",
    "fp16": "fp16 in forward and backward with a dynamic loss scale, fp32 weights in the optimiser",
    "fp32": "fp32",
}
MASKS = {
    "assistant": "the content of every assistant turn and its end",
    "last": "the content of the last assistant turn and its end",
    "card": "every assistant turn with its header, each conversation weighing the same",
    "all": "every token",
}


def data(facts: RunFacts) -> list[str]:
    """Sources and their mix as it was drawn, what was held out, and the tokenizer."""
    recipe = facts.recipe
    mixed = recipe.sft is None
    drawn = facts.rows_drawn() if mixed else []
    weights = sum(source.weight for source in recipe.data.source)

    summary = facts.environment.get("rows") or {}
    there = (summary.get("train") or {}).get("rows") or {}
    rows = []
    for place, source in enumerate(recipe.data.source):
        cells = [source.name, _origin(source, facts), percent(source.weight / weights)]
        if mixed:
            passes = f"{drawn[place] / there[source.name]:.3g}" if there.get(source.name) else ""
            cells += [percent(drawn[place] / max(sum(drawn), 1)), f"{drawn[place]:,}", passes]
        rows.append(cells)
    header = ("source", "where from", "share asked for", *(("share drawn", "rows drawn", "passes") if mixed else ()))
    return [table(header, rows, right=range(2, 6)), *_counts(facts, summary), _tokenizer(facts)]


def _origin(source: Source, facts: RunFacts) -> str:
    """Where a source was read from, without local paths, which are private."""
    if source.name in (facts.environment.get("replaced_sources") or ()):
        asked = f" in place of {source.id}" if source.id else ""
        return f"local files{asked}"
    if source.kind == "builtin":
        return "documentation of the Python packages that were installed on the machine"
    if source.id and is_from_hub(source, facts):
        details = [source.config, f"split {source.split}", f"revision {source.revision}" if source.revision else None]
        told = f" ({', '.join(filter(None, details))})" if source.kind == "hub" else ""
        return f"[{source.id}]({HUB}/{source.id}){told}"
    return "local files of token ids" if source.kind == "tokens" else "local files"


def _counts(facts: RunFacts, rows: Mapping[str, Any]) -> list[str]:
    """Size of the data, number of times it was seen, and held-out part; empty if the run did not record them."""
    train, val, recipe = rows.get("train") or {}, rows.get("val") or {}, facts.recipe
    if recipe.sft is not None and "conversations" in train:
        dropped = sum((rows.get("dropped") or {}).values())
        counts = [f"{train['conversations']:,} conversations to train on", f"{val.get('conversations', 0):,} held out"]
        counts += [f"{dropped:,} left out because they could not be used"] if dropped else []
        counts += [f"{train['truncated']:,} cut to the length of a row"] if train.get("truncated") else []
        share = percent(rows.get("supervised_share", 0))
        return [f"{', '.join(counts)}. {share} of the {train.get('tokens', 0):,} tokens are targets."]
    if not train.get("tokens"):
        return []

    seen = facts.tokens / train["tokens"]
    passes = f"{percent(seen)} of them" if seen < 1 else f"{seen:.1f} passes over them"
    held_out = val.get("tokens", 0)
    return [
        f"The prepared sources hold {train['tokens']:,} tokens to train on; training took {facts.tokens:,}, {passes}. "
        f"{held_out:,} tokens were held out: {percent(held_out / (held_out + train['tokens']))} of "
        "all tokens."
    ]


def _tokenizer(facts: RunFacts) -> str:
    tokenizer = facts.recipe.tokenizer
    if facts.has_base:
        return f"The tokenizer is the base model's, of {tokenizer.vocab_size:,} ids."
    if tokenizer.kind == "bpe":
        return f"The tokenizer is a byte-level BPE of {tokenizer.vocab_size:,} ids, trained on these sources."
    if tokenizer.kind == "cl100k":
        return f"The tokenizer is tiktoken's cl100k_base, {tokenizer.vocab_size:,} ids."
    return f"The tokenizer is a ready-made one of {tokenizer.vocab_size:,} ids."


def training(facts: RunFacts) -> list[str]:
    """Settings, devices and speed, losses beside the published ones, and incidents."""
    return [table(("", ""), _settings(facts)), *devices.speed(facts), *_losses(facts), *_incidents(facts)]


def _settings(facts: RunFacts) -> list[tuple[str, str]]:
    recipe = facts.recipe
    optimizer, train, sft = recipe.optimizer, recipe.train, recipe.sft
    clip = f", gradients clipped to a norm of {number(optimizer.grad_clip)}" if optimizer.grad_clip else ""
    rows = [
        (
            "Optimiser",
            f"{OPTIMIZERS.get(optimizer.name, optimizer.name)}, β = {', '.join(map(number, optimizer.betas))}, "
            f"ε = {number(optimizer.eps)}, weight decay {number(optimizer.weight_decay)}{clip}",
        ),
        ("Learning rate", schedule_in_words(recipe)),
        (
            "Batch",
            f"{train.global_batch_tokens:,} tokens: {times(recipe.rows_per_step, 'row')} of {recipe.data.seq_len:,}",
        ),
        ("Steps", f"{train.steps:,}" + (f", of which these weights have {facts.step:,}" * (not facts.is_finished))),
        ("Precision", PRECISIONS[train.precision]),
        ("Seed", str(train.seed)),
    ]

    if train.z_loss:
        rows.append(("Z-loss", number(train.z_loss)))
    if sft is not None:
        rows.append(("Loss on", MASKS[sft.mask]))
        rows.append(("Rows", "several conversations, each seeing itself alone" if sft.packing else "one conversation"))
    return rows


def schedule_in_words(recipe: Recipe) -> str:
    """The learning rate over the steps, as ds_slm.recipe.schedule computes it."""
    schedule, low, peak = recipe.schedule, number(recipe.optimizer.min_lr), number(recipe.optimizer.lr)
    warmup = f"from {number(schedule.warmup_start_lr)} up to {peak} in {times(schedule.warmup_steps, 'step')}, then "
    begin = warmup if schedule.warmup_steps else f"{peak}, "
    if schedule.kind == "cosine":
        return f"{begin}down to {low} at step {recipe.train.steps:,} along a cosine"
    if schedule.kind == "wsd":
        assert schedule.decay_start_step is not None and schedule.decay_steps is not None
        end = schedule.decay_start_step + schedule.decay_steps
        along = "along a cosine" if schedule.decay_shape == "cosine" else "in a line"
        return f"{begin}constant until step {schedule.decay_start_step:,}, then down to {low} at step {end:,} {along}"
    assert_never(schedule.kind)


def _losses(facts: RunFacts) -> list[str]:
    """The published losses beside the run's at the same step; without any, the run's own."""
    rows = []
    for target in facts.recipe.targets:
        if target.metric.partition("/")[0] in OF_TRAINING:
            step = target.step or facts.recipe.train.steps
            ours = facts.figure(target.metric, step)
            mark = (
                "" if ours is None or target.tolerance is None else _verdict(ours - target.published, target.tolerance)
            )
            told = "not measured" if ours is None else f"{ours:.4f}"
            rows.append([target.metric, f"{step:,}", f"{target.published:g}", told, mark])
    found = [table(("figure", "after step", "published", "this run", ""), rows, right=(1, 2, 3))] if rows else []

    losses = [one["loss"] for one in facts.records.get("train", ()) if is_number(one.get("loss"))]
    if losses:
        held_out = facts.held_out.get("loss")
        rows_told = facts.of_held_out or "on held-out rows"
        end = f", {rows_told} {held_out:.4f}" if is_number(held_out) else ""
        found.append(f"The training loss went from {losses[0]:.4f} to {losses[-1]:.4f} nats a token{end}.")
    return found


def _verdict(difference: float, tolerance: float) -> str:
    within = abs(difference) <= tolerance
    return f"within the tolerance of {tolerance:g}" if within else f"differs by {difference:+.4g}"


def _incidents(facts: RunFacts) -> list[str]:
    """What a reader of the curves should know: changes between launches, rows left out, loss spikes."""
    lines = []
    for change in facts.changes:
        places = change.get("changes")
        for place, pair in places.items() if isinstance(places, dict) else ():
            if changes_result(place):
                lines.append(f"- Launch {change.get('generation')} changed {place} from {pair[0]} to {pair[1]}.")
    skipped = sum(end - first for first, end in facts.state.get("skipped_rows") or ())
    if skipped:
        lines.append(f"- {times(skipped, 'row')} were left out by hand (--skip-rows).")
    spikes = [one for one in facts.records.get("train", ()) if one.get("loss_spike")]
    if spikes:
        steps = ", ".join(f"{one['step']:,}" for one in spikes[:5]) + (" and later" if len(spikes) > 5 else "")
        lines.append(f"- The loss was far above its median in {times(len(spikes), 'step')}: {steps}.")
    return ["\n".join(lines)] if lines else []
