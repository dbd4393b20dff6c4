"""The part of a model card that says where the model was trained, how fast and how long.

RunFacts --setups--> the steps of each kind of launch --hardware, speed--> sentences
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_slm.publish.card.facts import Record, RunFacts
from ds_slm.publish.card.markdown import times
from ds_slm.publish.curves import series
from ds_slm.recipe.plan import flops_per_token


@dataclass(frozen=True)
class Setup:
    """Devices that took some of the steps, all in the same way."""

    devices: str
    """Number and kind of devices, and the number of hosts; empty if the run did not record them."""
    details: str
    """ZeRO stage and micro-batch."""
    steps: int
    records: Sequence[Record]
    """The records of those steps."""

    def median(self, field: str) -> float | None:
        """The median of a field over the steps; None if none holds it."""
        values = self._values(field)
        return statistics.median(values) if values else None

    def largest(self, field: str) -> float | None:
        """The largest value of a field over the steps; None if none holds it."""
        return max(self._values(field), default=None)

    def _values(self, field: str) -> list[float]:
        return [value for _, value in series(self.records, field)]

    def measured(self) -> list[str]:
        """Speed and memory. A CPU's peak is not its datasheet's: the run measures a product when it starts."""
        speed, use, memory_gb = self.median("tokens_per_s"), self.median("mfu"), self.largest("peak_memory_gb")
        peak = "the FLOP/s of one matrix product" if "(cpu)" in self.devices else "the peak FLOP/s"
        return [
            *([f"{speed:,.0f} tokens a second (median)"] if speed is not None else []),
            *([f"{use:.0%} of {peak}"] if use is not None else []),
            *([f"{memory_gb:.2f} GB of memory a device"] if memory_gb is not None else []),
        ]


def setups(facts: RunFacts) -> list[Setup]:
    """The setups that took the steps up to the checkpoint, each kind of launch once, in the order they began."""
    found: dict[tuple[str, str], Setup] = {}
    launches = facts.launches()
    train = facts.records.get("train", ())
    for (before, environment), (end, _) in zip(launches, [*launches[1:], (facts.step, {})], strict=True):
        kind = _devices(environment), _details(environment)
        records = [record for record in train if before < record["step"] <= end]
        known = found.get(kind, Setup(*kind, 0, ()))
        found[kind] = Setup(*kind, known.steps + end - before, [*known.records, *records])
    return [one for one in found.values() if one.steps]


def _devices(environment: Record) -> str:
    device, devices = environment.get("device"), environment.get("world_size")
    if not isinstance(device, str) or not isinstance(devices, int):
        return ""
    hosts: Any = environment.get("hosts") or ["one"]
    return f"{devices:,} × {device} on {times(len(set(hosts)), 'host')}"


def _details(environment: Record) -> str:
    stage, rows = environment.get("zero_stage"), environment.get("micro_batch_rows")
    told = [f"DeepSpeed ZeRO-{stage}"] if stage is not None else []
    told += [f"{times(rows, 'row')} in a forward of a device"] if isinstance(rows, int) else []
    return ", ".join(told)


def hardware(facts: RunFacts) -> str:
    """Devices and hosts, and how long they took; empty if the run did not record them."""
    devices = dict.fromkeys(one.devices for one in setups(facts) if one.devices)
    if not devices:
        return ""
    hours = facts.device_hours
    return ", then ".join(devices) + (f", {duration(hours)}" if hours is not None else "")


def duration(hours: float) -> str:
    """Device hours, as minutes or seconds if there are few."""
    for size, unit in ((1.0, "device hours"), (1 / 60, "device minutes")):
        if hours >= size:
            return f"{hours / size:.3g} {unit}"
    return f"{hours * 3600:.3g} device seconds"


def speed(facts: RunFacts) -> list[str]:
    """Where it ran, how fast and how long."""
    found = setups(facts)
    if not any(one.devices for one in found):
        return []

    whole = []
    if facts.device_hours is not None:
        whole.append(f"{duration(facts.device_hours)} of training steps")
    if facts.recipe.sft is None:  # a fine-tuning counts only targets, not the tokens that are computed
        flops = flops_per_token(facts.recipe.model, facts.recipe.data.seq_len) * facts.tokens
        whole.append(f"{flops:.2g} floating-point operations in all")

    if len(found) == 1:
        (one,) = found
        told = ", ".join(filter(None, [one.devices, one.details]))
        return [f"Hardware: {told}. {', '.join([*one.measured(), *whole])}.{_unrecorded_launches(facts)}"]

    lines = [
        f"- {times(one.steps, 'step')} on "
        + ", ".join(filter(None, [one.devices or "devices that were not recorded", one.details, *one.measured()]))
        for one in found
    ]
    return ["Hardware:", "\n".join(lines), *([f"Together {', '.join(whole)}."] if whole else [])]


def _unrecorded_launches(facts: RunFacts) -> str:
    """A sentence if an older version recorded only the last one of several launches."""
    launches = facts.environment.get("generation")
    if not isinstance(launches, int) or launches <= 1 or facts.records.get("launch"):
        return ""
    return f" The run was launched {launches} times; devices and hours are counted as those of the last launch."
