"""Recipe + ds_configs/*.json + world size -> the one dictionary DeepSpeed gets.

    recipe (the result)  \
    ds_config (the speed) > join -> every conflict at once, or EngineConfig(deepspeed, micro_batch, accumulation_steps)
    world size (where)   /

DeepSpeed silently accepts unknown top-level keys, fills in its own clipping norm, and accumulates bf16 gradients in
bf16. Here unknown keys are refused, and everything that changes the result is written out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_slm.errors import ConfigError
from ds_slm.recipe import zero_keys
from ds_slm.recipe.plan import cut, training_flops
from ds_slm.recipe.problems import closest, nearest
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.zero_keys import MICRO_BATCH, SWITCH, Kind

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

ALLOWED = {
    "zero_optimization": None,
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "compile_blocks": Kind("true, false or 'auto'", lambda value: isinstance(value, bool) or value == "auto"),
    "deterministic": SWITCH,
    "memory_breakdown": SWITCH,
    "wall_clock_breakdown": SWITCH,
    "zero_force_ds_cpu_optimizer": Kind("false (the optimiser is the recipe's)", lambda value: value is False),
}
"""Top-level keys that a ds_configs file may hold, and their kinds: memory, speed and communication."""

REFUSED = {
    "aio": "it is for files on NVMe, to which nothing is offloaded here",
    "comms_logger": "it keeps a record of every message in memory and nothing prints its table; --profile A:B tells "
    "where a step's time goes",
}
"""Top-level keys of DeepSpeed that do not change the result and are of no use here, with the reason."""

OWNED_BY_RECIPE = {
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "gradient_clipping": "optimizer.grad_clip",
    "train_batch_size": "train.global_batch_tokens",
    "gradient_accumulation_steps": "train.global_batch_tokens",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "activation_checkpointing": "train.gradient_checkpointing",
    "tensorboard": "the run folder's own TensorBoard",
}
"""Top-level keys that change the result, and what owns them."""


COMPILE_FLOPS = {"cpu": 2e13, "cuda": 2e16}
"""FLOPs of a rank's whole run, by device, from which blocks are compiled. On a CPU compiling takes 40 seconds once, and
saves 1 to 45 % of every step; a GPU's border is an estimate."""


@dataclass(frozen=True)
class EngineConfig:
    """The dictionary that DeepSpeed gets, and what the trainer needs to know of the batch."""

    deepspeed: dict[str, Any]
    micro_batch: int
    """Rows of one forward on one device."""
    accumulation_steps: int
    filler_rows: int
    """Rows of weight 0 that make the step divide evenly among the devices."""
    compiled: bool
    """Whether blocks and loss are compiled."""
    deterministic: bool = False
    """Whether a GPU should sum in the same order every time."""
    eager_reason: str | None = None
    """Why blocks are eager although the ds_config, or the run's length, asks for compiled ones."""


def _shipped_files(wanted: Path) -> str:
    """What a message says of the checkout's ds_configs, the one whose name is nearest to a wrong one first."""
    folder = DS_CONFIGS.relative_to(Path.cwd()) if DS_CONFIGS.is_relative_to(Path.cwd()) else DS_CONFIGS
    stems = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    best = closest(wanted.stem, stems)
    near = f"the nearest is {folder / best}.json; " if best else ""
    return f"{near}the checkout has {', '.join(f'{stem}.json' for stem in stems)} in {folder}"


def read(path: Path) -> dict[str, Any]:
    """Read a ds_configs file. Raises ConfigError if it is missing or not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except OSError as error:
        raise ConfigError(f"--ds-config {path}: {error.strerror}; {_shipped_files(path)}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--ds-config {path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--ds-config {path} holds a {type(content).__name__}, expected an object.")
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that occurs twice: JSON would silently take the later value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"it holds {', '.join(map(repr, twice))} more than once")
    return content


def join(
    recipe: Recipe, ds_file: dict[str, Any], world_size: int, device_type: str, micro_batch: int | None
) -> EngineConfig:
    """Join the three owners. Raises ConfigError with every conflict.

    Args:
        recipe: what is trained.
        ds_file: content of a ds_configs file.
        world_size: devices over all hosts.
        device_type: 'cpu' or 'cuda'.
        micro_batch: rows per forward and device; None takes the ds_config's hint, then a default.
    """
    refuse_conflicts(ds_file)
    compile_blocks, deterministic = ds_file.get("compile_blocks", "auto"), ds_file.get("deterministic", False)
    if compile_blocks == "auto":
        compile_blocks = compiles_blocks(recipe, ds_file["zero_optimization"]["stage"], world_size, device_type)
    step = cut(recipe, ds_file, world_size, device_type, micro_batch)
    deepspeed = _deepspeed(recipe, ds_file, step.micro_batch, step.accumulation_steps, world_size)
    return EngineConfig(
        deepspeed, step.micro_batch, step.accumulation_steps, step.filler_rows, compile_blocks, deterministic
    )


def compiles_blocks(recipe: Recipe, zero_stage: int, world_size: int, device_type: str) -> bool:
    """Whether a run is long enough to compile its blocks; asked if its ds_config does not decide."""
    return zero_stage < 3 and training_flops(recipe) / world_size >= COMPILE_FLOPS[device_type]


def refuse_conflicts(ds_file: dict[str, Any]) -> None:
    """Raise ConfigError with every key of a ds_config that is unknown, refused, or belongs to the recipe."""
    if problems := _conflicts(ds_file):
        raise ConfigError(problems)


def _conflicts(ds_file: dict[str, Any]) -> list[str]:
    problems = []
    for key, value in ds_file.items():
        if key in OWNED_BY_RECIPE:
            problems.append(
                f"ds_config: {key!r} belongs to the recipe ({OWNED_BY_RECIPE[key]}): take it out of the file."
            )
        elif key in REFUSED:
            problems.append(f"ds_config: {key!r} is refused: {REFUSED[key]}. Take it out.")
        elif key not in ALLOWED:
            problems.append(f"ds_config: unknown key {key!r}{nearest(key, ALLOWED)}; allowed are {', '.join(ALLOWED)}.")
        elif (kind := ALLOWED[key]) and not kind.holds(value):
            problems.append(f"ds_config: {key} = {value!r}: expected {kind.expected}.")

    zero = ds_file.get("zero_optimization")
    problems += zero_keys.problems(zero)
    if ds_file.get("compile_blocks") is True and isinstance(zero, dict) and zero.get("stage") == 3:
        problems.append("ds_config: compile_blocks does not go with ZeRO-3, whose blocks have no weights of their own.")
    return problems


def _deepspeed(
    recipe: Recipe, ds_file: dict[str, Any], micro_batch: int, accumulation_steps: int, world_size: int
) -> dict[str, Any]:
    precision = recipe.train.precision
    config: dict[str, Any] = {
        **{key: value for key, value in ds_file.items() if key not in ("compile_blocks", "deterministic")},
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch * accumulation_steps * world_size,
        "gradient_clipping": recipe.optimizer.grad_clip,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        # DeepSpeed's usual hysteresis of 2 would answer a first overflow by repeating it at the same scale
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # DeepSpeed's timer would wait for the device twice a micro-batch, to print what we measure once a step
        "timers": {"throughput": {"enabled": False}},
    }

    # Otherwise DeepSpeed would insist on its own CPU Adam here.
    if "offload_optimizer" in ds_file["zero_optimization"]:
        config["zero_force_ds_cpu_optimizer"] = False

    return config
