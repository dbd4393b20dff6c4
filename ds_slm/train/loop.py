"""The loop. Pretraining and fine-tuning both run it; they differ in the rows they pass in.

    rows of the step -> forward, backward -> one optimiser step -> records; now and then evaluate, save

A step is done when the optimiser has applied it. A run that stops before its recipe's last step leaves a checkpoint;
one that reaches it evaluates on all held-out rows and writes done.json.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ds_slm.checkpoint.manager import Checkpoints
from ds_slm.checkpoint.resume import State
from ds_slm.data.order import extend_ledger
from ds_slm.data.rows import share
from ds_slm.engine.engine import Engine, Sums
from ds_slm.engine.profile import Profile
from ds_slm.engine.row_reader import RowReader, RowSource, StepRows
from ds_slm.errors import Stopped, TrainingError
from ds_slm.recipe.plan import flops_per_token
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.run.measure import StepClock, peak_memory_bytes
from ds_slm.run.report import Report
from ds_slm.train import guard


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
    checkpoints: Checkpoints
    identity: dict[str, Any]
    """Hashes of recipe, data and tokenizer: stored in every checkpoint."""
    peak_flops: float | None
    """Of one device."""
    sample: Callable[[nn.Module], dict[str, str]]
    """Prompt -> continuation, called on every rank at each evaluation."""
    val_tokens_per_byte: float | None = None
    evaluate_first: bool = False
    """Whether to evaluate before the first step."""
    val_loss: float = math.inf
    """Of the last evaluation."""
    profile: Profile | None = None
    spikes: guard.Spikes = field(default_factory=guard.Spikes)
    reader: RowReader = field(init=False)

    def __post_init__(self) -> None:
        engine, on_gpu = self.engine, self.engine.device.type == "cuda"
        self.reader = RowReader(self.rows, engine.control, engine.engine_config, self.state.skipped_rows, on_gpu)


def train(run: Run) -> None:
    """Train until the recipe's last step, or `stop_at_step`.

    Raises Stopped where a signal ended it, once the last applied step is saved, and ReplacedByNewerLaunch where a newer
    launch writes into the run folder.
    """
    try:
        train_on(run)
    except Stopped as stopped:
        save_before_exit(run)
        run.checkpoints.mark_stopped(run.state.step)
        raise Stopped(f"step {run.state.step} is saved; the same command goes on from there.") from stopped
    finally:
        run.reader.close()


def train_on(run: Run) -> None:
    """Step after step, with an evaluation or a save now and then."""
    last_step = run.recipe.train.steps
    if run.evaluate_first and run.state.step == 0:
        evaluate(run)
    if 0 < run.state.step < last_step:
        after_step(run)  # what a signal kept from being done

    while run.state.step < run.stop_at_step:
        with run.profile.step(run.state.step + 1, run.engine, run.reader) if run.profile else nullcontext():
            take_step(run)
        if run.state.step < last_step:
            after_step(run)

    if run.profile:
        run.profile.finish(run.engine.control.rank)
    if run.state.step >= last_step:
        finish(run)
    save_before_exit(run)


def after_step(run: Run) -> None:
    """Evaluate and save where it is time to, and save where a signal asks for it."""
    step, every = run.state.step, run.recipe.run
    if step % every.eval_every_steps == 0 and run.state.evaluated_step != step:
        evaluate(run)
    if (step % every.save_every_steps == 0 or run.engine.interrupt.save_requested) and not is_saved(run):
        save(run)


def is_saved(run: Run) -> bool:
    """Whether the newest checkpoint holds the last applied step."""
    return run.checkpoints.is_saved(run.state)


def save_before_exit(run: Run) -> None:
    """Do not leave before the last applied step is saved. Raises TrainingError where it cannot be."""
    run.checkpoints.wait()
    for _ in range(2):  # a disk may have been full for a moment
        if not is_saved(run):
            save(run)
            run.checkpoints.wait()
    if not is_saved(run):
        raise TrainingError(f"step {run.state.step} could not be saved; earlier checkpoints in {run.folder} are whole.")


def take_step(run: Run) -> None:
    """One optimiser step; an fp16 overflow lowers the loss scale and takes the same rows again."""
    engine, state, clock = run.engine, run.state, StepClock()
    if run.checkpoints.is_replaced:
        engine.interrupt.note_replaced()

    # Which rows: a pure function of the position. Every rank has read its share of them.
    rows = run.reader.of_step(state.position, another_follows=state.step + 1 < run.stop_at_step)
    totals = engine.agree(rows.share)
    rate, scaler = learning_rate(run.recipe, state.step), engine.loss_scaler

    # Forward and backward, until an optimiser step is applied.
    while True:
        scale = scaler.cur_scale if scaler else None
        sums = engine.forward_backward(rows.share.micro_batches, totals)
        refuse_nonfinite(run, sums, rows)
        if engine.step(rate):
            break
        refuse_lost_step(run, scale, rows)

    ledger = extend_ledger(state.ledger, rows.rows.values())
    run.state = state.after(rows.next_position, int(sums.count), ledger)
    engine.synchronise()
    record_step(run, sums, rate, clock.elapsed_s(), rows.contents)


def refuse_nonfinite(run: Run, sums: Sums, rows: StepRows) -> None:
    """Stop before the optimiser step where a loss is not finite."""
    if not sums.nonfinite_ranks:
        return
    control, micro_batch, row_ids = run.engine.control, run.engine.engine_config.micro_batch, list(rows.rows.values())
    theirs = {
        rank: [tuple(row) for ids in share(row_ids, rank, control.world_size, micro_batch) for row in ids if row]
        for rank in sums.nonfinite_ranks
    }
    found = "; ".join(f"on rank {rank}, rows (source, epoch, row) {ids}" for rank, ids in theirs.items())
    refuse(run, rows, f"the loss is not finite {found}")


def refuse_lost_step(run: Run, scale: float | None, rows: StepRows) -> None:
    """A step that was not applied: normal in fp16 until the smallest scale was tried, the end in other precisions."""
    scaler = run.engine.loss_scaler
    if scaler is None or scale is None or scale <= scaler.min_scale:
        at = "" if scale is None else f" at the smallest loss scale, {scale:g}"
        refuse(run, rows, f"a gradient is not finite{at}")
    run.report.say(f"step {run.state.step + 1}: overflow, loss scale now {scaler.cur_scale:g}, same rows again")


def refuse(run: Run, rows: StepRows, why: str) -> NoReturn:
    """Dump the step's rows and the weights they met, and stop. Collective."""
    run.checkpoints.wait()
    step = run.state.step + 1
    folder = guard.folder_of(run.folder, step)
    problems = run.checkpoints.write_weights(folder / guard.WEIGHTS)
    if run.checkpoints.writes and not run.checkpoints.is_replaced and (folder / guard.WEIGHTS).is_file():
        described = [{"position": place, "source_epoch_row": tuple(row)} for place, row in rows.rows.items()]
        what = {"step": step, "why": why, "rows": described}
        try:
            guard.dump(folder, run.reader.whole(list(rows.rows.values())), what)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    for problem in problems:
        run.report.say(f"step {step} could not be dumped: {problem}")
    raise TrainingError(
        f"step {step}: {why}. The step was not taken; the last checkpoint in {run.folder} is untouched. "
        f"`ds-slm verify {run.folder} --replay {step}` looks for the layer that went wrong; "
        f"--skip-rows {min(rows.rows)}:{max(rows.rows) + 1} goes on without these rows."
    )


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
        "loss_spike": run.spikes.excess(sums.loss),
        **contents,
        "ledger": state.ledger,
    }

    if values["loss_spike"]:
        run.report.say(f"step {state.step}: loss spike: {sums.loss:.4f}, {values['loss_spike']:.4f} over the median")
    run.report.record("train", state.step, values, log=state.step % recipe.run.log_every_steps == 0)


