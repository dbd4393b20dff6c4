"""Launched by DeepSpeed in tests: several trainings of one recipe in one process group, each a case of its own.

    deepspeed cases.py --recipe R --out DIR CASE...      CASE = NAME:key=value,key=value,...

Keys: zero (stage, or the rest of a ds_configs file's name), ds (a key of that file, repeatable as
ds=zero_optimization.overlap_comm:true, its value in JSON), max_steps, micro_batch, set (recipe override, repeatable as
set=a.b=c), broken (a deliberate mistake to be found by the tests), kill_at (SIGKILL of this rank after that step),
poison_at (the last rank's weights turn into NaN after that step), burst_at (its gradients become infinite),
supersede_at (a newer launch takes the run folder), scale_power (fp16's first loss scale), compiled (blocks and loss,
however short the run), signal_at (STEP.PHASE.NAME: the last rank gets that signal in that phase, the first time it
comes up after that step), grace (seconds), resave (what was loaded is saved into that folder, and nothing trained).
base (a case of before, whose newest checkpoint gives the weights to begin with), unchecked (the ZeRO keys are).
One launch costs many seconds of imports; a case costs few.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)

from ds_slm.checkpoint import saving  # noqa: E402
from ds_slm.data.rows import PretrainRows  # noqa: E402
from ds_slm.data.shards.prepare import prepare  # noqa: E402
from ds_slm.distributed import rendezvous  # noqa: E402
from ds_slm.distributed.ranks import Control  # noqa: E402
from ds_slm.engine import engine, process_group  # noqa: E402
from ds_slm.engine.row_reader import Share  # noqa: E402
from ds_slm.files import write_json  # noqa: E402
from ds_slm.publish.generate import sampler  # noqa: E402
from ds_slm.publish.models import open_model  # noqa: E402
from ds_slm.recipe import ds_config, loading, zero_keys  # noqa: E402
from ds_slm.recipe.schema import Recipe  # noqa: E402
from ds_slm.train import launch, loop  # noqa: E402
from ds_slm.train.task import Options, Task  # noqa: E402

AGREE = engine.Engine.agree


def task(recipe: Recipe, name: str, data_root: Path) -> Task:
    """Pretraining on prepared shards, as ds_slm/pretrain.py sets it up."""
    return Task(
        prepare=lambda: prepare(recipe, data_root / name, report=lambda line: None),
        rows=lambda corpus: PretrainRows(recipe, corpus),
        sample=lambda corpus: sampler(corpus.tokenizer_folder, recipe.eval.prompts, max_new_tokens=4),
        val_tokens_per_byte=lambda corpus: corpus.val_tokens / corpus.val_bytes,
    )


def mean_of_means(self: engine.Engine, own: Share) -> engine.Totals:
    """The classic mistake: every rank divides by its own share of the step, as if all shares were equal."""
    agreed, world_size = AGREE(self, own), self.control.world_size
    weight = world_size * sum(float(rows.weights.sum()) for rows in own.micro_batches)
    return replace(agreed, weight=weight, count=weight)  # the tiny recipe's weights are 0 and 1


def run_case(recipe_path: Path, out: Path, name: str, settings: list[str]) -> None:
    """Train one case into out/NAME."""
    pairs = [setting.split("=", 1) for setting in settings]
    single = {key: value for key, value in pairs if key not in ("set", "ds")}
    # Of several overrides of one field the last counts: a case differs from what it shares with others.
    overrides = {value.partition("=")[0]: value for key, value in pairs if key == "set"}
    recipe = loading.load(str(recipe_path), list(overrides.values()))
    originals = engine.Engine.agree, loop.record_step, ds_config._deepspeed, ds_config.COMPILE_FLOPS
    run_steps, zero_problems = loop.run_steps, zero_keys.problems
    if "unchecked" in single:
        zero_keys.problems = lambda zero: []
    if "compiled" in single:
        ds_config.COMPILE_FLOPS = {"cpu": 0.0, "cuda": 0.0}
    if single.get("broken") == "mean_of_means":
        engine.Engine.agree = mean_of_means
    if "kill_at" in single:
        loop.record_step = after_step(int(single["kill_at"]), die)
    if "poison_at" in single:
        loop.record_step = after_step(int(single["poison_at"]), poison)
    if "burst_at" in single:
        loop.record_step = after_step(int(single["burst_at"]), burst)
    if "supersede_at" in single:
        loop.record_step = after_step(int(single["supersede_at"]), supersede)
    if "resave" in single:
        loop.run_steps = resave_into(out / single["resave"])
    if "scale_power" in single:
        ds_config._deepspeed = scaled(int(single["scale_power"]))
    undo = signal_in_phase(*single["signal_at"].split(".")) if "signal_at" in single else lambda: None
    options = Options(
        recipe_name=recipe_path.stem,
        grace_s=float(single.get("grace", 25)),
        run_dir=out / name,
        ds_config=ds_config_of(
            single.get("zero", "1"), [value for key, value in pairs if key == "ds"], out / f"{name}.json"
        ),
        max_steps=int(single["max_steps"]) if "max_steps" in single else None,
        micro_batch=int(single.get("micro_batch", 2)),
    )
    try:
        pretraining = task(recipe, recipe_path.stem, recipe_path.parent / "data")
        if "base" in single:
            pretraining = replace(pretraining, base=lambda: open_model(out / single["base"]))
        launch.run(recipe, options, pretraining)
    finally:
        undo()
        loop.run_steps, zero_keys.problems = run_steps, zero_problems
        (
            engine.Engine.agree,
            loop.record_step,
            ds_config._deepspeed,
            ds_config.COMPILE_FLOPS,
        ) = originals


def ds_config_of(zero: str, changes: list[str], path: Path) -> Path:
    """A file of the checkout; with other keys, a copy at `path`."""
    original = ROOT / "ds_configs" / f"zero{zero}.json"
    if not changes:
        return original
    content = json.loads(original.read_text())
    for place, value in (change.split(":", 1) for change in changes):
        *sections, key = place.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = json.loads(value)
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)  # every rank does
    return path


def after_step(step: int, action: Callable[[loop.Run], None]) -> Callable[..., None]:
    """A record_step that does something more once `step` is recorded."""
    original = loop.record_step

    def record_step(run: loop.Run, *rest: object) -> None:
        original(run, *rest)
        if run.state.step == step:
            action(run)

    return record_step


def die(run: loop.Run) -> None:
    """SIGKILL, once what was saved before is durable."""
    run.checkpoints.wait()
    os.kill(os.getpid(), signal.SIGKILL)


PHASES = {
    "start": (engine.Engine, "__init__"),
    "data": (PretrainRows, "read"),
    "forward": (engine.Engine, "_on_device"),
    "optimiser": (engine.Engine, "step"),
    "evaluation": (engine.Engine, "evaluate"),
    "saving": (saving.BackgroundSave, "_write"),
}
"""Phase -> the function in which the signal arrives."""


def signal_in_phase(step: str, phase: str, name: str) -> Callable[[], None]:
    """Let the last rank get a signal as the function of a phase begins; returns what undoes it."""
    owner, attribute = PHASES[phase]
    original, steps = getattr(owner, attribute), {"taken": 0, "sent": False}
    recorded = loop.record_step

    def record_step(run: loop.Run, *rest: object) -> None:
        recorded(run, *rest)
        steps["taken"] = run.state.step

    def function(*arguments: object, **named: object) -> object:
        if steps["taken"] >= int(step) and not steps["sent"] and is_last_rank():
            steps["sent"] = True
            os.kill(os.getpid(), getattr(signal, name))
            while isinstance(arguments[0], engine.Engine) and phase != "start" and not arguments[0].interrupt.request:
                time.sleep(0.001)  # until the thread that listens has noted it
        return original(*arguments, **named)

    def undo() -> None:
        setattr(owner, attribute, original)
        loop.record_step = recorded

    loop.record_step = record_step
    setattr(owner, attribute, function)
    return undo


def is_last_rank() -> bool:
    return os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)


def poison(run: loop.Run) -> None:
    """NaN in the last rank's copy of a weight."""
    if run.engine.control.rank == run.engine.control.world_size - 1:
        run.engine.deepspeed.module.model.norm.weight.data[0] = float("nan")


