"""--micro-batch auto: the rows of one forward that train fastest and fit; measured once, then kept.

    key (everything the speed depends on) --> CACHE/micro_batch.json has it? --> that many rows
    otherwise: 1, 2, 4, ... rows, forward and backward as in the run, on all ranks at the same time --> the fastest

A size is as fast as its slowest rank. Trials end when a size fails or does not fit on any rank, or when two in a row
are slower than the best. Twice the rows must bring MINIMAL_GAIN, because memory has a price too. A GPU's trial must
leave room for the planned weights, gradients and optimiser states; on a CPU, activations are planned as well.

Any exception ends the trials, and its message is printed: libraries report a lack of memory in many ways. An error that
does not depend on the size is raised again by the run. Afterwards a trial's memory is free, and the peak starts again.

Known gaps: messages between devices are not measured, and DeepSpeed's own buffers are counted as planned. A CPU's free
memory is the machine's: the limit of a container is not read.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ds_slm.distributed.ranks import Control
from ds_slm.engine.result_cache import ResultCache
from ds_slm.engine.trial_pass import TrialPass
from ds_slm.model import cpu_attention, kernels
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe import budget
from ds_slm.recipe.ds_config import EngineConfig
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure

MINIMAL_GAIN = 1.02
REPEATS = 3
FREE_SHARE = 0.9
"""The share of a device's free memory that may be used."""
METHOD = 4
"""Version of the measurement: results of an older one are not used."""
LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "numpy", "triton")
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
"""The keys of DeepSpeed's configuration that follow from the result."""