def evaluate(run: Run) -> None:
    """Loss on some held-out rows, always the same ones, and a sampled continuation of each prompt."""
    values = held_out(run, run.recipe.run.eval_rows)
    run.report.record("val", run.state.step, values)
    with run.engine.eager() as model:
        continuations = run.sample(model)
    for prompt, continuation in continuations.items():
        run.report.text(f"samples/{prompt}", continuation, run.state.step)
    run.state, run.val_loss = replace(run.state, evaluated_step=run.state.step), values["loss"]


def held_out(run: Run, limit: int | None) -> dict[str, float]:
    """Loss, perplexity and bits per byte of `limit` held-out rows, or of all."""
    values: dict[str, float] = {"tokens": run.state.tokens}
    for prefix, split in run.rows.measures.items():
        share = run.reader.held_out(limit, split)
        loss = run.engine.evaluate(share.micro_batches, run.engine.agree(share)).loss
        values |= {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0))}
    if run.val_tokens_per_byte:
        values["bits_per_byte"] = values["loss"] / math.log(2) * run.val_tokens_per_byte
    return values


def save(run: Run) -> None:
    """Save a checkpoint; an evaluation at this very step decides whether it is the best."""
    clock = StepClock()
    val_loss = run.val_loss if run.state.evaluated_step == run.state.step else None
    run.checkpoints.save(run.state, val_loss)
    run.engine.interrupt.saved()
    run.report.record("save", run.state.step, {"wait_s": clock.elapsed_s()})


def finish(run: Run) -> None:
    """Evaluate, save, and write the loss on all held-out rows into done.json on every host that keeps checkpoints."""
    if run.state.evaluated_step != run.state.step:
        evaluate(run)
    save_before_exit(run)
    values = held_out(run, limit=None)
    run.report.record("eval", run.state.step, values)
    done = {"step": run.state.step, **run.identity}
    done |= {f"val_{key}" if key != "tokens" else key: value for key, value in values.items()}
    run.checkpoints.write_done(run.state.step, done)
