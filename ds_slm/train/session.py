"""One launch, from checked arguments to a finished run; pretraining and fine-tuning both come through here.

    join the configuration -> prepare data, one process a host -> connect -> agree -> model -> resume -> train

Whatever can be wrong on one host only (its data, its run folder) is gathered from all and refused on all: a rank that
left alone would keep the others waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ds_slm.errors import CheckpointError, DataError, UserError
from ds_slm.model import decoder
from ds_slm.recipe.schema import Recipe
from ds_slm.train import checkpointing, ds_config, loop, measure, run_folder
from ds_slm.train import engine as engines
from ds_slm.train.checkpointing import State
from ds_slm.train.control import Control
from ds_slm.train.report import Report, captured_output


class Corpus(Protocol):
    """Prepared data: what a session needs to know of it."""

    @property
    def sha256(self) -> str:
        """One hash of all that decides which rows are read."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's content."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer folder."""
        ...


@dataclass(frozen=True)
class Options:
    """A launch's flags, read and checked."""

    run_dir: Path
    ds_config: Path
    resume: str = "auto"
    max_steps: int | None = None
    micro_batch: int | None = None
    allow_change: bool = False


@dataclass(frozen=True)
class Task:
    """What differs between pretraining and fine-tuning."""

    prepare: Callable[[], Corpus]
    """Prepare the data on this host, or find it prepared."""
    rows: Callable[[Any], loop.RowSource]
    """Rows of the prepared data."""
    sample: Callable[[Any], Callable[[nn.Module], dict[str, str]]]
    """From prepared data to a function that continues the recipe's prompts."""
    val_tokens_per_byte: Callable[[Any], float | None]


def run(recipe: Recipe, options: Options, task: Task) -> None:
    """Train a recipe on the ranks of this launch. Raises UserError, on all ranks alike, before anything is written."""
    _, world_size, _ = engines.world_from_environment()
    device = engines.device_type()
    joined = ds_config.join(recipe, ds_config.read(options.ds_config), world_size, device, options.micro_batch)
    engines.refuse_missing_precision(recipe.train.precision)
    corpus, problems = _attempt(task.prepare)
    _, folder_problems = _attempt(
        lambda: run_folder.refuse_foreign(options.run_dir, recipe, options.resume, options.allow_change)
    )
    control = engines.connect()
    try:
        _agree(control, problems + folder_problems)
        assert corpus is not None
        _agree_on_data(control, corpus)
        if max(control.gather(run_folder.finished_step(options.run_dir))) >= recipe.train.steps:
            if control.rank == 0:
                print(f"{options.run_dir} is finished: {recipe.train.steps} steps. Nothing to do.", flush=True)
            return
        log = options.run_dir / "logs" / f"rank-{control.rank:05d}.log"
        with captured_output(log) as terminal:
            _train(recipe, options, task, joined, control, corpus, terminal)
    finally:
        engines.disconnect()


def _train(
    recipe: Recipe, options: Options, task: Task, joined: ds_config.Joined, control: Control, corpus: Any, terminal: Any
) -> None:
    report_facts = _facts(recipe, options, joined, control, corpus)
    if control.leads_host:
        run_folder.describe(options.run_dir, recipe, joined.deepspeed, report_facts)
        _copy_tokenizer(corpus.tokenizer_folder, options.run_dir / "tokenizer")
    if control.rank == 0:
        _announce(report_facts, options, terminal)
    model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing)
    engine = engines.Engine(recipe, joined, model, control)
    identity = {
        "recipe_sha256": recipe.identity_sha256(),
        "data_sha256": corpus.sha256,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }
    say = (lambda text: print(text, file=terminal, flush=True)) if control.rank == 0 else (lambda text: None)
    state = None if options.resume == "never" else checkpointing.resume(engine, options.run_dir, identity, say)
    if state is None and options.resume == "must":
        raise CheckpointError(f"--resume must: no host has a whole checkpoint in {options.run_dir}.")
    state = state or State()
    last_step = recipe.train.steps if options.max_steps is None else min(options.max_steps, recipe.train.steps)
    report = Report(options.run_dir, terminal, control.rank == 0, last_step, state.step)
    report.text("recipe", f"```toml\n{(options.run_dir / 'recipe.toml').read_text()}```" if report.active else "", 0)
    try:
        loop.train(
            loop.Run(
                folder=options.run_dir,
                recipe=recipe,
                engine=engine,
                rows=task.rows(corpus),
                report=report,
                state=state,
                stop_at_step=last_step,
                identity=identity,
                peak_flops=measure.peak_flops(engine.device, engine.dtype),
                sample=task.sample(corpus),
                val_tokens_per_byte=task.val_tokens_per_byte(corpus),
            )
        )
        control.barrier()
    finally:
        report.close()