@dataclass(frozen=True)
class Trial:
    """What is trained in a trial, and on which device."""

    recipe: Recipe
    engine_config: EngineConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, under a mask."""
        return self.recipe.sft is not None and self.recipe.sft.packing


def choose(trial: Trial, control: Control, say: Callable[[str], None]) -> int:
    """The micro-batch to train with. Collective; the same on every rank.

    Args:
        trial: what is trained, and on which device.
        control: the ranks' connection.
        say: prints a line.
    """
    cache, key = ResultCache("micro_batch"), _cache_key(trial, control)
    kept = control.broadcast(_valid_rows(cache.load(key), _rows_per_rank(trial, control)), 0)
    if kept:
        say(f"micro-batch {kept}, as measured before ({cache.path})")
        return kept

    speeds, failure = _measure_speeds(trial, control)
    if not speeds:
        say(f"warning: micro-batch 1, the smallest, although its trial failed ({failure})")
        return 1

    chosen = fastest(speeds)
    written = control.rank == 0 and cache.store(key, chosen)
    measured = ", ".join(f"{rows}: {speed:.3g}" for rows, speed in speeds.items())
    say(
        f"micro-batch {chosen}, by rows a second and device ({measured}{f'; {failure}' if failure else ''})"
        + (f"; kept in {cache.path}" if written else "")
    )
    return chosen


def fastest(speeds: Mapping[int, float]) -> int:
    """The size with the most rows a second; a larger one must bring MINIMAL_GAIN over the smaller ones."""
    chosen, best = 1, 0.0
    for rows, speed in sorted(speeds.items()):
        if speed > best * MINIMAL_GAIN:
            chosen, best = rows, speed
    return chosen


def _cache_key(trial: Trial, control: Control) -> dict[str, Any]:
    """Everything that the speed or the memory of a micro-batch depends on, on all ranks. Collective."""
    recipe, engine_config = trial.recipe, trial.engine_config
    own_device = [*measure.hardware(trial.device), control.ranks_on_host, torch.get_num_threads()]
    products = kernels.chosen_products(), cpu_attention.is_built(trial.dtype)

    return {
        "method": [METHOD, MINIMAL_GAIN, REPEATS, FREE_SHARE],
        "model": recipe.model.model_dump(mode="json"),
        "rows": [recipe.rows_per_step, recipe.data.seq_len, trial.packed],
        "train": recipe.train.model_dump(mode="json", include={"precision", "gradient_checkpointing", "z_loss"}),
        "optimizer": recipe.optimizer.model_dump(mode="json", include={"name", "embedding_bits"}),
        "deepspeed": {name: value for name, value in engine_config.deepspeed.items() if name not in BATCH_KEYS},
        "kernels": [str(trial.dtype), engine_config.compiled, engine_config.deterministic, *products],
        "devices": control.gather(own_device),
        "versions": {name: _version(name) for name in LIBRARIES} | {"cuda": torch.version.cuda},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _valid_rows(result: Any, most: int) -> int | None:
    """A cached result, if it is a number of rows that a rank has."""
    return result if type(result) is int and 0 < result <= most else None


def _rows_per_rank(trial: Trial, control: Control) -> int:
    """Rows of one rank in a step."""
    return -(-trial.recipe.rows_per_step // control.world_size)


def _measure_speeds(trial: Trial, control: Control) -> tuple[dict[int, float], str | None]:
    """Rows a second by size, and the failure that ended the trials, if one did. Collective."""
    speeds: dict[int, float] = {}
    slower = 0
    for rows in _sizes(_rows_per_rank(trial, control)):
        # All ranks begin together, and all hear of every rank's outcome: they go on, or stop, alike.
        control.barrier()
        outcomes = control.gather(_run_trial(trial, control, rows))
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failures:
            return speeds, f"{rows}: {failures[0]}"

        speeds[rows] = rows / max(outcomes)
        slower = 0 if speeds[rows] == max(speeds.values()) else slower + 1
        if slower == 2:
            break
    return speeds, None


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _run_trial(trial: Trial, control: Control, rows: int) -> float | str:
    """Seconds of one forward and backward pass, or why it failed. Frees what it used. Not collective."""
    try:
        return _duration_s(trial, control, rows)
    except Exception as error:  # whatever a library raises when memory is short
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"[:160]
    finally:
        _release(trial)


def _duration_s(trial: Trial, control: Control, rows: int) -> float:
    """Seconds of one forward and backward pass: the least of REPEATS. Raises MemoryError if it does not fit."""
    recipe, device, on_gpu = trial.recipe, trial.device, trial.device.type == "cuda"
    zero = trial.engine_config.deepspeed["zero_optimization"]
    half_products = kernels.multiplies(device.type, trial.dtype)
    planned = budget.memory(recipe, zero, control.world_size, rows, device.type, half_products)
    activation_bytes = planned.activations_bytes + planned.loss_bytes
    state_bytes = planned.device_bytes - activation_bytes

    if not on_gpu:  # the program is there already
        _refuse_too_large(planned.device_bytes - planned.program_bytes, _free_bytes() / control.ranks_on_host)

    # As in the run: compiled or eager, packed or not.
    forward_backward = TrialPass(recipe, rows, device, trial.dtype)
    if trial.engine_config.compiled:
        forward_backward.model.compile_parts()
    documents = _documents(trial, rows)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    held_bytes = torch.cuda.memory_allocated(device) if on_gpu else 0

    # The first pass is slow: it compiles, and chooses kernels.
    least_s = math.inf
    for _ in range(REPEATS):
        start_s = _now_s(device)
        forward_backward(documents)
        least_s = min(least_s, _now_s(device) - start_s)

    if on_gpu:
        activation_bytes = torch.cuda.max_memory_allocated(device) - held_bytes
        _refuse_too_large(state_bytes + activation_bytes, measure.available_gpu_bytes(device))
    return least_s


def _refuse_too_large(needed_bytes: float, available_bytes: float) -> None:
    if needed_bytes > FREE_SHARE * available_bytes:
        raise MemoryError(
            f"it needs {needed_bytes / 1e9:.3g} GB; {available_bytes / 1e9:.3g} GB are free for a rank, of which "
            f"{FREE_SHARE:.0%} may be used"
        )


def _documents(trial: Trial, rows: int) -> PackedDocuments | None:
    """Two documents a row, if packed."""
    if not trial.packed:
        return None
    seq_len = trial.recipe.data.seq_len
    halves = torch.arange(seq_len, device=trial.device, dtype=torch.int32) * 2 // seq_len
    return PackedDocuments(halves.expand(rows, -1).contiguous(), count=2 * rows)


def _release(trial: Trial) -> None:
    """Free what a trial used: the graph of a failed pass, compiled code, cached memory. The peak starts again."""
    if trial.engine_config.compiled:
        torch.compiler.reset()  # torch stops compiling a function that it has seen in many shapes
    gc.collect()
    measure.release_memory(trial.device)


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
