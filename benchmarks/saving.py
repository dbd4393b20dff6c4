"""How long training waits for a save, compared with an optimiser step; and what a save costs the step beside it.

    a model in the recipe's shape, one short row --> a step alone (timed) --> save begun (timed) --> a step beside it

deepspeed --num_accelerators 2 benchmarks/saving.py [--recipe axiom-380m] [--rounds 3]
python benchmarks/saving.py                                       one process, all threads

The checkpoint is really written, below --out; rows are short, because neither time depends on them.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ds_slm.checkpoint.best import Best
from ds_slm.checkpoint.resume import State
from ds_slm.checkpoint.saving import BackgroundSave
from ds_slm.data.rows import Rows
from ds_slm.distributed import rendezvous
from ds_slm.distributed.stop import Interrupt
from ds_slm.engine import devices, process_group
from ds_slm.engine import engine as engines
from ds_slm.engine.row_reader import Share
from ds_slm.errors import DataError
from ds_slm.model import decoder
from ds_slm.recipe import ds_config, loading
from ds_slm.run.launches import Launch

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN = 64


def timed(action: Callable[[], object]) -> float:
    """Seconds of an action, including the device's part."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="axiom-380m")
    parser.add_argument("--ds-config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks" / "saving")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    world = rendezvous.current().world
    rank, world_size = world.rank, world.size
    overrides = [f"data.seq_len={SEQ_LEN}", f"train.global_batch_tokens={SEQ_LEN * world_size}", "run.keep_last=1"]
    recipe = loading.load(args.recipe, [*args.set, *overrides])
    engine_config = ds_config.join(recipe, ds_config.read(args.ds_config), world_size, devices.device_type(), 1)

    control = process_group.connect()
    model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing)
    rng = np.random.default_rng(rank)
    rows = Rows(rng.integers(0, recipe.model.vocab_size, (1, SEQ_LEN + 1)), np.ones((1, SEQ_LEN), dtype=np.float32))

    optimiser_s, alone_s, waits_s, beside_s, saves_s = [], [], [], [], []
    with Interrupt(control, grace_s=60) as interrupt:
        engine = engines.Engine(recipe, engine_config, model, control, interrupt)
        saves = BackgroundSave(engine, args.out, Launch(), [0], lambda line: None)
        totals = engine.agree(Share([rows], []))

        for step in range(1, args.rounds + 2):  # the first makes the optimiser's state
            # A step alone.
            passes_s = timed(lambda: engine.forward_backward([rows], totals))
            optimiser_s.append(timed(lambda: engine.step(1e-4)))
            alone_s.append(passes_s + optimiser_s[-1])

            # The same step beside a save.
            begin_s = time.perf_counter()
            waits_s.append(timed(lambda step=step: saves.begin({**asdict(State(step=step)), **Best().fields()})))
            passes_s = timed(lambda: engine.forward_backward([rows], totals))
            beside_s.append(passes_s + timed(lambda: engine.step(1e-4)))

            saved = saves.finish()
            if saved is None or not saved.durable:
                raise DataError(list(saved.failed) if saved else "nothing was saved")
            saves_s.append(time.perf_counter() - begin_s)

    if rank == 0:
        measured = optimiser_s, alone_s, waits_s, beside_s, saves_s
        step_s, whole_s, wait_s, with_save_s, save_s = (statistics.median(times[1:]) for times in measured)
        print(
            f"{args.recipe}, {world_size} ranks, {recipe.optimizer.name}, medians of {args.rounds}: optimiser step "
            f"{step_s:.2f} s; a save keeps training waiting {wait_s:.2f} s ({wait_s / step_s:.2f} x) and is durable "
            f"after {save_s:.1f} s; a step of {SEQ_LEN} tokens a rank takes {with_save_s:.2f} s beside it, "
            f"{whole_s:.2f} s alone"
        )
        shutil.rmtree(args.out)

    process_group.disconnect(control)
    return 0


if __name__ == "__main__":
    sys.exit(rendezvous.run_rank(main))