def supersede(run: loop.Run) -> None:
    """What a newer launch writes first, once the save that is in flight has ended."""
    run.checkpoints.wait()
    if run.engine.control.rank == 0:
        environment = json.loads((run.folder / "env.json").read_text())
        (run.folder / "env.json").write_text(json.dumps({**environment, "generation": environment["generation"] + 1}))


def resave_into(folder: Path) -> Callable[[loop.Run], None]:
    """Instead of training: save what was loaded into another folder, as it is."""

    def run_steps(run: loop.Run) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "env.json").write_text((run.folder / "env.json").read_text())
        run.checkpoints._background.run = folder
        run.checkpoints.save(run.state, None)
        saved = run.checkpoints.wait()
        assert saved and saved.durable and not saved.failed

    return run_steps


def burst(run: loop.Run) -> None:
    """From now on the last rank's gradient of a weight is infinite, its loss is not."""
    if is_last_rank():
        run.engine.deepspeed.module.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))


def scaled(power: int):
    """DeepSpeed's dictionary with another first loss scale."""
    original = ds_config._deepspeed

    def deepspeed(*arguments: object) -> dict:
        config = original(*arguments)
        config["fp16"]["initial_scale_power"] = power
        return config

    return deepspeed


def main() -> None:
    """Run all cases in one process group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--allow-fp16", action="store_true", help="let DeepSpeed run fp16 on a CPU without fp16 products"
    )
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    if args.allow_fp16:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    connected: list = []

    def connect_once() -> Control:
        connected.append(connect() if not connected else connected[0])
        return connected[0]

    connect, process_group.connect = process_group.connect, connect_once
    disconnect, process_group.disconnect = process_group.disconnect, lambda control: None
    for case in args.cases:
        name, _, settings = case.partition(":")
        run_case(args.recipe, args.out, name, [setting for setting in settings.split(",") if setting])
    disconnect(connected[0])


if __name__ == "__main__":
    sys.exit(rendezvous.run_rank(main))
