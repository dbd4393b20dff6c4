"""A real engine in the test's own process: one rank, a tiny model, no launcher."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_slm.checkpoint.resume import State
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepare import prepare
from ds_slm.distributed import rendezvous, world
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.stop import Interrupt
from ds_slm.engine import engine as engines
from ds_slm.engine.process_group import connected
from ds_slm.model import decoder
from ds_slm.recipe import ds_config, loading
from ds_slm.train import loop
from tests.support import runs


@contextmanager
def process_group() -> Iterator[Control]:
    """A process group of this process alone: DeepSpeed allows one in a process's life."""
    before, meeting = dict(os.environ), rendezvous._current
    os.environ.pop("RANK", None)
    rendezvous._current = rendezvous.Rendezvous(world.read(), rendezvous.INTERVALS)
    try:
        with connected() as control:
            yield control
    finally:
        rendezvous._current = meeting
        os.environ.clear()
        os.environ.update(before)


class Records:
    """A report that keeps the records."""

    is_heard = True

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def record(self, kind: str, step: int, values: dict[str, Any], log: bool = True) -> None:
        """Keep it."""
        self.records.append({"kind": kind, "step": step, **json.loads(json.dumps(values))})

    def say(self, text: str) -> None:
        """Nothing."""

    def is_replaced(self) -> bool:
        """No other launch is there."""
        return False


def tiny_run(folder: Path, control: Control, micro_batch: int = 1, *overrides: str) -> loop.Run:
    """A run of the tiny recipe in `folder`, that saves nothing."""
    path = runs.write_recipe(folder)
    recipe = loading.load(str(path), list(overrides))
    rows = PretrainRows(recipe, prepare(recipe, folder / "data" / path.stem, report=lambda line: None))
    engine_config = ds_config.join(recipe, {"zero_optimization": {"stage": 1}}, 1, "cpu", micro_batch)
    model = decoder.build(recipe.model, recipe.train.seed)
    engine = engines.Engine(recipe, engine_config, model, control, Interrupt(control, grace_s=60))
    checkpoints: Any = SimpleNamespace(is_replaced=False)
    report: Any = Records()
    return loop.Run(
        folder=folder, recipe=recipe, engine=engine, rows=rows, report=report, state=State(),
        stop_at_step=recipe.train.steps, checkpoints=checkpoints, identity={}, peak_flops=None, sample=lambda model: {},
    )  # fmt: skip
