"""One launch, from checked arguments to a finished run; pretraining and fine-tuning both come through here.

    this host's inputs (inputs.py) -> connect -> agree -> find a checkpoint (continuing.py) -> train (loop.py)

Problems that one host alone can have (its data, its run folder) are gathered from all ranks and raised on all: if one
rank ended alone, the others would wait for it.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TextIO

from ds_slm.checkpoint import resume
from ds_slm.checkpoint.manager import Checkpoints
from ds_slm.checkpoint.resume import State
from ds_slm.checkpoint.saving import BackgroundSave, keepers
from ds_slm.data import skipping
from ds_slm.distributed import rendezvous
from ds_slm.distributed.problems import raise_on_all
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.stop import Interrupt
from ds_slm.engine import compile_probe, devices, micro_batch, process_group
from ds_slm.engine.engine import Engine
from ds_slm.engine.profile import Profile
from ds_slm.errors import (
    RAISED_ON_ALL_RANKS,
    ReplacedByNewerLaunch,
    UserError,
    problems_of,
)
from ds_slm.model import decoder, kernels
from ds_slm.recipe import ds_config, effects, loading
from ds_slm.recipe.schema import Recipe
from ds_slm.run import folder as run_folder
from ds_slm.run import launches, measure, records, skipped_rows
from ds_slm.run.launches import Launch
from ds_slm.run.records import Records
from ds_slm.run.report import Report, captured_output
from ds_slm.run.start_clock import StartClock
from ds_slm.train import agreement, continuing, loop, unused_flags
from ds_slm.train.choices import announce, effective_choices
from ds_slm.train.inputs import Inputs, joined_config
from ds_slm.train.task import Options, Task


def run(recipe: Recipe, options: Options, task: Task) -> None:
    """Train a recipe on the ranks of this launch.

    Raises:
        UserError: on all ranks, with every host's problems, before anything but prepared data is written.
    """
    clock, meeting = StartClock(), rendezvous.current()
    meeting.open()
    devices.accelerator()  # imports DeepSpeed
    clock.lap("imports")

    # Garbage is collected from here on, but not looked for in what was imported.
    gc.freeze()
    gc.enable()

    inputs = Inputs.checked(recipe, options, task, meeting)
    clock.lap("data")
    differing = agreement.meet(meeting, options.allow_mixed)
    with process_group.connected() as control:
        clock.lap("meeting")
        devices.share_cores(control, inputs.engine_config.deepspeed["zero_optimization"])

        # Before any rank acts on its recipe or ds_config: ranks that differ would wait for different messages.
        agreement.agree_on_inputs(control, inputs.identity, recipe, inputs.engine_config, inputs.beginning)
        if not continuing.is_finished(inputs, control):
            resume_point = continuing.resume_point(inputs, control)
            inputs = replace(inputs, engine_config=_compiled_and_batched(inputs, control))
            Launching(inputs, control, resume_point, differing, clock).run()


@dataclass(frozen=True)
class Launching:
    """A launch whose ranks are connected and agree on what they train. Its methods are collective."""

    inputs: Inputs
    control: Control
    resume_point: resume.ResumePoint | None
    differing: Mapping[str, list[str]]
    """How hosts differ, if that is allowed."""
    clock: StartClock

    def run(self) -> None:
        """Take the run folder, and train until the end or a signal. Raises ReplacedByNewerLaunch, naming the newer."""
        control, options = self.control, self.inputs.options
        log = options.run_dir / "logs" / f"rank-{control.rank:05d}.log"
        launch = launches.begin(control, options.run_dir)
        with Interrupt(control, options.grace_s) as interrupt, captured_output(log) as terminal, ExitStack() as held:
            writers = control.writers(options.run_dir)
            for line in launches.take_over(control, options.run_dir, launch, writers, held):
                print(line, file=terminal, flush=True)
            try:
                facts = self._describe(launch, writers, terminal)
                self._train(launch, writers, facts, interrupt, terminal)
            except ReplacedByNewerLaunch as replaced:
                raise ReplacedByNewerLaunch(str(launches.holder(options.run_dir))) from replaced

    def _describe(self, launch: Launch, writers: list[int], terminal: TextIO) -> dict[str, Any]:
        """Write what this launch does into every run folder, and print it; returns what env.json says of it."""
        control, inputs = self.control, self.inputs
        recipe, options, rows, corpus = inputs.recipe, inputs.options, inputs.rows, inputs.corpus
        content = self.resume_point.content if self.resume_point else {}
        recorded = skipped_rows.recorded(control, options.run_dir, content)
        steps_left = recipe.train.steps - content.get("step", 0)
        skip = skipping.resolve(options.skip_rows, recorded, rows, content.get("position", 0), steps_left)

        # The facts of this launch, for env.json.
        choices = effective_choices(recipe, options, inputs.engine_config, control)
        facts = {**launch.facts(), **choices, **self.differing, **inputs.identity}
        facts |= {"rows": rows.summary(), "skipped_rows": skip.ranges, "begins_at_step": content.get("step", 0)}
        facts |= {"replaced_sources": corpus.replaced_sources, "max_tokens": corpus.max_tokens}
        if base := inputs.base:
            facts |= {"base": base.name, "base_folder": str(base.folder.resolve())}
        facts["warnings"] = [
            *effects.warnings(recipe),
            *unused_flags.warnings(recipe, options, control.world_size, len(writers), len(rows.val_row_ids(None))),
            *rows.warnings(),
        ]
        facts["notes"] = rows.notes()

        # Describe the launch in each host's folder, unless a newer launch holds it by now.
        problems: list[str] = []
        mended, newer = None, ""
        if control.rank in writers:
            ours = recipe, inputs.engine_config.deepspeed, facts, corpus.tokenizer_folder
            try:
                with launches.claiming(options.run_dir, launch):
                    mended = run_folder.describe(options.run_dir, *ours)
            except ReplacedByNewerLaunch:
                newer = str(launches.holder(options.run_dir))
            except (UserError, OSError) as error:
                problems += problems_of(error, f"--run-dir {options.run_dir}")
        raise_on_all(control, problems)
        if any(control.gather(newer)):
            raise ReplacedByNewerLaunch

        mixed = agreement.mixed_products(control.hosts, control.gather(facts["kernels"]["products"]))
        mended = [line for lines in control.gather(mended or []) for line in lines]
        if control.rank == 0:
            said = [*dict.fromkeys(mended), *facts["warnings"], *mixed, *skip.said]
            announce(facts, options, said, terminal)
        return facts

    def _train(
        self, launch: Launch, writers: list[int], facts: dict[str, Any], interrupt: Interrupt, terminal: TextIO
    ) -> None:
        """From weights to the end of the loop."""
        control, inputs, found = self.control, self.inputs, self.resume_point
        recipe, options, task = inputs.recipe, inputs.options, inputs.task
        interrupt.mark_stopped = lambda: found is not None  # nothing was applied since

        self.clock.lap("run folder")
        engine, state = self._engine(interrupt)
        self.clock.lap("weights")
        if any(control.gather(control.rank in writers and launches.is_replaced(options.run_dir, launch))):
            raise ReplacedByNewerLaunch
        stop_at_step = options.last_step(recipe)
        report = self._report(launch, keepers(writers, recipe), state, stop_at_step, terminal)

        background = BackgroundSave(engine, options.run_dir, launch, writers, report.say)
        checkpoints = Checkpoints(background, inputs.identity)
        facts["start_s"] = self.clock.lap("records")
        report.describe(recipe.model_dump(mode="json"), loading.to_toml(recipe), facts)
        state = replace(state, skipped_rows=facts["skipped_rows"])
        if found:
            checkpoints.resume(state, found)
        run = loop.Run(
            folder=options.run_dir,
            recipe=recipe,
            engine=engine,
            rows=inputs.rows,
            report=report,
            state=state,
            checkpoints=checkpoints,
            stop_at_step=stop_at_step,
            identity=inputs.identity,
            peak_flops=measure.peak_flops(engine.device, engine.dtype),
            sample=task.sample(inputs.corpus),
            benchmarks=inputs.benchmarks,
            val_tokens_per_byte=task.val_tokens_per_byte(inputs.corpus),
            evaluate_first=inputs.base is not None,
            profile=Profile(options.profile, options.run_dir / "profile", report.say) if options.profile else None,
        )

        interrupt.mark_stopped = lambda: checkpoints.mark_stopped(run.state.step)
        if state.step < stop_at_step:
            report.say(self.clock.told(compiled=inputs.engine_config.compiled))
        with closing(report), _ending_together(control, checkpoints):
            loop.train(run)

    def _engine(self, interrupt: Interrupt) -> tuple[Engine, State]:
        """The engine, with weights set after DeepSpeed made its partitions, and the run's state."""
        recipe, base = self.inputs.recipe, self.inputs.base
        model = decoder.Decoder(recipe.model, recipe.train.gradient_checkpointing)
        engine = Engine(recipe, self.inputs.engine_config, model, self.control, interrupt)
        self.clock.lap("engine")
        if self.resume_point:
            return engine, resume.load(engine, self.resume_point)
        resume.begin(engine, base.tensors() if base else None)
        return engine, State(ledger=self.inputs.corpus.sha256)

    def _report(self, launch: Launch, keepers: list[int], state: State, stop_at_step: int, terminal: TextIO) -> Report:
        """The run's records from here on. Prints where the run goes on, and where records of repeated steps are."""
        control, options, found = self.control, self.inputs.options, self.resume_point
        says, keeps = control.rank == 0, control.rank in keepers

        kept = None
        if keeps and found and found.lost:
            kept = run_folder.keep_records(options.run_dir, launch.generation)
        given: list[int] = []
        if found:
            given = records.share(control, options.run_dir, keepers, state.step, launch.generation, source=found.source)

        own = None
        if keeps:
            own = Records(
                options.run_dir, lambda line: print(line, file=terminal), state.step, launch, control.rank in given
            )
        report = Report(terminal if says else None, own, stop_at_step, state.step)

        if found and found.lost:
            report.say(f"warning: {found.lost}" + (f"; records of what is taken again are in {kept}" if kept else ""))
        if found:
            report.say(f"resumed at step {state.step}, from {control.hosts[found.source]}")
            if given:
                report.say(f"the records so far were sent to {', '.join(control.hosts[rank] for rank in given)}")
            if state.step >= stop_at_step:
                report.say(f"--max-steps {stop_at_step}: nothing to do")
            elif options.profile and options.profile[-1] <= state.step:
                report.say("--profile has no effect: these steps were taken before")
        return report


