"""Which keys of zero_optimization are allowed, and what is told of the others. Trained with in test_zero_launch.py."""

from pathlib import Path

import pytest

from ds_slm.errors import ConfigError
from ds_slm.recipe import ds_config, loading, plan, zero_keys


def test_every_field_of_deepspeed_is_allowed_or_refused() -> None:
    """Oracle: the fields and aliases of the installed version."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    tables = {
        DeepSpeedZeroConfig: (zero_keys.ALLOWED | zero_keys.OFFLOAD | {"stage": None}, zero_keys.REFUSED),
        DeepSpeedZeroOffloadOptimizerConfig: (zero_keys.OFFLOAD_ALLOWED, zero_keys.OFFLOAD_REFUSED),
        DeepSpeedZeroOffloadParamConfig: (zero_keys.OFFLOAD_ALLOWED, zero_keys.OFFLOAD_REFUSED),
    }
    for model, (allowed, refused) in tables.items():
        assert not allowed.keys() & refused.keys()
        for name, info in model.model_fields.items():
            assert (info.alias or name) in allowed.keys() | refused.keys(), name


def test_refused_keys_may_say_what_is_so_anyway() -> None:
    """Oracle: DeepSpeed's own defaults."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {info.alias or name: info for name, info in DeepSpeedZeroConfig.model_fields.items()}
    for key, refused in zero_keys.REFUSED.items():
        if key != "leaf_module":  # its default lists classes of other models
            assert fields[key].default == refused.default, key
            assert zero_keys.problems({"stage": 3, key: refused.default}) == []


WRONG = [
    ("round_robin_gradients", True, "checkpoints are wrong"),
    ("zero_hpz_partition_size", 2, "a resumed run begins with others"),
    ("zero_quantized_weights", True, "changes the result"),
    ("zenflow", {"topk_ratio": 0.1}, "applies part of the gradients later"),
    ("cpu_offload", True, '"offload_optimizer": {"device": "cpu"}'),
    ("param_persistence_threshold", 10, "is called stage3_param_persistence_threshold"),
    ("legacy_stage1", 1, "no such stage"),
    ("zero_hpz_partition_size", True, "is refused"),
    ("reduce_buket_size", 10, "the nearest is 'reduce_bucket_size'"),
    ("mics_shard_size", 2, "unknown key"),
    ("reduce_bucket_size", "auto", "expected a whole number"),
    ("reduce_bucket_size", True, "expected a whole number"),
    ("reduce_bucket_size", 0, "expected a whole number"),
    ("reduce_bucket_size", 1e300, "expected a whole number"),
    ("reduce_bucket_size", float("nan"), "expected a whole number"),
    ("sub_group_size", 1.5, "expected a whole number"),
    ("sub_group_size", 0, "expected a whole number"),
    ("overlap_comm", 1, "expected true, false or null"),
    ("contiguous_gradients", None, "expected true or false"),
    ("allgather_bucket_size", 1000, "does nothing at stage 3"),
    ("offload_optimizer", "cpu", "expected an object with a device"),
    ("offload_optimizer", {"pin_memory": True}, "device is missing"),
    ("offload_optimizer", {"device": "nvme"}, "files on NVMe"),
    ("offload_optimizer", {"device": ["cpu"]}, "expected 'cpu' or 'none'"),
    ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "own CPU Adam"),
    ("offload_optimizer", {"device": "cpu", "super_offload": True}, "own CPU Adam"),
    ("offload_param", {"device": "cpu", "nvme_path": "/x"}, "NVMe"),
    ("offload_param", {"device": "cpu", "pin_memry": True}, "the nearest is 'pin_memory'"),
]


@pytest.mark.parametrize(("key", "value", "told"), WRONG)
def test_wrong_keys_and_values_are_told(key: str, value: object, told: str) -> None:
    """Oracle: one sentence, which names the key and says what is wrong with it."""
    (problem,) = zero_keys.problems({"stage": 3, key: value})
    assert key in problem and told in problem


def test_all_of_them_are_told_at_once() -> None:
    """Oracle: as many problems as there are wrong keys, of the file's other keys too; by the plan as by a launch."""
    zero = {"stage": 3} | {key: value for key, value, _ in WRONG}
    others = {
        "aio": {},
        "comms_logger": {"enabled": True},
        "memory_breakdown": "yes",
        "zero_force_ds_cpu_optimizer": True,
    }
    recipe = loading.load("demo")
    with pytest.raises(ConfigError) as caught:
        ds_config.join(recipe, {**others, "zero_optimization": zero}, 1, "cpu", None)
    assert len(caught.value.problems) == len(zero) - 1 + len(others)
    with pytest.raises(ConfigError) as planned:
        plan.plan(recipe, "demo", {"zero_optimization": zero})
    assert planned.value.problems == caught.value.problems[len(others) :]


@pytest.mark.parametrize("stage", [True, 1.0, 0, 4, "2", None])
def test_stages_that_are_none(stage: object) -> None:
    """Oracle: the sentence, beside what else is wrong."""
    problems = zero_keys.problems({"stage": stage, "overlap_comm": "no"})
    assert len(problems) == 2 and f"stage = {stage!r}: expected 1, 2 or 3" in problems[0]


@pytest.mark.parametrize(("stage", "key"), [(1, "sub_group_size"), (2, "stage3_prefetch_bucket_size")])
def test_keys_of_another_stage_are_refused(stage: int, key: str) -> None:
    """Oracle: the stage that has them."""
    (problem,) = zero_keys.problems({"stage": stage, key: 1000})
    assert f"does nothing at stage {stage}, only at 3" in problem


def test_numbers_as_json_writes_them() -> None:
    """Oracle: 5e8 is a float to JSON and a whole number to DeepSpeed; an odd all-gather bucket fails an assertion."""
    assert zero_keys.problems({"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 2e8}) == []
    (problem,) = zero_keys.problems({"stage": 2, "allgather_bucket_size": 1001})
    assert "even" in problem


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """JSON takes the later one in silence. Oracle: the name of the key."""
    (tmp_path / "x.json").write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ConfigError, match="'stage' more than once"):
        ds_config.read(tmp_path / "x.json")
