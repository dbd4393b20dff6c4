"""Which keys of a ds_config's zero_optimization are allowed, with which values, and why the rest is refused.

    zero_optimization --problems--> one sentence for each key that cannot stay, all at once

With many of DeepSpeed's keys checkpoints would be wrong: some lay weights out differently from the map by which they
are saved, some keep copies that loading does not refresh, some round. A key is allowed once a test has
trained, resumed and exported with it (test_zero_launch.py); every other field of the installed DeepSpeed is
refused here with its reason, unless it holds DeepSpeed's own value.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ds_slm.recipe.problems import nearest

SECTION = "zero_optimization"


class Kind(NamedTuple):
    """What a key may hold."""

    expected: str
    holds: Callable[[Any], bool]


class Allowed(NamedTuple):
    """An allowed key: its kind, and the ZeRO stages at which it does something."""

    kind: Kind
    stages: tuple[int, ...] = (1, 2, 3)


class Refused(NamedTuple):
    """A refused key: DeepSpeed's own value for it, which is harmless, and what is wrong with any other."""

    default: Any
    reason: str


def _is_count(value: Any, least: int, most: int) -> bool:
    """Whether a value is a whole number in a range; JSON writes large ones as 5e8."""
    if isinstance(value, float) and not value.is_integer():
        return False
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


LARGEST_BUCKET = 2**31 - 1
"""The most elements of a bucket. DeepSpeed allocates memory for the whole bucket."""

MICRO_BATCH = Kind(
    "a positive integer or 'auto'",
    lambda value: value == "auto" or (isinstance(value, int) and _is_count(value, 1, sys.maxsize)),
)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
SWITCH_OR_NULL = Kind("true, false or null", lambda value: value is None or isinstance(value, bool))
BUCKET = Kind("a whole number from 1 to 2,147,483,647", lambda value: _is_count(value, 1, LARGEST_BUCKET))
EVEN_BUCKET = Kind(
    "an even whole number from 2 to 2,147,483,646", lambda value: _is_count(value, 2, LARGEST_BUCKET) and value % 2 == 0
)
COUNT = Kind("a whole number of at least 0", lambda value: _is_count(value, 0, sys.maxsize))
POSITIVE = Kind("a whole number of at least 1", lambda value: _is_count(value, 1, sys.maxsize))

ALLOWED = {
    "reduce_bucket_size": Allowed(BUCKET),
    "allgather_bucket_size": Allowed(EVEN_BUCKET, (1, 2)),
    "overlap_comm": Allowed(SWITCH_OR_NULL),
    "contiguous_gradients": Allowed(SWITCH),
    "reduce_scatter": Allowed(SWITCH),
    "use_multi_rank_bucket_allreduce": Allowed(SWITCH, (1, 2)),
    "sub_group_size": Allowed(POSITIVE, (3,)),
    "stage3_prefetch_bucket_size": Allowed(COUNT, (3,)),
    "stage3_param_persistence_threshold": Allowed(COUNT, (3,)),
    "stage3_model_persistence_threshold": Allowed(COUNT, (3,)),
    "stage3_max_live_parameters": Allowed(COUNT, (3,)),
    "stage3_max_reuse_distance": Allowed(COUNT, (3,)),
    "stage3_use_all_reduce_for_fetch_params": Allowed(SWITCH, (3,)),
    "stage3_allgather_sequential": Allowed(SWITCH, (3,)),
    "log_trace_cache_warnings": Allowed(SWITCH, (3,)),
    "enable_sanity_checks": Allowed(SWITCH, (3,)),
}
"""The allowed keys, in addition to `stage` and the two OFFLOAD sections."""

_OWN_CHECKPOINTS = "it is about DeepSpeed's own checkpoints, and ds_slm writes its own"
_ROUNDS = "it rounds weights or gradients, which changes the result"
_ONLY_INIT = "it acts where a model is built inside deepspeed.zero.Init, which ds_slm does not do"
_LEAVES = "it is for modules whose experts are not all used, and gathers this model in whole blocks"
_NVME = "it is for files on NVMe, to which nothing is offloaded here"

