"""What a recipe costs, by arithmetic alone: parameters, FLOPs, batch; with memory (budget.py) and time (times.py).

    Model --> flops_per_token, first_loss; counts.py --> ParameterCounts, Batch
    all of it, a ds_config and a Topology --> plan --> Plan, for people and for --json

Sources: parameters are counted from the shapes of ds_slm.model.decoder. FLOPs per token are 6 per parameter that is
multiplied (forward 2, backward 4) and 12 per layer, head, component and token of context for attention (arXiv
2204.02311, appendix B, which counts the whole context, not the causal half). Imports neither torch nor deepspeed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_slm.errors import ConfigError
from ds_slm.recipe import zero_keys
from ds_slm.recipe.alternatives import Alternative, Scaling, alternatives, scaling
from ds_slm.recipe.budget import Memory, save_bytes
from ds_slm.recipe.counts import Batch, ParameterCounts, batch, parameter_counts
from ds_slm.recipe.effects import warnings
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model
from ds_slm.recipe.times import Load, Time, Topology, assumptions, load, times

DEFAULT_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward on one device if neither the command nor the ds_config gives the rows."""

ONE_DEVICE = Topology()


@dataclass(frozen=True)
class Plan:
    """Everything that can be known before training."""

    recipe: str
    reproduces: str
    params: int
    """Parameters by the formula."""
    published_params: int | None
    parameters: ParameterCounts
    flops_per_token: int
    steps: int
    tokens: int
    """Tokens of the whole run."""
    flops: float
    """FLOPs of the whole run, without recomputation."""
    first_loss: float
    """Loss of the freshly initialised model, in nats per token."""
    world_size: int
    nodes: int
    zero_stage: int
    batch: Batch
    memory: Memory
    """Memory of one rank on a GPU."""
    cpu_batch: Batch
    """The same step if each rank is a process on a CPU."""
    cpu_memory: Memory
    """Memory of one rank on a CPU."""
    save_bytes: int
    """Additional host memory of a rank that writes checkpoints, while a save is in flight."""
    alternatives: list[Alternative]
    """Memory and time with one setting turned over, on a GPU."""
    cpu_alternatives: list[Alternative]
    """The same on a CPU, which is its own host, so nothing is offloaded."""
    scaling: Scaling
    times: list[Time]
    """The time for each kind of device, if all ranks are of that kind."""
    assumptions: list[str]
    warnings: list[str]
    """Settings that have no effect."""


def flops_per_token(shape: Model, seq_len: int) -> int:
    """FLOPs of a forward and backward for one token in rows of `seq_len`, without recomputation.

    An untied input embedding is looked up, not multiplied, and does not count.
    """
    counts = parameter_counts(shape)
    looked_up = 0 if shape.tie_word_embeddings else counts.embedding
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * seq_len
    return 6 * (counts.total - looked_up) + attention


def training_flops(recipe: Recipe) -> float:
    """FLOPs of a whole run, without recomputation."""
    tokens = recipe.train.steps * recipe.train.global_batch_tokens
    return float(flops_per_token(recipe.model, recipe.data.seq_len)) * tokens


def first_loss(shape: Model) -> float:
    """Loss of a freshly initialised model, in nats per token.

    After the last norm the hidden state has hidden_size components of mean square 1, so logits are normal with variance
    hidden_size * std^2, std being the head's, and the mean of exp(logit) is exp(variance / 2). Known gap: a tied head
    favours the current token, which shows at very small vocabularies (0.07 more at 65 ids).
    """
    std = (shape.embedding_init_std if shape.tie_word_embeddings else None) or shape.init_std
    return math.log(shape.vocab_size) + shape.hidden_size * std**2 / 2


def plan(recipe: Recipe, name: str, ds_config: Mapping[str, Any], topology: Topology = ONE_DEVICE) -> Plan:
    """Everything that can be known before training `recipe`.

    Args:
        recipe: what is trained.
        name: the user's name for it.
        ds_config: content of a ds_configs file.
        topology: the devices, and what is known of their hosts.

    Raises:
        ConfigError: the ds_config does not name a usable ZeRO stage or micro-batch.
    """
    refuse_unusable(ds_config)
    zero, world_size = ds_config["zero_optimization"], topology.world_size
    counts, per_token = parameter_counts(recipe.model), flops_per_token(recipe.model, recipe.data.seq_len)

    # Each type of device divides a step in its own way: what it computes, holds and sends follows from that.
    def loads_on(where: Topology) -> dict[str, Load]:
        cuts = {kind: cut(recipe, ds_config, where.world_size, kind) for kind in DEFAULT_MICRO_BATCH_TOKENS}
        return {kind: load(recipe, per_token, zero, where, one, kind) for kind, one in cuts.items()}

    def times_on(where: Topology) -> list[Time]:
        return times(recipe, loads_on(where), where)

    loads = loads_on(topology)
    gpu, cpu = loads["cuda"], loads["cpu"]

    return Plan(
        recipe=name,
        reproduces=recipe.card.reproduces,
        params=counts.total,
        published_params=recipe.card.params,
        parameters=counts,
        flops_per_token=per_token,
        steps=recipe.train.steps,
        tokens=recipe.train.steps * recipe.train.global_batch_tokens,
        flops=training_flops(recipe),
        first_loss=first_loss(recipe.model),
        world_size=world_size,
        nodes=topology.nodes,
        zero_stage=zero["stage"],
        batch=gpu.cut,
        memory=gpu.memory,
        cpu_batch=cpu.cut,
        cpu_memory=cpu.memory,
        save_bytes=save_bytes(recipe, counts, world_size),
        alternatives=alternatives(recipe, zero, world_size, gpu.cut.micro_batch, "cuda"),
        cpu_alternatives=alternatives(
            recipe, zero, world_size, cpu.cut.micro_batch, "cpu", topology.multiplies(recipe.train.precision)
        ),
        scaling=scaling(gpu.cut, topology, times_on),
        times=times_on(topology),
        assumptions=assumptions(recipe, loads, topology),
        warnings=warnings(recipe),
    )


def default_micro_batch(device_type: str, seq_len: int) -> int:
    """Rows of one forward if neither the command nor the ds_config gives them."""
    return max(DEFAULT_MICRO_BATCH_TOKENS[device_type] // seq_len, 1)


def cut(
    recipe: Recipe, ds_config: Mapping[str, Any], world_size: int, device_type: str, micro_batch: int | None = None
) -> Batch:
    """How a launch divides a step on one type of device.

    Args:
        recipe: what is trained.
        ds_config: content of a ds_configs file, which may give the rows of a forward.
        world_size: devices over all hosts.
        device_type: 'cpu' or 'cuda'; decides the rows if nothing gives them.
        micro_batch: the rows of `--micro-batch`, which take precedence over the file; None if it was left out.
    """
    rows = micro_batch or ds_config.get("train_micro_batch_size_per_gpu", "auto")
    if not isinstance(rows, int):
        rows = default_micro_batch(device_type, recipe.data.seq_len)
    return batch(recipe, world_size, rows)


def refuse_unusable(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError if a ds_config does not name usable ZeRO settings and micro-batch."""
    hint = ds_config.get("train_micro_batch_size_per_gpu", "auto")
    problems = zero_keys.problems(ds_config.get("zero_optimization"))
    if not zero_keys.MICRO_BATCH.holds(hint):
        expected = zero_keys.MICRO_BATCH.expected
        problems.append(f"ds_config: train_micro_batch_size_per_gpu = {hint!r}: expected {expected}.")
    if problems:
        raise ConfigError(problems)
