"""Held-out losses of a run, continuations of its recipe's prompts, and benchmarks."""

import math
from dataclasses import replace

from ds_slm import pulse
from ds_slm.train.task import Run


def evaluate(run: Run) -> None:
    """Loss on some held-out rows, always the same ones, and a sampled continuation of each prompt."""
    values = held_out(run, run.recipe.run.eval_rows)
    run.report.record("val", run.state.step, values)
    with run.engine.eager() as model:
        continuations = run.sample(model)
    if continuations:
        run.report.record("samples", run.state.step, {"continuations": continuations})
    run.state, run.val_loss = replace(run.state, evaluated_step=run.state.step), values["loss"]


def score_benchmarks(run: Run) -> None:
    """The figures of the recipe's `[eval]` tasks."""
    control, interrupt = run.engine.control, run.engine.interrupt
    if run.benchmarks is None:
        return

    # A resumed run may have been scored at this step already. Only rank 0 knows.
    if control.broadcast(run.report.was_recorded("benchmarks", run.state.step), 0):
        return

    def look_up() -> None:
        interrupt.start_vote().wait()
        pulse.beat()

    with run.engine.eager() as model:
        # Only rank 0 has the figures; every host that keeps records needs them.
        figures, problem = control.broadcast(run.benchmarks(model, control, look_up), 0)
    if problem:
        run.report.say(f"warning: step {run.state.step}: the benchmarks were not scored: {problem}")
    else:
        run.report.record("benchmarks", run.state.step, figures)


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
