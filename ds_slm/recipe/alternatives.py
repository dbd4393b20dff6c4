"""What three settings that trade memory for time would change, side by side; and when more devices stop helping.

    Recipe, ds_config, world size --> alternatives --> a row each: as asked, and with one setting turned over
    Batch, times, hosts --> scaling --> Scaling: the last device that has a row, the network's share

ds_slm.recipe.budget predicts all of it; nothing is run.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_slm.recipe.budget import Memory, memory
from ds_slm.recipe.counts import Batch
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.times import RECOMPUTED, Time, Topology


@dataclass(frozen=True)
class Alternative:
    """The asked topology with one setting turned over."""

    name: str
    device_bytes: int
    host_bytes: int
    """Bytes of a device's optimiser states in the host's memory."""
    step_ratio: float | None
    """Computing time of a step, as a share of the asked topology's; None if it was not measured."""


@dataclass(frozen=True)
class Scaling:
    """Where more devices stop helping."""

    most_devices: int
    """Rows of a step: with more devices than that, some have no row."""
    busy_share: float
    """Rows of the recipe among all rows that the asked devices compute; the rest is filler."""
    network_shares: dict[str, float]
    """By kind of device: the network's share of a step's time. Empty on one host, or without a network's speed."""
    balanced_hosts: dict[str, int | None]
    """By kind of device: the smallest number of hosts at which the network takes half of a step; None if the batch has
    too few rows for that."""


def alternatives(
    recipe: Recipe,
    zero: Mapping[str, Any],
    world_size: int,
    micro_batch: int,
    device_type: str,
    half_products: bool = False,
) -> list[Alternative]:
    """As asked, then with gradient checkpointing, 8-bit AdamW and offloading turned over, one at a time."""

    def needed(changed: Recipe, changed_zero: Mapping[str, Any]) -> Memory:
        return memory(changed, changed_zero, world_size, micro_batch, device_type, half_products)

    checkpointed, in_8_bits = recipe.train.gradient_checkpointing, recipe.optimizer.name == "adamw8bit"
    asked = needed(recipe, zero)
    found = [Alternative("as asked", asked.device_bytes, asked.host_bytes, 1.0)]

    train = recipe.train.model_copy(update={"gradient_checkpointing": not checkpointed})
    other = needed(recipe.model_copy(update={"train": train}), zero)
    name = f"{'without' if checkpointed else 'with'} gradient checkpointing"
    ratio = 1 / RECOMPUTED if checkpointed else RECOMPUTED
    found.append(Alternative(name, other.device_bytes, other.host_bytes, ratio))

    optimizer = recipe.optimizer.model_copy(update={"name": "adamw" if in_8_bits else "adamw8bit"})
    other = needed(recipe.model_copy(update={"optimizer": optimizer}), zero)
    name = f"AdamW with {32 if in_8_bits else 8}-bit moments"
    found.append(Alternative(name, other.device_bytes, other.host_bytes, None))

    offloaded = asked.host_bytes > 0
    other = needed(recipe, {**zero, "offload_optimizer": {"device": "none" if offloaded else "cpu"}})
    name = "optimiser on the device" if offloaded else "optimiser offloaded to the host"
    if device_type != "cpu":  # a CPU is its own host
        found.append(Alternative(name, other.device_bytes, other.host_bytes, None))
    return found


def scaling(cut: Batch, topology: Topology, times_on: Callable[[Topology], list[Time]]) -> Scaling:
    """Where the asked devices stand.

    Args:
        cut: how a step is divided among the asked devices, as GPUs.
        topology: the asked devices.
        times_on: gives the durations on a topology, one for each kind of device.
    """

    @cache
    def network_shares(nodes: int) -> dict[str, float]:
        return {time.device: time.network_s / time.step_s for time in times_on(topology.on(nodes))}

    # More hosts compute fewer rows each and send about as much: the first host count whose share is a half or more.
    hosts = range(2, max(cut.rows_per_step // topology.ranks_per_host, 2) + 1)
    shares = {time.device: time.network_s / time.step_s for time in times_on(topology) if time.network_s}
    balanced: dict[str, int | None] = {}
    for device in shares:
        index = bisect_left(hosts, 0.5, key=lambda nodes, device=device: network_shares(nodes)[device])
        balanced[device] = hosts[index] if index < len(hosts) else None

    busy_share = cut.rows_per_step / (cut.rows_per_step + cut.filler_rows)
    return Scaling(cut.rows_per_step, busy_share, shares, balanced)
