"""Settings that have no effect: refused if they can only be a mistake, warned of if they may be meant.

    sections --mistakes--> refused when a recipe is read
    recipe   --warnings--> printed by `ds-slm plan`, and once at the start of every launch

Only keys that were set count, never defaults. A recipe that a run has recorded holds every key: there a key counts if
its value is not the default. Such a recipe is never refused, so that older runs go on; its mistakes are printed.

A mistake is a place that is never read (a hub's id for local files), a rate that teaches nothing, or a shape whose
export no program loads. Everything else may be a remnant of another kind after `--set schedule.kind=cosine`, or a short
trial of a long recipe.
"""

import math
from collections.abc import Iterator, Mapping
from typing import assert_never

from ds_slm.recipe.data_sections import Data, Source, Tokenizer
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.section import Section, newer_fields
from ds_slm.recipe.sections import Model, Optimizer, Schedule, Train

READ_FROM = {
    "builtin": (),
    "files": ("path",),
    "hub": ("id", "config", "revision"),
    "tokens": ("path", "id", "revision", "dtype"),
}
"""Kind of source -> the fields that say where and how it is read."""

ROUNDED_AWAY = 0.02
"""Share of a decay that may lie beyond the last step without a warning: published shares of a run are rounded."""


def mistakes(sections: Mapping[str, Section]) -> list[str]:
    """A line for each thing that can only be a mistake. Absent sections are skipped."""
    data, tokenizer = sections.get("data"), sections.get("tokenizer")
    optimizer, schedule, train = (sections.get(name) for name in ("optimizer", "schedule", "train"))
    problems = []

    if isinstance(data, Data):
        problems += [problem for source in data.source for problem in _unread_places(source)]
    if isinstance(tokenizer, Tokenizer) and tokenizer.kind == "bpe" and tokenizer.path is not None:
        problems.append(
            f"tokenizer.path = {tokenizer.path!r} is not read: kind = 'bpe' trains a tokenizer; take path out, or use "
            "kind = 'hf'"
        )

    model = sections.get("model")
    if isinstance(model, Model) and not (model.qk_norm or model.exclusive_attention):
        problems += _refused_as_llama(model)

    # The other mistakes are learning rates of a warm-up.
    if not isinstance(schedule, Schedule) or not schedule.warmup_steps:
        return problems
    if isinstance(optimizer, Optimizer) and schedule.warmup_start_lr > optimizer.lr:
        problems.append(
            f"schedule.warmup_start_lr = {schedule.warmup_start_lr} exceeds optimizer.lr = {optimizer.lr}: a warm-up "
            "begins below the peak"
        )
    if isinstance(train, Train) and train.steps == 1 and not schedule.warmup_start_lr:
        problems.append(
            f"train.steps = 1 with schedule.warmup_steps = {schedule.warmup_steps}: the only step runs at a learning "
            "rate of 0 and changes nothing; set schedule.warmup_steps = 0, or take more steps"
        )

    return problems


def _refused_as_llama(model: Model) -> Iterator[str]:
    """What transformers refuses in a Llama."""
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size = {model.hidden_size} is not a multiple of num_attention_heads = "
            f"{model.num_attention_heads}: transformers loads no such Llama; make it one, or set qk_norm = true"
        )


def _unread_places(source: Source) -> Iterator[str]:
    """The fields of a source that its kind never reads."""
    read = READ_FROM[source.kind]
    beside = ""
    if source.kind == "tokens" and source.path is not None:
        read, beside = ("path", "dtype"), " beside path"
    for field in ("path", "id", "config", "revision", "dtype"):
        value = getattr(source, field)
        if value is not None and field not in read:
            yield (
                f"data.source: {field} = {value!r} of source {source.name!r} is not read under kind = "
                f"{source.kind!r}{beside}: take it out, or change the kind (--source {source.name}=PATH reads local "
                "files in a source's place)"
            )


