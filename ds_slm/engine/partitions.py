"""Between DeepSpeed's flat partitions and tensors with names.

    saving    partition -> copy -> fragments, gathered on the writing ranks by gathering.py
    loading   name: whole fp32 tensor -> broadcast -> each rank's fragments -> partition -> half-precision weights

At every ZeRO stage the inner optimiser holds fp32 partitions: slices of the concatenation of a group's parameters. A
`Fragment` says which elements of which parameter lie where in a partition. Everything else here is independent of the
stage, the world size and the optimiser's precision.

8-bit states (bitsandbytes): uint8 codes of the flat partition in blocks of 256, value = map[code] * absmax[block]. They
are stored as fp32 values, like any moments. Each partition's absmax is stored as a note: on the same topology the same
absmax gives back the same codes, bit for bit. On another topology absmax is computed again.

DeepSpeed's own accessors are not used: they support neither bitsandbytes' states nor more than one group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_slm.distributed.ranks import Control
from ds_slm.recipe.sizes import BLOCK_VALUES

KINDS = ("model", "exp_avg", "exp_avg_sq")
"""The tensors that make up the optimiser's view of a parameter: fp32 weight, first and second moment."""

MOMENTS = {
    "exp_avg": ("exp_avg", "state1", "qmap1", "absmax1"),
    "exp_avg_sq": ("exp_avg_sq", "state2", "qmap2", "absmax2"),
}
"""Kind -> name in torch's state; names in bitsandbytes' state: values or codes, map, block scales."""


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter from `param_start`, at `flat_start` of this rank's partition."""

    name: str
    param_start: int
    numel: int
    flat_start: int


@dataclass
class Partition:
    """One flat fp32 tensor of the inner optimiser, and the fragments in it."""

    flat: Tensor
    group_index: int
    fragments: list[Fragment] = field(default_factory=list)


def partitions(engine: Any) -> list[Partition]:
    """This rank's partitions, in the optimiser's order."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _partitions_of_stage_3(optimizer, names)

    # DeepSpeed's bf16 wrapper has the same lists under other names.
    if hasattr(optimizer, "bf16_groups"):
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups

    # A parameter without elements on this rank has no mapping.
    found = []
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        partition = Partition(flat, index)
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                partition.fragments.append(Fragment(names[parameter], here.start, here.numel, there.start))
        found.append(partition)
    return found


def _partitions_of_stage_3(optimizer: Any, names: Mapping[Any, str]) -> list[Partition]:
    """Stage 3 splits every parameter evenly; the last ranks' shares end in padding."""
    rank = dist.get_rank(group=optimizer.dp_process_group)
    found = []
    for index, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        partition = Partition(flat, optimizer.sub_group_to_group_id[index])
        for parameter in group:
            _, flat_start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            numel = min(share, parameter.ds_numel - rank * share)
            if numel > 0:
                partition.fragments.append(Fragment(names[parameter], rank * share, numel, flat_start))
        found.append(partition)
    return found


def places(engine: Any) -> dict[str, list[tuple[Tensor, Fragment]]]:
    """Where this rank holds elements of each parameter: name -> flat partitions and the fragments in them."""
    found: dict[str, list[tuple[Tensor, Fragment]]] = {}
    for partition in partitions(engine):
        for part in partition.fragments:
            found.setdefault(part.name, []).append((partition.flat, part))
    return found


def shapes(engine: Any) -> dict[str, torch.Size]:
    """Whole shape of every parameter; stage 3 hides it behind an empty tensor."""
    return {
        name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in engine.module.named_parameters()
    }


