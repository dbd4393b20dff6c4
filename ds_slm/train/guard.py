"""Steps that must not be taken: how they are refused, what they leave behind, and which layer went wrong first.

    loss or gradient not finite --> RUN/bad-steps/step-00000014/{rows,model}.safetensors, what.json --> stop
    replay: those rows, one by one, through those weights on a CPU --> the first module whose output is not finite

The dump is not a checkpoint: nothing resumes from it, and the last whole checkpoint stays the newest.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ds_slm.data.rows import Rows, share
from ds_slm.engine.engine import Sums
from ds_slm.engine.row_reader import StepRows
from ds_slm.errors import CheckpointError, TrainingError
from ds_slm.files import read_json, write_json
from ds_slm.model import decoder, kernels
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe import loading
from ds_slm.train.task import Run

ROWS, WEIGHTS, WHAT = "rows.safetensors", "model.safetensors", "what.json"


def refuse_nonfinite(run: Run, sums: Sums, rows: StepRows) -> None:
    """Stop before the optimiser step if a loss is not finite."""
    if not sums.nonfinite_ranks:
        return
    control, micro_batch = run.engine.control, run.engine.engine_config.micro_batch
    row_ids = list(rows.row_ids.values())
    theirs = {
        rank: [tuple(row) for ids in share(row_ids, rank, control.world_size, micro_batch) for row in ids if row]
        for rank in sums.nonfinite_ranks
    }
    found = "; ".join(f"on rank {rank}, rows (source, epoch, row) {ids}" for rank, ids in theirs.items())
    refuse_step(run, rows, f"the loss is not finite {found}")


def refuse_lost_step(run: Run, scale: float | None, rows: StepRows) -> None:
    """Handle a step that was not applied: in fp16 try a smaller loss scale, until the smallest; otherwise stop."""
    scaler = run.engine.loss_scaler
    if scaler is None or scale is None or scale <= scaler.min_scale:
        at = "" if scale is None else f" at the smallest loss scale, {scale:g}"
        refuse_step(run, rows, f"a gradient is not finite{at}")
    run.report.say(f"step {run.state.step + 1}: overflow, loss scale now {scaler.cur_scale:g}, same rows again")


def refuse_step(run: Run, rows: StepRows, why: str) -> NoReturn:
    """Dump the step's rows and the weights they met, and stop. Collective."""
    run.checkpoints.wait()
    step = run.state.step + 1
    folder = folder_of(run.folder, step)
    problems = run.checkpoints.write_weights(folder / WEIGHTS)

    # The rows beside the weights, on every host that keeps checkpoints.
    if run.checkpoints.writes and not run.checkpoints.is_replaced and (folder / WEIGHTS).is_file():
        described = [{"position": place, "source_epoch_row": tuple(row)} for place, row in rows.row_ids.items()]
        what = {"step": step, "why": why, "rows": described}
        try:
            dump(folder, run.reader.whole(list(rows.row_ids.values())), what)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")

    for problem in problems:
        run.report.say(f"step {step} could not be dumped: {problem}")
    raise TrainingError(
        f"step {step}: {why}. The step was not taken; the last checkpoint in {run.folder} is untouched. "
        f"`ds-slm verify {run.folder} --replay {step}` looks for the layer that went wrong; "
        f"--skip-rows {min(rows.row_ids)}:{max(rows.row_ids) + 1} goes on without these rows."
    )


def folder_of(run: Path, step: int) -> Path:
    """The folder of a bad step's dump."""
    return run / "bad-steps" / f"step-{step:08d}"


def dump(folder: Path, rows: Rows, what: dict[str, Any]) -> None:
    """Write a step's rows and what happened, beside the weights they met (`Checkpoints.write_weights`)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"token_ids": rows.token_ids, "weights": rows.weights}
    if rows.document_ids is not None:
        arrays["document_ids"] = rows.document_ids
    save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, folder / ROWS)
    write_json(folder / WHAT, what)


def replay(run: Path, step: int) -> Iterator[str]:
    """Run a dumped step's rows again, one at a time on the CPU, in the recipe's precision; yields what it finds.

    Raises:
        CheckpointError: the dump does not exist.
    """
    from safetensors.torch import load_file

    folder = folder_of(run, step)
    if not (folder / WHAT).is_file():
        there = ", ".join(str(int(path.name[5:])) for path in sorted(run.glob("bad-steps/step-*"))) or "none"
        raise CheckpointError(
            f"{folder} is not there: a step whose loss or gradient is not finite leaves it. Steps found: {there}."
        )

    recipe = loading.load_recorded(run)
    model = decoder.build(recipe.model, recipe.train.seed)
    what = read_json(folder / WHAT) or {}
    try:
        rows, count = load_file(folder / ROWS), len(what["rows"])
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except Exception as error:  # safetensors' own kind
        raise CheckpointError(f"{folder} is damaged ({error!r}): remove it; the step leaves it again.") from error

    # Check the weights as they were dumped, before they are rounded to the recipe's precision.
    dtype = kernels.DTYPES[recipe.train.precision]
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
        packed = PackedDocuments(row["document_ids"]) if "document_ids" in row else None
        sums = model(ids[:, :-1], ids[:, 1:], weights, packed, z_loss)
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
