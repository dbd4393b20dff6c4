"""The learning rate at a step: the only place that knows.

Steps count from 0: `learning_rate(recipe, 0)` is the rate of the first optimiser step.

    warmup   start + (lr - start) * step / warmup_steps                        step < warmup_steps
    cosine   min_lr + (lr - min_lr) * (1 + cos(pi * progress)) / 2             progress in [0, 1]
    linear   lr + (min_lr - lr) * progress

`cosine` decays from the end of the warmup to `train.steps` (as transformers' get_cosine_schedule_with_warmup does);
`wsd` stays at the peak until decay_start_step and then decays over decay_steps.
"""

import math
from typing import assert_never

from ds_slm.recipe.schema import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimiser step `step` (0-based); past the end it stays at min_lr."""
    schedule, lr, min_lr = recipe.schedule, recipe.optimizer.lr, recipe.optimizer.min_lr
    if step < schedule.warmup_steps:
        return schedule.warmup_start_lr + (lr - schedule.warmup_start_lr) * step / schedule.warmup_steps
    if schedule.kind == "cosine":
        start, length, shape = schedule.warmup_steps, recipe.train.steps - schedule.warmup_steps, "cosine"
    elif schedule.kind == "wsd":
        assert schedule.decay_start_step is not None and schedule.decay_steps is not None
        start, length, shape = schedule.decay_start_step, schedule.decay_steps, schedule.decay_shape
    else:
        assert_never(schedule.kind)
    progress = min(max((step - start) / max(length, 1), 0.0), 1.0)
    if shape == "linear":
        return lr + (min_lr - lr) * progress
    return min_lr + (lr - min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
