"""What a launch decided: devices, kernels, batch. Printed at its start and kept in env.json."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import torch

from ds_slm.checkpoint.files import BASE
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
    """The effective choices of this launch, by name, for env.json. Needs the process group."""
    device = torch.device(devices.device_type())
    packed_head_dim = recipe.model.head_dim if recipe.sft is not None and recipe.sft.packing else None
    computes = kernels.effective_kernels(device, kernels.DTYPES[recipe.train.precision], packed_head_dim)

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
        "interfaces": dict(zip(control.hosts, control.gather(os.environ.get(network.GLOO) or None), strict=True)),
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
    """How the model's blocks run, and why they are eager if the launch asks for compiled ones."""
    if engine_config.compiled:
        return "compiled"
    return f"eager ({engine_config.eager_reason})" if engine_config.eager_reason else "eager"


def announce(facts: Mapping[str, Any], options: Options, warnings: Sequence[str], terminal: TextIO) -> None:
    """Print what a launch decided, and its warnings, at its start."""
    hosts, filler = ", ".join(dict.fromkeys(facts["hosts"])), facts["filler_rows_per_step"]
    taken = [f"{name or 'its own choice'} on {host}" for host, name in facts["interfaces"].items()]
    over = f" over {', '.join(taken)}" if len(taken) > 1 else ""
    base = [f"base {facts['base']}, weights {facts[BASE][:16]}"] if "base" in facts else []

    lines = [
        f"{facts['recipe']} on {facts['world_size']} x {facts['device']}, hosts {hosts}",
        f"{facts['backend']}{over}, {facts['precision']}, ZeRO-{facts['zero_stage']}, {facts['optimizer']}; "
        f"{facts['rows_per_step']} rows a step = {facts['world_size']} ranks x {facts['accumulation_steps']} forwards "
        f"x {facts['micro_batch_rows']} rows" + (f" - {filler} filler" if filler else ""),
        "; ".join(f"{what}: {kernel}" for what, kernel in facts["kernels"].items()),
        f"data {facts['data_sha256'][:16]}, recipe {facts['recipe_sha256'][:16]}, run folder {options.run_dir}, "
        f"generation {facts['generation']}",
        *base,
        *(f"note: {note}" for note in facts["notes"]),
        *(f"warning: {warning}" for warning in (*facts["mixed_hosts"], *warnings)),
    ]
    print("\n".join(lines), file=terminal, flush=True)