def warnings(recipe: Recipe) -> list[str]:
    """A line for each setting that has no effect in this recipe, or not the effect that it names."""
    sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    resolved = _is_resolved(recipe)
    return [
        *mistakes(sections),
        *_of_schedule(recipe, resolved),
        *_of_run(recipe, resolved),
        *_of_data(recipe, resolved),
        *_of_other_kinds(recipe, resolved),
    ]


def set_keys(section: Section, resolved: bool) -> set[str]:
    """The keys of a section that were set. Of one that holds every key, nobody knows: those that are not the default.

    Args:
        section: a table of a recipe.
        resolved: whether the whole recipe holds every key, as in one that a run has recorded.
    """
    whole = resolved or _holds_every_key(section)  # also where a recipe takes [run] from a run's
    return {
        key
        for key in section.model_fields_set
        if not whole or getattr(section, key) != type(section).model_fields[key].get_default()
    }


def _is_resolved(recipe: Recipe) -> bool:
    """Whether every key is there, as in a recipe that a run has recorded.

    A recipe recorded by an earlier version may lack keys that this version did not know.
    """
    tables = (recipe.model, recipe.tokenizer, recipe.data, recipe.optimizer, recipe.schedule, recipe.train, recipe.run)
    return all(map(_holds_every_key, tables))


def _holds_every_key(section: Section) -> bool:
    return all(
        key in section.model_fields_set
        for key, field in type(section).model_fields.items()
        if field.get_default() is not None and key not in newer_fields(type(section))
    )


def is_set(recipe: Recipe, section: str, key: str) -> bool:
    """Whether a key was set, rather than left at its default."""
    return key in set_keys(getattr(recipe, section), _is_resolved(recipe))


def _of_schedule(recipe: Recipe, resolved: bool) -> Iterator[str]:
    schedule, steps = recipe.schedule, recipe.train.steps
    if schedule.warmup_steps >= steps > 0 and schedule.warmup_steps:
        highest = max(learning_rate(recipe, step) for step in (0, steps - 1))
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps:,} does not end before train.steps = {steps:,}: the "
            f"learning rate reaches {highest:g}, never its peak of {recipe.optimizer.lr:g}"
        )
    if not schedule.warmup_steps and "warmup_start_lr" in set_keys(schedule, resolved):
        yield "schedule.warmup_start_lr has no effect: schedule.warmup_steps is 0"

    lr, min_lr, last = recipe.optimizer.lr, recipe.optimizer.min_lr, learning_rate(recipe, steps - 1)
    if min_lr == lr:
        yield f"optimizer.min_lr = {min_lr:g} is optimizer.lr: the learning rate never decays"

    if schedule.kind == "cosine":
        yield from _of_cosine(recipe, last, resolved)
    elif schedule.kind == "wsd":
        yield from _of_wsd(recipe, last)
    else:
        assert_never(schedule.kind)


def _of_cosine(recipe: Recipe, last: float, resolved: bool) -> Iterator[str]:
    """`last` is the learning rate of the last step."""
    schedule, steps, lr = recipe.schedule, recipe.train.steps, recipe.optimizer.lr
    if schedule.warmup_steps < steps and last == lr > recipe.optimizer.min_lr:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps:,} of train.steps = {steps:,}: the last step runs at "
            f"the peak of {lr:g}, so the learning rate never decays"
        )
    for key in sorted(set_keys(schedule, resolved) & {"decay_start_step", "decay_steps", "decay_shape"}):
        yield (
            f"schedule.{key} = {getattr(schedule, key)!r} has no effect: kind = 'cosine' decays from the end of "
            "the warm-up to the last step"
        )


