"""The loop. Pretraining and fine-tuning both run it; they differ in the rows they pass in.

    rows of the step -> forward, backward -> one optimiser step -> records; now and then evaluate, save

A step is done when the optimiser has applied it. A run that stops before its recipe's last step leaves a checkpoint;
one that reaches it evaluates on all held-out rows and writes done.json.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ds_slm.checkpoint import format as checkpoint_format
from ds_slm.data.order import RowId, extend_ledger
from ds_slm.data.rows import Rows, Split, share
from ds_slm.errors import DataError, TrainingError
from ds_slm.files import write_json
from ds_slm.recipe.plan import flops_per_token
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.train import checkpointing
from ds_slm.train.checkpointing import State
from ds_slm.train.engine import Engine, Sums
from ds_slm.train.measure import StepClock, peak_memory_bytes
from ds_slm.train.profile import Profile
from ds_slm.train.report import Report


class RowSource(Protocol):
    """Where rows come from; the same protocol for pretraining and fine-tuning."""

    def row_ids(self, position: int) -> list[RowId]:
        """Rows of the step that begins at a global position."""
        ...

    def next_position(self, position: int) -> int:
        """Where the next step begins."""
        ...

    def val_row_ids(self, limit: int | None) -> list[RowId]:
        """Held-out rows: always the same `limit` ones, or all."""
        ...

    def read(self, row_ids: Sequence[RowId | None], split: Split = "train") -> Rows:
        """The rows themselves; None is a filler row of weight 0."""
        ...

    def warnings(self) -> list[str]:
        """What a user may not expect of these rows, a line each."""
        ...

    def summary(self) -> dict[str, Any]:
        """What all the rows hold, for env.json."""
        ...

    def describe(self, row_ids: Sequence[RowId]) -> dict[str, int]:
        """What a step's rows hold, for its record."""
        ...

    @property
    def measures(self) -> Mapping[str, Split]:
        """Ways of counting the held-out loss: the prefix of a value's name -> what `read` calls it."""
        ...


@dataclass
class Run:
    """All that the loop needs."""

    folder: Path
    recipe: Recipe
    engine: Engine
    rows: RowSource
    report: Report
    state: State
    stop_at_step: int
    writers: list[int]
    """Ranks with a run folder of their own, in the order in which they keep checkpoints."""
    identity: dict[str, Any]
    """Hashes of recipe, data and tokenizer: stored in every checkpoint."""
    peak_flops: float | None
    """Of one device."""
    sample: Callable[[nn.Module], dict[str, str]]
    """Prompt -> continuation, called on every rank at each evaluation."""
    val_tokens_per_byte: float | None = None
    evaluate_first: bool = False
    """Whether to evaluate before the first step."""
    saved_at_step: int = -1
    evaluated_at_step: int = -1
    val_loss: float = math.inf
    """Of the last evaluation."""
    profile: Profile | None = None


def train(run: Run) -> None:
    """Train until the recipe's last step, or `stop_at_step`."""
    every, last_step = run.recipe.run, run.recipe.train.steps
    if run.evaluate_first and run.state.step == 0:
        evaluate(run)
    while run.state.step < run.stop_at_step:
        with run.profile.step(run.state.step + 1, run.engine, run.rows) if run.profile else nullcontext():
            take_step(run)
        step = run.state.step
        if step < last_step and step % every.eval_every_steps == 0:
            evaluate(run)
        if step < last_step and step % every.save_every_steps == 0:
            save(run)
    if run.profile:
        run.profile.finish(run.engine.control.rank)
    if run.state.step >= last_step:
        finish(run)
    elif run.saved_at_step != run.state.step:
        save(run)


def take_step(run: Run) -> None:
    """One optimiser step; an fp16 overflow lowers the loss scale and takes the same rows again."""
    engine, state, clock = run.engine, run.state, StepClock()
    row_ids = run.rows.row_ids(state.position)
    micro_batches = read_share(run, row_ids, "train", engine.joined.accumulation_steps)
    rate, scaler = learning_rate(run.recipe, state.step), engine.loss_scaler
    while True:
        scale = scaler.cur_scale if scaler else None
        sums = engine.forward_backward(micro_batches)
        refuse_nonfinite(run, sums, row_ids)
        if engine.step(rate):
            break
        refuse_lost_step(run, scale)
    run.state = state.after(
        run.rows.next_position(state.position), int(sums.count), extend_ledger(state.ledger, row_ids)
    )
    record_step(run, sums, rate, clock.elapsed_s(), run.rows.describe(row_ids))


def read_share(run: Run, row_ids: list[RowId], split: Split, count: int = 0) -> list[Rows]:
    """This rank's micro-batches of some rows, filled up to `count`. A row that cannot be read stops every rank."""
    control, problems, micro_batches = run.engine.control, [], []
    shares = share(row_ids, control.rank, control.world_size, run.engine.joined.micro_batch)
    shares += [[None] * len(shares[0])] * (count - len(shares))  # a short last step
    try:
        micro_batches = [run.rows.read(ids, split) for ids in shares]
    except DataError as error:
        problems = error.problems
    run.engine.agree(problems)
    return micro_batches