# --- saving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartitionValues:
    """Values of one kind of one partition as the optimiser holds them, in host memory."""

    values: Tensor
    """fp32 values, or uint8 codes."""
    code_map: Tensor | None = None
    absmax: Tensor | None = None

    def decoded(self, begin: int, end: int) -> Tensor:
        """fp32 values from `begin` to before `end`."""
        if self.code_map is None or self.absmax is None:
            return self.values[begin:end]

        # The scales of whole blocks, from the block that holds `begin`.
        first_block = begin // BLOCK_VALUES
        scales = self.absmax[first_block : -(-end // BLOCK_VALUES)].repeat_interleave(BLOCK_VALUES)
        skipped = begin - first_block * BLOCK_VALUES
        return self.code_map[self.values[begin:end].long()] * scales[skipped : skipped + end - begin]


@dataclass(frozen=True)
class Snapshot:
    """A copy of this rank's part of a checkpoint: training may go on and change the originals."""

    fragments: list[list[Fragment]]
    """The fragments of each partition."""
    stored: dict[str, list[PartitionValues]]
    """Kind -> each partition's values."""
    shapes: dict[str, torch.Size]
    optimizer_steps: dict[str, int]


def snapshot(engine: Any) -> Snapshot:
    """Copy what this rank holds. 8-bit states are copied as they are and decoded when they are written."""
    own = partitions(engine)
    return Snapshot(
        [list(partition.fragments) for partition in own],
        {kind: [_stored(engine, partition, kind) for partition in own] for kind in KINDS},
        shapes(engine),
        optimizer_steps(engine),
    )


def _stored(engine: Any, partition: Partition, kind: str) -> PartitionValues:
    """A copy of a partition's values of one kind; zeros if the optimiser has not stepped yet."""
    if kind == "model":
        return PartitionValues(_copy(partition.flat.float()))
    state = _inner(engine).state.get(partition.flat, {})
    plain, codes, code_map, absmax = MOMENTS[kind]
    if plain in state:
        return PartitionValues(_copy(state[plain].float()))
    if codes not in state:
        return PartitionValues(torch.zeros(partition.flat.numel()))
    if state[codes].dtype != torch.uint8:
        return PartitionValues(_copy(state[codes].float()))
    return PartitionValues(_copy(state[codes]), _copy(state[code_map]), _copy(state[absmax]))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def absmax_notes(own: Snapshot, rank: int) -> dict[str, Tensor]:
    """Block scales of this rank's 8-bit states, by rank, partition and moment; empty if there are none."""
    return {
        _note_name(rank, index, kind): one.absmax
        for kind in MOMENTS
        for index, one in enumerate(own.stored[kind])
        if one.absmax is not None
    }


def _note_name(rank: int, partition: int, kind: str) -> str:
    return f"rank{rank}.partition{partition}.{kind}"


def optimizer_steps(engine: Any) -> dict[str, int]:
    """Steps each parameter group has taken."""
    inner, taken = _inner(engine), {}
    for partition in partitions(engine):
        state = inner.state.get(partition.flat, {})
        taken[inner.param_groups[partition.group_index]["name"]] = int(state.get("step", 0))
    return taken


def topology(engine: Any) -> dict[str, Any]:
    """What must be equal for a bit-exact resume, except the partitions themselves (`masters.layout`)."""
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer_wrapper": type(engine.optimizer).__name__,
        "optimizer": type(_inner(engine)).__name__,
    }


# --- loading --------------------------------------------------------------------------------------------------------


def scatter(
    engine: Any,
    tensors: Callable[[str], Iterator[tuple[str, Tensor]]] | None,
    source: int,
    steps_taken: Mapping[str, int],
    notes: Mapping[str, Tensor],
    control: Control,
) -> None:
    """Give every rank its fragments of weights and moments, then refresh the half-precision weights. Collective.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        tensors: on the source rank, kind -> (name, whole fp32 tensor) in the model's order; None elsewhere.
        source: the rank that has the tensors.
        steps_taken: optimiser steps by group name.
        notes: `absmax_notes` of all ranks if the topology is the same, else empty.
        control: the ranks' connection.
    """
    own = partitions(engine)
    for kind in KINDS:
        local = [torch.zeros(partition.flat.numel()) for partition in own]
        incoming = tensors(kind) if tensors else None

        # All ranks receive one whole parameter at a time, so that memory never holds more.
        for name, shape in shapes(engine).items():
            if incoming is not None:
                sent_name, whole = next(incoming)
                assert sent_name == name and whole.shape == shape, (
                    f"{sent_name} {whole.shape} in place of {name} {shape}"
                )
                whole = whole.contiguous().view(-1)
            else:
                whole = torch.empty(shape.numel())
            control.broadcast_tensor(whole, source)

            for partition, flat in zip(own, local, strict=True):
                for part in partition.fragments:
                    if part.name == name:
                        taken = whole[part.param_start : part.param_start + part.numel]
                        flat[part.flat_start : part.flat_start + part.numel] = taken

        for index, (partition, flat) in enumerate(zip(own, local, strict=True)):
            if kind == "model":
                partition.flat.data.copy_(flat)
            else:
                note = notes.get(_note_name(control.rank, index, kind))
                _set_moment(engine, partition, kind, flat, steps_taken, note)

    refresh_half_precision(engine)


def _set_moment(
    engine: Any, partition: Partition, kind: str, values: Tensor, steps_taken: Mapping[str, int], note: Tensor | None
) -> None:
    inner = _inner(engine)
    settings = inner.param_groups[partition.group_index]
    step = steps_taken[settings["name"]]
    if not step:
        return

    plain, codes, code_map, absmax = MOMENTS[kind]
    state, device = inner.state[partition.flat], partition.flat.device

    # All optimisers but bitsandbytes' hold their moments as plain tensors.
    if not hasattr(inner, "init_state"):
        state.setdefault("step", torch.tensor(float(step), device=device))
        state[plain] = values.to(device)
        return

    # bitsandbytes makes its state in the first step, which is still to come.
    if not state:
        listed, settings["params"] = settings["params"], [partition.flat]  # stage 3 keeps the list empty
        inner.init_state(settings, partition.flat, partition.group_index, 0)
        settings["params"] = listed
        state["step"] = step

    # Groups with 32 bits hold fp32 moments under the names of the codes.
    if state[codes].dtype != torch.uint8:
        state[codes].copy_(values)
        return

    scale = note if note is not None and _fits(note, values) else block_absmax(values)
    state[absmax].copy_(scale)
    state[codes].copy_(quantise(values, scale, state[code_map].cpu()))


SMALLEST_LARGEST = 0.98
"""A block's largest value is at least this share of its scale: bitsandbytes' signed map ends at -0.993 and at 1."""


def _fits(note: Tensor, values: Tensor) -> bool:
    """Whether block scales belong to these values: scales of other partitions would round them again, or wrongly."""
    largest = block_absmax(values)
    return note.shape == largest.shape and bool(((largest <= note) & (largest >= SMALLEST_LARGEST * note)).all())


def block_absmax(values: Tensor) -> Tensor:
    """Largest magnitude of each block of a flat fp32 tensor."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK_VALUES))
    return padded.view(-1, BLOCK_VALUES).abs().amax(dim=1)


def quantise(values: Tensor, absmax: Tensor, code_map: Tensor) -> Tensor:
    """The nearest code of each value; values of blocks whose absmax is 0 get the code of 0."""
    scale = absmax.repeat_interleave(BLOCK_VALUES)[: values.numel()]
    relative = torch.where(scale > 0, values / scale, torch.zeros(()))
    levels, order = torch.sort(code_map)
    borders = (levels[1:] + levels[:-1]) / 2
    return order[torch.bucketize(relative, borders)].to(torch.uint8)


def refresh_half_precision(engine: Any) -> None:
    """Copy the fp32 weights into the weights that the model computes with, on all ranks. Collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _inner(engine: Any) -> Any:
    return engine.optimizer.optimizer
