"""What a launch decided: devices, kernels, batch. Printed at its start and kept in env.json."""

import os
from typing import TYPE_CHECKING, Any

import torch

from ds_slm.model import kernels
from ds_slm.recipe.schema import Recipe
from ds_slm.train import devices, measure, network
from ds_slm.train.control import Control
from ds_slm.train.ds_config import Joined

if TYPE_CHECKING:
    from ds_slm.train.session import Options


def effective_choices(recipe: Recipe, options: "Options", joined: Joined, control: Control) -> dict[str, Any]:
    """The effective choices of this launch, by name: they stand in env.json. Needs the process group."""
    device = torch.device(devices.device_type())
    return {
        "recipe": recipe.card.name,
        "recipe_name": options.recipe_name,
        "device": measure.device_name(device),
        "backend": torch.distributed.get_backend(),
        "precision": recipe.train.precision,
        "kernels": {
            **kernels.effective_kernels(
                device, devices.DTYPES[recipe.train.precision], recipe.sft is not None and recipe.sft.packing
            ),
            "blocks": blocks(joined),
        },
        "zero_stage": joined.deepspeed["zero_optimization"]["stage"],
        "optimizer": recipe.optimizer.name,
        "world_size": control.world_size,
        "hosts": control.hosts,
        "interfaces": dict(zip(control.hosts, control.gather(os.environ.get(network.GLOO)), strict=True)),
        "threads_per_rank": torch.get_num_threads(),
        "resident_gb_before_model": measure.resident_memory_bytes() / 1e9,
        "rows_per_step": recipe.rows_per_step,
        "micro_batch_rows": joined.micro_batch,
        "accumulation_steps": joined.accumulation_steps,
        "filler_rows_per_step": joined.filler_rows,
        "skip_rows": [[some.start, some.stop] for some in options.skip_rows],
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
    }


def blocks(joined: Joined) -> str:
    """How the model's blocks run, and why they are eager although the launch asks for compiled ones."""
    if joined.compiled:
        return "compiled"
    return f"eager ({joined.eager_reason})" if joined.eager_reason else "eager"