def refuse_nonfinite(run: Run, sums: Sums, row_ids: list[RowId]) -> None:
    """Stop before the optimiser step where a loss is not finite."""
    if not sums.nonfinite_ranks:
        return
    control, micro_batch = run.engine.control, run.engine.joined.micro_batch
    rows = {
        rank: [tuple(row) for ids in share(row_ids, rank, control.world_size, micro_batch) for row in ids if row]
        for rank in sums.nonfinite_ranks
    }
    found = "; ".join(f"on rank {rank}, rows (source, epoch, row) {ids}" for rank, ids in rows.items())
    raise TrainingError(
        f"step {run.state.step + 1}: the loss is not finite {found}. The step was not taken; "
        f"the last checkpoint in {run.folder} is untouched."
    )


def refuse_lost_step(run: Run, scale: float | None) -> None:
    """A step that was not applied: normal in fp16 until the smallest scale was tried, the end in other precisions."""
    scaler = run.engine.loss_scaler
    if scaler is None or scale is None or scale <= scaler.min_scale:
        at = "" if scale is None else f" at the smallest loss scale, {scale:g}"
        raise TrainingError(
            f"step {run.state.step + 1}: a gradient is not finite{at}. The step was not taken; "
            f"the last checkpoint in {run.folder} is untouched."
        )
    run.report.say(f"step {run.state.step + 1}: overflow, loss scale now {scaler.cur_scale:g}, same rows again")


def record_step(run: Run, sums: Sums, rate: float, step_s: float, contents: Mapping[str, int]) -> None:
    """The record of an applied step."""
    recipe, state = run.recipe, run.state
    tokens_per_s = contents.get("real", sums.count) / step_s  # targets alone are fewer where prompts are masked
    flops_per_s = tokens_per_s * flops_per_token(recipe.model, recipe.data.seq_len)
    peak = run.peak_flops and run.peak_flops * run.engine.control.world_size
    scaler = run.engine.loss_scaler
    values = {
        "tokens": state.tokens,
        "loss": sums.loss,
        "z_loss": recipe.train.z_loss * sums.mean_z2,
        "lr": rate,
        "grad_norm": run.engine.grad_norm,
        "tokens_per_s": tokens_per_s,
        "mfu": flops_per_s / peak if peak else None,
        "step_s": step_s,
        "peak_memory_gb": peak_memory_bytes(run.engine.device) / 1e9,
        "loss_scale": scaler.cur_scale if scaler else None,
        **contents,
        "ledger": state.ledger,
    }
    run.report.record("train", state.step, values, log=state.step % recipe.run.log_every_steps == 0)


def evaluate(run: Run) -> None:
    """Loss on some held-out rows, always the same ones, and a sampled continuation of each prompt."""
    values = held_out(run, run.recipe.run.eval_rows)
    run.report.record("val", run.state.step, values)
    with run.engine.eager() as model:
        continuations = run.sample(model)
    for prompt, continuation in continuations.items():
        run.report.text(f"samples/{prompt}", continuation, run.state.step)
    run.evaluated_at_step, run.val_loss = run.state.step, values["loss"]


def held_out(run: Run, limit: int | None) -> dict[str, float]:
    """Loss, perplexity and bits per byte of `limit` held-out rows, or of all."""
    values: dict[str, float] = {"tokens": run.state.tokens}
    for prefix, split in run.rows.measures.items():
        loss = run.engine.evaluate(read_share(run, run.rows.val_row_ids(limit), split)).loss
        values |= {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0))}
    if run.val_tokens_per_byte:
        values["bits_per_byte"] = values["loss"] / math.log(2) * run.val_tokens_per_byte
    return values


def save(run: Run) -> str | None:
    """Save a checkpoint; `best` is the saved one whose evaluation, at this very step, was the lowest."""
    best = math.inf if run.state.best_val_loss is None else run.state.best_val_loss
    is_best = run.evaluated_at_step == run.state.step and run.val_loss < best
    if is_best:
        run.state = replace(run.state, best_val_loss=run.val_loss)
    name = checkpointing.save(run.engine, run.folder, run.writers, run.state, run.identity, is_best)
    run.saved_at_step = run.state.step
    run.report.say(f"step {run.state.step}: saved {name}")
    return name


def finish(run: Run) -> None:
    """Evaluate, save, and write the loss on all held-out rows into done.json on every host that keeps checkpoints."""
    evaluate(run)
    name = save(run)
    values = held_out(run, limit=None)
    run.report.record("eval", run.state.step, values)
    if name is None:
        return
    checkpoint = checkpoint_format.checkpoints_folder(run.folder) / name
    done = {
        "step": run.state.step,
        **{f"val_{key}" if key != "tokens" else key: value for key, value in values.items()},
        "checkpoint": name,
        "checkpoint_sha256": checkpoint_format.manifest_sha256(checkpoint),
        **run.identity,
    }
    write_json(run.folder / "done.json", done)
