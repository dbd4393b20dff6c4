"""The fp32 weights that the optimiser updates and checkpoints hold: where they begin, and what always holds of them.

    begin    (name, whole fp32 tensor), one at a time -> this rank's fragments -> the model's own weights
    check    each fragment, rounded to the model's dtype, equals its slice of the parameter the model computes with
    layout   which rank holds which elements of which parameter: once each, and one hash of it all

DeepSpeed rounds the model's weights to half precision and makes its fp32 weights from them. Here every rank afterwards
sets its own fp32 values: nothing is sent, and no second copy of the model is held.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_slm.distributed.ranks import Control
from ds_slm.engine import partitions
from ds_slm.errors import TrainingError

TOLD = 3
"""Parameters that a message names."""


def fill(engine: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Set this rank's fp32 weights; the model's own follow with `partitions.refresh_half_precision`.

    Args:
        engine: DeepSpeed's engine.
        weights: name and whole fp32 tensor of each parameter, in any order. Parameters of which this rank holds no
            element may be left out.

    Raises:
        ValueError: a name is unknown or missing, or a shape differs.
    """
    shapes, places = partitions.shapes(engine), partitions.places(engine)
    missing = set(places)
    for partition in partitions.partitions(engine):
        partition.flat.data.zero_()  # what lies between and after the fragments
    for name, whole in weights:
        if whole.shape != shapes.get(name):
            raise ValueError(f"{name}, {tuple(whole.shape)}, is not a parameter of this model")
        missing.discard(name)
        for flat, part in places.get(name, []):
            flat.data[part.flat_start : part.flat_start + part.numel] = whole.view(-1)[
                part.param_start : part.param_start + part.numel
            ]
    if missing:
        raise ValueError(f"no values for {', '.join(sorted(missing))}")


def check(engine: Any, control: Control) -> None:
    """Compare the fp32 weights with the weights the model computes with. Collective.

    Raises:
        TrainingError: on all ranks, if one of them found a difference.
    """
    parameters, wrong = dict(engine.module.named_parameters()), []
    for name, parts in partitions.places(engine).items():
        if not all(_agrees(parameters[name], flat, part) for flat, part in parts):
            wrong.append(name)

    found = {rank: names for rank, names in enumerate(control.gather(wrong)) if names}
    if found:
        told = "; ".join(
            f"rank {rank}: {', '.join(names[:TOLD])}" + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")
            for rank, names in found.items()
        )
        raise TrainingError(
            f"the fp32 weights that checkpoints hold are not the weights the model computes with ({told}). Nothing was "
            "written; earlier checkpoints are untouched. Another ds_config (ds_configs/zero1.json) may do; if that "
            "fails too, the memory of that host may be damaged."
        )


def _agrees(parameter: Any, flat: Tensor, part: partitions.Fragment) -> bool:
    held = flat.detach()[part.flat_start : part.flat_start + part.numel].to(parameter.dtype)
    here = slice(part.param_start, part.param_start + part.numel)
    if not hasattr(parameter, "ds_tensor"):
        return _same(held, parameter.detach().view(-1)[here])
    # Stage 3: this rank's share, and the whole parameter where it is never released.
    shares = [parameter.ds_tensor.detach().view(-1)[: part.numel]]
    if parameter.ds_status.name == "AVAILABLE":
        shares.append(parameter.detach().view(-1)[here])
    return all(_same(held, share) for share in shares)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the bits are equal; all kinds of not-a-number count as equal."""
    other = other.to(one.device)
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def layout(engine: Any, control: Control) -> str:
    """One hash of all ranks' fragments and partition sizes. Collective.

    Raises:
        TrainingError: on all ranks, if the fragments do not hold every element of every parameter once.
    """
    own = [
        [
            partition.group_index,
            partition.flat.numel(),
            [[part.name, part.param_start, part.numel, part.flat_start] for part in partition.fragments],
        ]
        for partition in partitions.partitions(engine)
    ]
    everyone = control.gather(own)

    held: dict[str, list[tuple[int, int]]] = {name: [] for name in partitions.shapes(engine)}
    for ranks_own in everyone:
        for _, _, parts in ranks_own:
            for name, start, numel, _ in parts:
                held[name].append((start, start + numel))

    wrong = [name for name, shape in partitions.shapes(engine).items() if not _covers(held[name], shape.numel())]
    if wrong:
        raise TrainingError(
            f"DeepSpeed's partitions do not hold each element once ({', '.join(wrong[:TOLD])}): this version of "
            "DeepSpeed, or this ds_config, lays them out in a way that is not known here."
        )
    return hashlib.sha256(json.dumps(everyone).encode()).hexdigest()


def _covers(ranges: list[tuple[int, int]], numel: int) -> bool:
    end = 0
    for begin, next_end in sorted(ranges):
        if begin != end:
            return False
        end = next_end
    return end == numel