def _attempt(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The action's result and no problems, or None and the problems it met."""
    try:
        return action(), []
    except UserError as error:
        return None, error.problems


def _agree(control: Control, problems: list[str]) -> None:
    """Raise every host's problems on every rank."""
    by_host = dict(zip(control.hosts, control.gather(problems), strict=True))
    several = len(by_host) > 1
    found = [f"{host}: {problem}" if several else problem for host, those in by_host.items() for problem in those]
    if found:
        raise UserError(found)


def _agree_on_data(control: Control, corpus: Corpus) -> None:
    hashes = control.gather(corpus.sha256)
    if len(set(hashes)) > 1:
        by_host = ", ".join(f"{host}: {sha256[:16]}" for host, sha256 in zip(control.hosts, hashes, strict=True))
        raise DataError(
            f"the hosts have different data ({by_host}): delete the data folder where it is wrong, or copy a right one."
        )


def _facts(recipe: Recipe, options: Options, joined: ds_config.Joined, control: Control, corpus: Any) -> dict[str, Any]:
    """The effective choices of this launch."""
    device = torch.device(engines.device_type())
    return {
        "generation": max(control.gather(run_folder.generation(options.run_dir))) + 1,
        "recipe": recipe.card.name,
        "device": measure.device_name(device),
        "backend": torch.distributed.get_backend(),
        "precision": recipe.train.precision,
        "kernels": decoder.effective_kernels(device, engines.DTYPES[recipe.train.precision]),
        "zero_stage": joined.deepspeed["zero_optimization"]["stage"],
        "optimizer": recipe.optimizer.name,
        "world_size": control.world_size,
        "hosts": control.hosts,
        "threads_per_rank": torch.get_num_threads(),
        "rows_per_step": recipe.rows_per_step,
        "micro_batch_rows": joined.micro_batch,
        "accumulation_steps": joined.accumulation_steps,
        "filler_rows_per_step": joined.filler_rows,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "data_sha256": corpus.sha256,
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "recipe_sha256": recipe.identity_sha256(),
    }


def _announce(facts: dict[str, Any], options: Options, terminal: Any) -> None:
    hosts, filler = ", ".join(dict.fromkeys(facts["hosts"])), facts["filler_rows_per_step"]
    lines = [
        f"{facts['recipe']} on {facts['world_size']} x {facts['device']}, hosts {hosts}",
        f"{facts['backend']}, {facts['precision']}, ZeRO-{facts['zero_stage']}, {facts['optimizer']}; "
        f"{facts['rows_per_step']} rows a step = {facts['world_size']} ranks x {facts['accumulation_steps']} forwards "
        f"x {facts['micro_batch_rows']} rows" + (f" - {filler} filler" if filler else ""),
        "; ".join(f"{what}: {kernel}" for what, kernel in facts["kernels"].items()),
        f"data {facts['data_sha256'][:16]}, recipe {facts['recipe_sha256'][:16]}, run folder {options.run_dir}, "
        f"generation {facts['generation']}",
    ]
    print("\n".join(lines), file=terminal, flush=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    import shutil

    if not target.exists():
        shutil.copytree(source, target)