def _of_wsd(recipe: Recipe, last: float) -> Iterator[str]:
    """The recipe says where the decay begins and ends; `last` is the learning rate of the last step."""
    schedule, steps, lr, min_lr = recipe.schedule, recipe.train.steps, recipe.optimizer.lr, recipe.optimizer.min_lr
    start, length = schedule.decay_start_step or 0, schedule.decay_steps or 0

    if start >= steps:
        yield (
            f"schedule.decay_start_step = {start:,} is not before train.steps = {steps:,}: the learning rate never "
            "decays"
        )
    elif start + length - steps > length * ROUNDED_AWAY:
        yield (
            f"schedule: the decay ends at step {start + length:,}, beyond train.steps = {steps:,}: the last step runs "
            f"at a learning rate of {last:g}, min_lr is {min_lr:g}"
        )
    elif last == lr > min_lr:
        yield (
            f"schedule.decay_steps = {length:,} from step {start:,} on: the last of train.steps = {steps:,} runs at "
            f"the peak of {lr:g}, so the learning rate never decays"
        )


def _of_run(recipe: Recipe, resolved: bool) -> Iterator[str]:
    run, steps = recipe.run, recipe.train.steps
    given = set_keys(run, resolved)

    ends = {
        "eval_every_steps": "held-out rows are evaluated at the end alone",
        "save_every_steps": "the only checkpoint is the last",
        "log_every_steps": "no training step is logged",
    }
    for key, consequence in ends.items():
        if key in given and getattr(run, key) > steps:
            yield f"run.{key} = {getattr(run, key):,} is more than train.steps = {steps:,}: {consequence}"

    # A checkpoint can be the best only if its step was evaluated as well.
    both = math.lcm(run.eval_every_steps, run.save_every_steps)
    if (
        run.keep_best
        and given & {"keep_best", "eval_every_steps", "save_every_steps"}
        and max(run.eval_every_steps, run.save_every_steps) < steps <= both
    ):
        yield (
            f"run.keep_best has no effect: no step before the last is both evaluated (every {run.eval_every_steps:,}) "
            f"and saved (every {run.save_every_steps:,}); make one a multiple of the other"
        )

    if not recipe.eval.tasks:
        for key in sorted(set_keys(recipe.eval, resolved) & {"every_steps", "limit", "bench_dir"}):
            if getattr(recipe.eval, key):
                yield f"eval.{key} has no effect: eval.tasks names no task"

    for target in recipe.targets:
        if target.step and target.step > steps:
            yield (
                f"targets: {target.metric!r} was measured at step {target.step:,}, beyond train.steps = {steps:,}: "
                "nothing of this run compares with it"
            )


def _of_data(recipe: Recipe, resolved: bool) -> Iterator[str]:
    sources = recipe.data.source
    if all(source.kind == "tokens" for source in sources):
        for key in sorted(set_keys(recipe.data, resolved) & {"held_out", "split_seed"}):
            yield f"data.{key} has no effect: of ready-made token files the end is held out"
    for source in sources:
        given = set_keys(source, resolved)
        # Conversations name their column for the files that may replace them through `--source`.
        builtin = {"split"} if recipe.sft else {"split", "column"}
        unread = {"builtin": builtin, "tokens": {"column", *({"split"} if source.path else ())}}
        for key in sorted(given & unread.get(source.kind, set())):
            yield f"data.source: {key} of source {source.name!r} has no effect under kind = {source.kind!r}"
        if len(sources) == 1 and source.weight != 1 and recipe.tokenizer.kind != "bpe":
            yield f"data.source: weight = {source.weight} of source {source.name!r} has no effect: it is the only one"


def _of_other_kinds(recipe: Recipe, resolved: bool) -> Iterator[str]:
    """Keys that belong to another kind of tokenizer or optimiser."""
    kind, optimizer = recipe.tokenizer.kind, recipe.optimizer
    if kind != "bpe":
        for key in sorted(set_keys(recipe.tokenizer, resolved) & {"min_frequency", "documents_per_weight"}):
            yield f"tokenizer.{key} has no effect: kind = {kind!r} trains no tokenizer"
    if optimizer.name == "adamw" and optimizer.embedding_bits != 32:
        yield (
            f"optimizer.embedding_bits = {optimizer.embedding_bits} has no effect: name = 'adamw' keeps all states in "
            "32 bits; 'adamw8bit' has others"
        )
