"""Steps that must not be taken: what they leave behind, which layer went wrong first, and what a loss spike is.

    loss or gradient not finite --> RUN/bad-steps/step-00000014/{rows,model}.safetensors, what.json --> stop
    replay: those rows, one by one, through those weights on a CPU --> the first module whose output is not finite

The dump is no checkpoint: nothing resumes from it, and the last whole one stays the newest.

A spike is a loss that exceeds the median of the last SPIKE_WINDOW steps by more than SPIKE_DEVIATIONS robust standard
deviations (1.4826 x the median absolute deviation) and by more than SPIKE_SHARE of that median. It stops nothing.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_slm.data.rows import Rows
from ds_slm.errors import CheckpointError
from ds_slm.files import read_json, write_json
from ds_slm.model import decoder
from ds_slm.recipe import schema

SPIKE_WINDOW, SPIKE_LEAST_STEPS, SPIKE_DEVIATIONS, SPIKE_SHARE = 50, 20, 6.0, 0.05
ROWS, WEIGHTS, WHAT = "rows.safetensors", "model.safetensors", "what.json"


def folder_of(run: Path, step: int) -> Path:
    """Where a bad step's dump lies."""
    return run / "bad-steps" / f"step-{step:08d}"


def dump(folder: Path, rows: Rows, what: dict[str, Any]) -> None:
    """Write a step's rows and what happened, beside the weights they met, which the ranks gather (Saver)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"token_ids": rows.token_ids, "weights": rows.weights}
    if rows.document_ids is not None:
        arrays["document_ids"] = rows.document_ids
    save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, folder / ROWS)
    write_json(folder / WHAT, what)


def replay(run: Path, step: int) -> Iterator[str]:
    """Run a dumped step's rows again, each alone on the CPU, in the recipe's precision; yields what is found.

    Raises:
        CheckpointError: there is no such dump.
    """
    from safetensors.torch import load_file

    folder = folder_of(run, step)
    if not (folder / WHAT).is_file():
        there = ", ".join(str(int(path.name[5:])) for path in sorted(run.glob("bad-steps/step-*"))) or "none"
        raise CheckpointError(
            f"{folder} is not there: a step whose loss or gradient is not finite leaves it. Steps found: {there}."
        )

    recipe = schema.load_recorded(run)
    model = decoder.build(recipe.model, recipe.train.seed)
    what = read_json(folder / WHAT) or {}
    try:
        rows, count = load_file(folder / ROWS), len(what["rows"])
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except Exception as error:  # safetensors' own kind
        raise CheckpointError(f"{folder} is damaged ({error!r}): remove it; the step leaves it again.") from error

    # The weights are looked at as they were dumped, before they are rounded to the recipe's precision.
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.train.precision]
    wrong_weights = [name for name, one in model.named_parameters() if not one.isfinite().all()]
    yield f"step {step}: {what['why']}; {count} rows again, each alone, on this CPU in {recipe.train.precision}"
    if wrong_weights:
        yield f"the weights themselves are not finite: {', '.join(wrong_weights)}"

    model.to(dtype)
    culprits = 0
    for place in range(count):
        one = {name: tensor[place : place + 1] for name, tensor in rows.items()}
        first, loss = _first_wrong(model, one, recipe.train.z_loss)
        described = what["rows"][place]
        culprits += first is not None
        yield (
            f"row {tuple(described['source_epoch_row'])}, position {described['position']}: "
            + (first or f"loss {loss:.4f}, all finite")
        )

    # All rows go wrong, or none does: then the rows are not to blame.
    if culprits == count > 1:
        yield "every row goes wrong: rather the weights than the rows; lower the learning rate, or begin further back"
    if not culprits and not wrong_weights:
        yield "nothing goes wrong here: not the rows, but a copy of the weights or a device was damaged"


def _first_wrong(model: nn.Module, row: dict[str, Tensor], z_loss: float) -> tuple[str | None, float]:
    """The first thing of a row's forward and backward pass that is not finite, and the loss."""
    wrong: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, given: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if not output.isfinite().all():
                wrong.append(f"the output of {name} is not finite")
            if output.requires_grad:
                output.register_hook(lambda gradient: back(gradient))

        def back(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                wrong.append(f"the gradient at the output of {name} is not finite")

        return seen

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        ids, weights = row["token_ids"], row["weights"]
        sums = model(ids[:, :-1], ids[:, 1:], weights, row.get("document_ids"), z_loss)
        if not sums.nll.isfinite():
            wrong.append("the loss is not finite")

        (sums.objective / sums.weight.clamp_min(1.0)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                wrong.append(f"the gradient of {name} is not finite")

        return (wrong[0] if wrong else None), (sums.nll / sums.weight.clamp_min(1.0)).item()
    finally:
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()


class Spikes:
    """Tells losses that stand out from those before them."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def excess(self, loss: float) -> float | None:
        """How far a step's loss lies above the median before it, if it is a spike. Call once a step."""
        before: Sequence[float] = list(self._losses)
        self._losses.append(loss)
        if len(before) < SPIKE_LEAST_STEPS:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(one - median) for one in before)
        above = loss - median
        is_spike = above > max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * median) and math.isfinite(loss)
        return above if is_spike else None
