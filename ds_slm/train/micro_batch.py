"""--micro-batch auto: the rows of one forward that train fastest and fit; measured once, then remembered.

    recipe, ds_config, devices --> key --> CACHE/micro_batch.json has it? --> that many rows
                                      no --> 1, 2, 4, ... rows, forward and backward on every rank at once --> fastest

A size counts with its slowest rank. Sizes grow until one does not fit or two in a row are slower than the best; twice
the rows must bring MINIMAL_GAIN, for memory counts too. What fits: on a GPU the peak that was measured, on a CPU the
plan's activations, each with the plan's weights, gradients and optimiser states.

Known gap: DeepSpeed's own buffers are counted as planned, not as measured.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_slm.files import write_json
from ds_slm.model import decoder
from ds_slm.recipe import budget, plan
from ds_slm.recipe.schema import Recipe
from ds_slm.train.control import Control

MINIMAL_GAIN = 1.02
REPEATS = 3
FREE_SHARE = 0.9
"""Of a device's memory may be used."""


def cache_file() -> Path:
    """Where choices are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_slm" / "micro_batch.json"


def choose(
    recipe: Recipe,
    zero: Mapping[str, Any],
    control: Control,
    device: torch.device,
    device_name: str,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> int:
    """The micro-batch to train with. Collective; the same on every rank.

    Args:
        recipe: what is trained.
        zero: DeepSpeed's zero_optimization section.
        control: of all ranks.
        device: of this rank.
        device_name: what a person calls it.
        dtype: to compute in.
        say: takes a line.
    """
    described = {
        "model": recipe.model.model_dump(mode="json"),
        "rows": [recipe.rows_per_step, recipe.data.seq_len],
        "train": [recipe.train.precision, recipe.train.gradient_checkpointing, recipe.optimizer.name],
        "zero": dict(zero),
        "devices": [device_name, control.world_size, torch.get_num_threads()],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    known = control.broadcast(_remembered(key), 0)
    if known:
        say(f"micro-batch {known}, as measured before ({cache_file()})")
        return known
    speeds = _speeds(recipe, zero, control, device, dtype)
    chosen = fastest(speeds)
    told = ", ".join(f"{rows}: {speed:.3g}" for rows, speed in speeds.items())
    say(f"micro-batch {chosen}, by rows a second and device ({told}); remembered in {cache_file()}")
    if control.rank == 0:
        _remember(key, chosen)
    return chosen


def fastest(speeds: Mapping[int, float]) -> int:
    """The size with the most rows a second; a larger one must bring MINIMAL_GAIN over the smaller ones."""
    chosen, best = 1, 0.0
    for rows, speed in sorted(speeds.items()):
        if speed > best * MINIMAL_GAIN:
            chosen, best = rows, speed
    return chosen


def _speeds(
    recipe: Recipe, zero: Mapping[str, Any], control: Control, device: torch.device, dtype: torch.dtype
) -> dict[int, float]:
    model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing).to(device, dtype)
    most = -(-recipe.rows_per_step // control.world_size)
    speeds: dict[int, float] = {}
    slower = 0
    for rows in _sizes(most):
        durations_s = control.gather(_duration_s(model, recipe, zero, control, device, rows))
        if not math.isfinite(max(durations_s)):
            break
        speeds[rows] = rows / max(durations_s)
        slower = 0 if speeds[rows] == max(speeds.values()) else slower + 1
        if slower == 2:
            break
    return speeds


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _duration_s(
    model: decoder.Decoder, recipe: Recipe, zero: Mapping[str, Any], control: Control, device: torch.device, rows: int
) -> float:
    """Seconds of one forward and backward pass, the least of some; infinite where it does not fit."""
    params = plan.parameter_counts(recipe.model)
    planned = budget.memory(recipe, params.total, params.embedding + params.head, zero, control.world_size, rows)
    passing = planned.activations_bytes + planned.loss_bytes
    states = planned.device_bytes - passing
    ids = torch.zeros(rows, recipe.data.seq_len + 1, dtype=torch.int64, device=device)
    documents = None
    if recipe.sft is not None and recipe.sft.packing:
        documents = torch.zeros(rows, recipe.data.seq_len, dtype=torch.int32, device=device)
    on_gpu = device.type == "cuda"
    control.barrier()
    if not on_gpu and states + passing > FREE_SHARE * _free_bytes() / control.ranks_on_host:
        return math.inf
    least_s = math.inf
    try:
        for _ in range(REPEATS):
            begin_s = _now_s(on_gpu)
            model(ids[:, :-1], ids[:, 1:], document_ids_BT=documents).objective.backward()
            model.zero_grad(set_to_none=True)
            least_s = min(least_s, _now_s(on_gpu) - begin_s)
    except torch.OutOfMemoryError:
        return math.inf
    if on_gpu:
        passing = torch.cuda.max_memory_allocated(device)
        if states + passing > FREE_SHARE * torch.cuda.get_device_properties(device).total_memory:
            return math.inf
    return least_s


def _now_s(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _remembered(key: str) -> int | None:
    found = _read().get(key)
    return found if isinstance(found, int) and found > 0 else None


def _remember(key: str, rows: int) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_read(), key: rows})
    except OSError:
        pass  # a home that cannot be written to: measured anew next time


def _read() -> dict[str, Any]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