REFUSED = {
    "round_robin_gradients": Refused(
        False, "it lays partitions out in another order than the map by which they are saved, so checkpoints are wrong"
    ),
    "zero_hpz_partition_size": Refused(
        1, "it keeps second copies of the weights that loading does not refresh, so a resumed run begins with others"
    ),
    "parameter_alignment": Refused(False, "it moves the partitions' borders, and no model here gains by it"),
    "zero_quantized_weights": Refused(False, _ROUNDS),
    "zero_quantized_nontrainable_weights": Refused(False, _ROUNDS),
    "zero_quantized_gradients": Refused(False, _ROUNDS),
    "zenflow": Refused(None, "it applies part of the gradients later, which changes the result"),
    "compute_grad_norm": Refused(True, "every step's gradient norm is recorded, and clipping needs it"),
    "allgather_partitions": Refused(True, "DeepSpeed does not read it any more"),
    "ignore_unused_parameters": Refused(True, "every parameter of this model is used"),
    "legacy_stage1": Refused(False, "DeepSpeed has no such stage any more"),
    "load_from_fp32_weights": Refused(True, _OWN_CHECKPOINTS),
    "elastic_checkpoint": Refused(False, _OWN_CHECKPOINTS),
    "pipeline_loading_checkpoint": Refused(False, _OWN_CHECKPOINTS),
    "stage3_gather_16bit_weights_on_model_save": Refused(False, _OWN_CHECKPOINTS),
    "stage3_gather_fp16_weights_on_model_save": Refused(False, _OWN_CHECKPOINTS),
    "memory_efficient_linear": Refused(True, _ONLY_INIT),
    "override_module_apply": Refused(True, _ONLY_INIT),
    "stage3_module_granularity_threshold": Refused(0, _LEAVES),
    "leaf_module": Refused({}, _LEAVES),
    "save_muon_momentum_buffer_in_memory": Refused(False, "the optimiser is the recipe's, and none of them is Muon"),
    "cpu_offload": Refused(None, 'its new form is "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": Refused(None, 'its new form is "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": Refused(None, "its new form is pin_memory within offload_optimizer or offload_param"),
}

OFFLOAD = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Sections within zero_optimization, and the stages that have them."""

OFFLOAD_ALLOWED = {
    "device": Kind(
        "'cpu' or 'none' (files on NVMe are not read when a checkpoint is saved)",
        lambda value: value in ("cpu", "none"),
    ),
    "pin_memory": SWITCH,
}

OFFLOAD_REFUSED = {
    "nvme_path": Refused(None, _NVME),
    "buffer_count": Refused(None, _NVME),
    "buffer_size": Refused(None, _NVME),
    "max_in_cpu": Refused(None, _NVME),
    "pipeline_read": Refused(False, _NVME),
    "pipeline_write": Refused(False, _NVME),
    "fast_init": Refused(False, _NVME),
    "ratio": Refused(1.0, "it needs DeepSpeed's own CPU Adam, and the optimiser is the recipe's"),
    "super_offload": Refused(False, "it needs DeepSpeed's own CPU Adam, and the optimiser is the recipe's"),
    "cpuadam_cores_perc": Refused(None, "it is for super_offload, which is refused"),
}


def problems(zero: Any) -> list[str]:
    """Everything that is wrong with a zero_optimization section, a sentence each."""
    zero = {} if zero is None else zero
    if not isinstance(zero, Mapping):
        return [f"ds_config: {SECTION} = {zero!r}: expected an object with a stage."]
    stage = zero.get("stage")
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (1, 2, 3):
        stage_problem = (
            f"ds_config: {SECTION}.stage = {stage!r}: expected 1, 2 or 3 (stage 0 scales moments and masters wrongly "
            "in half precision; stage 1 costs nothing more)."
        )
        return [stage_problem, *(told for key, value in zero.items() if (told := _problem(key, value, None)))]
    found = [told for key, value in zero.items() if (told := _problem(key, value, stage))]
    return found + [
        told for name in OFFLOAD if isinstance(zero.get(name), Mapping) for told in _offload_problems(name, zero[name])
    ]


def _problem(key: str, value: Any, stage: int | None) -> str | None:
    """What is wrong with one key; without a stage, its stages are not checked."""
    if key == "stage":
        return None
    if key in REFUSED:
        return None if _same(value, REFUSED[key].default) else _refusal(key, REFUSED[key].reason)
    if f"stage3_{key}" in ALLOWED | REFUSED:
        return f"ds_config: {SECTION}.{key} is called stage3_{key}: rename it."

    if key in OFFLOAD:
        kind, stages = (
            Kind("an object with a device, or null", lambda one: one is None or isinstance(one, Mapping)),
            OFFLOAD[key],
        )
    elif key in ALLOWED:
        kind, stages = ALLOWED[key]
    else:
        known = ["stage", *ALLOWED, *OFFLOAD]
        return f"ds_config: unknown key {SECTION}.{key}{nearest(key, known)}."

    if not kind.holds(value):
        return f"ds_config: {SECTION}.{key} = {value!r}: expected {kind.expected}."
    if stage is not None and stage not in stages and value is not None:
        where = " or ".join(str(one) for one in stages)
        return f"ds_config: {SECTION}.{key} does nothing at stage {stage}, only at {where}: take it out."
    return None


def _offload_problems(section: str, offload: Mapping[str, Any]) -> list[str]:
    found = []
    if "device" not in offload:
        found.append(f"ds_config: {SECTION}.{section}.device is missing: expected 'cpu' or 'none'.")
    for key, value in offload.items():
        place = f"{section}.{key}"
        if key in OFFLOAD_REFUSED:
            if not _same(value, OFFLOAD_REFUSED[key].default):
                found.append(_refusal(place, OFFLOAD_REFUSED[key].reason))
        elif key not in OFFLOAD_ALLOWED:
            found.append(f"ds_config: unknown key {SECTION}.{place}{nearest(key, OFFLOAD_ALLOWED)}.")
        elif not OFFLOAD_ALLOWED[key].holds(value):
            found.append(f"ds_config: {SECTION}.{place} = {value!r}: expected {OFFLOAD_ALLOWED[key].expected}.")
    return found


def _refusal(place: str, reason: str) -> str:
    return f"ds_config: {SECTION}.{place} is refused: {reason}. Take it out."


def _same(value: Any, default: Any) -> bool:
    """Whether a key holds DeepSpeed's own value: true is not 1."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)