@contextmanager
def _ending_together(control: Control, checkpoints: Checkpoints) -> Iterator[None]:
    """Let ranks wait for each other at the end, because the launcher ends all ranks once one has exited.

    A rank that fails alone does not wait.
    """
    failure = None
    try:
        yield
    except RAISED_ON_ALL_RANKS as error:
        failure = error
    control.barrier()
    checkpoints.close()
    if failure:
        raise failure


def _compiled_and_batched(inputs: Inputs, control: Control) -> ds_config.EngineConfig:
    """The configuration, after finding out whether compiling works and which micro-batch is fastest. Collective."""
    config = compile_probe.agree(inputs.engine_config, kernels.DTYPES[inputs.recipe.train.precision], control)
    kernels.fix_sums(config.deterministic and (config.compiled or devices.device_type() != "cpu"))
    if inputs.options.micro_batch == "auto":
        config = _with_fastest_micro_batch(inputs.recipe, inputs.options, config, control)
    return config


def _with_fastest_micro_batch(
    recipe: Recipe, options: Options, engine_config: ds_config.EngineConfig, control: Control
) -> ds_config.EngineConfig:
    """The configuration with the micro-batch that trains fastest. Collective."""

    def say(line: str) -> None:
        if control.rank == 0:
            print(line, flush=True)

    trial = micro_batch.Trial(recipe, engine_config, devices.current_device(), kernels.DTYPES[recipe.train.precision])
    changed = joined_config(recipe, options, control.world_size, micro_batch.choose(trial, control, say))
    return replace(changed, compiled=engine_config.compiled, eager_reason=engine_config.eager_reason)
