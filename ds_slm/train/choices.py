"""What a launch decided: devices, kernels, batch. Printed at its start and kept in env.json."""

import os
from typing import Any

import torch

from ds_slm.distributed import network
from ds_slm.distributed.ranks import Control
from ds_slm.engine import devices
from ds_slm.model import kernels
from ds_slm.recipe.ds_config import EngineConfig
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure
from ds_slm.train.task import Options


def effective_choices(
    recipe: Recipe, options: Options, engine_config: EngineConfig, control: Control
) -> dict[str, Any]:
    """The effective choices of this launch, by name: they stand in env.json. Needs the process group."""
    device = torch.device(devices.device_type())
    packed = recipe.sft is not None and recipe.sft.packing
    computes = kernels.effective_kernels(device, devices.DTYPES[recipe.train.precision], packed)

    return {
        "recipe": recipe.card.name,
        "recipe_name": options.recipe_name,
        "device": measure.device_name(device),
        "backend": torch.distributed.get_backend(),
        "precision": recipe.train.precision,
        "kernels": {**computes, "blocks": blocks(engine_config)},
        "zero_stage": engine_config.deepspeed["zero_optimization"]["stage"],
        "optimizer": recipe.optimizer.name,
        "world_size": control.world_size,
        "hosts": control.hosts,
        "interfaces": dict(zip(control.hosts, control.gather(os.environ.get(network.GLOO)), strict=True)),
        "threads_per_rank": torch.get_num_threads(),
        "resident_gb_before_model": measure.resident_memory_bytes() / 1e9,
        "rows_per_step": recipe.rows_per_step,
        "micro_batch_rows": engine_config.micro_batch,
        "accumulation_steps": engine_config.accumulation_steps,
        "filler_rows_per_step": engine_config.filler_rows,
        "skip_rows": [[some.start, some.stop] for some in options.skip_rows],
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
    }


def blocks(engine_config: EngineConfig) -> str:
    """How the model's blocks run, and why they are eager although the launch asks for compiled ones."""
    if engine_config.compiled:
        return "compiled"
    return f"eager ({engine_config.eager_reason})" if engine_config.eager_reason else "eager"
