"""The loop. Pretraining and fine-tuning both run it; they differ in the rows they pass in.

    rows of the step -> forward, backward -> one optimiser step -> records; now and then evaluate, save

A step is done when the optimiser has applied it. A run that stops before its recipe's last step leaves a checkpoint;
one that reaches it evaluates on all held-out rows and writes done.json.

What a `Run` (train/task.py) holds:

    run.reader       this rank's rows of a step, read in a thread while the step before trains (engine/row_reader.py)
    run.engine       DeepSpeed, and what all ranks agree on (engine/engine.py)
    run.checkpoints  saves in a thread while training goes on: all ranks send to the writers, the first rank of each of
                     the first `checkpoint_copies` hosts; durable after `wait`, not after `save` (checkpoint/saving.py)
    run.report       a record -> metrics.jsonl, TensorBoard and the terminal; log=False leaves out only the terminal
    run.state        position, step, tokens, ledger: all that a checkpoint holds except tensors (checkpoint/resume.py)
    run.spikes, run.profile     the median loss of the last steps; where the time goes (--profile)
"""

from collections.abc import Mapping
from contextlib import nullcontext

from ds_slm import pulse
from ds_slm.data.order import extend_ledger
from ds_slm.engine.engine import Sums
from ds_slm.errors import Stopped, TrainingError
from ds_slm.recipe.schedule import learning_rate
from ds_slm.run.measure import StepClock, peak_memory_bytes
from ds_slm.train import guard
from ds_slm.train.evaluate import evaluate, held_out, score_benchmarks
from ds_slm.train.task import Run


def train(run: Run) -> None:
    """Train until the recipe's last step, or `stop_at_step`.

    Raises Stopped if a signal ended it, once the last applied step is saved, and ReplacedByNewerLaunch if a newer
    launch writes into the run folder.
    """
    try:
        run_steps(run)
    except Stopped as stopped:
        save_before_exit(run)
        run.checkpoints.mark_stopped(run.state.step)
        raise Stopped(f"step {run.state.step} is saved; the same command goes on from there.") from stopped
    finally:
        run.reader.close()


def run_steps(run: Run) -> None:
    """One step after another, with an evaluation or a save now and then."""
    last_step = run.recipe.train.steps
    if run.evaluate_first and run.state.step == 0:
        evaluate(run)

    # An evaluation or a save may have been due at the step of a resumed run, which ended before it.
    if 0 < run.state.step < last_step:
        after_step(run)

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
    if run.state.step < last_step:
        run.report.say(f"step {run.state.step} of {last_step} is saved: the same command without --max-steps goes on")


def after_step(run: Run) -> None:
    """Evaluate and save if they are due, and save if a signal asks for it."""
    step, every = run.state.step, run.recipe.run
    if step % every.eval_every_steps == 0 and run.state.evaluated_step != step:
        evaluate(run)
    if (step % every.save_every_steps == 0 or run.engine.interrupt.save_requested) and not is_saved(run):
        save(run)
    if run.recipe.eval.every_steps and step % run.recipe.eval.every_steps == 0:
        score_benchmarks(run)  # after the save: it may take long


def is_saved(run: Run) -> bool:
    """Whether the last applied step is in the newest checkpoint, or in the one that is being saved.

    After `run.checkpoints.wait` no save is in flight, and one that failed does not count.
    """
    return run.checkpoints.is_saved(run.state)


def save_before_exit(run: Run) -> None:
    """Make sure that the last applied step is saved. Raises TrainingError if it cannot be saved."""
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

    # A newer launch holds the run folder: the next vote ends this one, on all ranks.
    if run.report.is_replaced():
        engine.interrupt.note_replaced()

    # Which rows: a pure function of the position. Every rank has read its share of them.
    step_rows = run.reader.of_step(state.position, another_follows=state.step + 1 < run.stop_at_step)
    totals = engine.agree(step_rows.share)
    rate, scaler = learning_rate(run.recipe, state.step), engine.loss_scaler
    every = run.recipe.run.layers_every_steps
    show_layers = every is not None and (state.step + 1) % every == 0

    # Forward and backward, until an optimiser step is applied.
    while True:
        loss_scale = scaler.cur_scale if scaler else None
        sums = engine.forward_backward(step_rows.share.micro_batches, totals, run.reader.following)
        guard.refuse_nonfinite(run, sums, step_rows)
        if engine.step(rate, show_layers):
            break
        guard.refuse_lost_step(run, loss_scale, step_rows)

    ledger = extend_ledger(state.ledger, step_rows.ledger_text)
    run.state = state.after(step_rows.next_position, int(sums.count), ledger)
    pulse.beat(run.state.step)
    record_step(run, sums, rate, clock, step_rows.contents)
    if show_layers:
        run.report.record("layers", run.state.step, engine.layer_norms())


def record_step(run: Run, sums: Sums, rate: float, clock: StepClock, contents: Mapping[str, int]) -> None:
    """Record an applied step, on ranks that keep or print records."""
    if not run.report.is_heard:
        return
    recipe, state = run.recipe, run.state

    # The norm is known once the device has taken the step: only then read the clock.
    grad_norm = run.engine.grad_norm
    step_s = clock.elapsed_s()

    # Fine-tuning counts its real tokens, all but padding; only the answers among them are targets.
    tokens_per_s = contents.get("real", sums.count) / step_s
    flops_per_s = tokens_per_s * run.flops_per_token
    peak = run.peak_flops and run.peak_flops * run.engine.control.world_size
    scaler = run.engine.loss_scaler

    values = {
        "tokens": state.tokens,
        "loss": sums.loss,
        "z_loss": recipe.train.z_loss * sums.mean_z2,
        "lr": rate,
        "grad_norm": grad_norm,
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


def save(run: Run) -> None:
    """Save a checkpoint; an evaluation at this very step decides whether it is the best."""
    clock = StepClock()
    val_loss = run.val_loss if run.state.evaluated_step == run.state.step else None  # `evaluate` set both
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
    score_benchmarks(run)
    done = {"step": run.state.step, **run.identity}
    done |= {f"val_{key}" if key != "tokens" else key: value for key, value in values.items()}
    run.checkpoints.write_done(run.state.step, done)
