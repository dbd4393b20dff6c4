"""How fast a recipe trains: the real program compared with its rivals, in one run on one machine.

    random ids, made-up tokenizer --> OUT/ids.bin, OUT/tokenizer
    each side at each micro-batch, once --> its best micro-batch
    ours, trainer, trainer-ds, bare; ours, ... ROUNDS times --> medians, spread --> OUT/RECIPE/result.json and a table

python benchmarks/train.py RECIPE [--sides ours bare] [--rounds 2] [--micro-batches 1 2 4] [--set SECTION.KEY=VALUE]
python benchmarks/train.py RECIPE --memory --micro-batches 8
python benchmarks/train.py --all [--precisions bf16]    the whole table (training_table.py), resumed where it ended

ours        deepspeed ds_slm/pretrain.py, one process a core (or a GPU)
trainer     transformers.Trainer as `python script.py` runs it: one process, all threads; its Llama or Qwen3, the same
            precision, optimiser and gradient checkpointing
trainer-ds  the same under DeepSpeed's ZeRO-1, with the same number of processes as ours
bare        our model and optimiser in a plain PyTorch loop, with the same number of processes as ours: the limit

A step of a recipe has hundreds of forwards, so its time is computed from its parts: steps of ACCUMULATIONS[0] and of
ACCUMULATIONS[1] micro-batches are timed, which gives the times of a micro-batch and of the optimiser step. Memory is
the kernel's peak of rank 0 on a CPU (including what its imports hold), the allocator's peak on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # this folder has modules named like others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_slm.distributed import world
from ds_slm.errors import DataError, run_program
from ds_slm.recipe import counts, ds_config, loading, plan
from ds_slm.recipe.schema import Recipe
from ds_slm.run import metrics_file

ROOT = Path(__file__).resolve().parents[1]
ZERO_STAGE = 1
PROGRAMS = Path(sysconfig.get_path("scripts"))
PRETRAIN = ROOT / "ds_slm" / "pretrain.py"
SIDES = ("ours", "trainer", "trainer-ds", "bare")
ACCUMULATIONS = (1, 4)
TABLE_WIDTH = 130
ROWS = 512
"""Rows of made-up ids."""


@dataclass(frozen=True)
class Launch:
    """One launch of one side, as measured."""

    step_s: float
    """Median of its steps."""
    peak_gb: float
    start_s: float | None
    """Seconds from the command to the first forward; only for ours."""


@dataclass(frozen=True)
class Round:
    """One side in one round."""

    micro_batch: int
    micro_s: float
    optimizer_s: float
    tokens_per_s: float
    peak_gb: float
    start_s: float | None


@dataclass(frozen=True)
class Bench:
    """Settings that all launches share."""

    name: str
    recipe: Recipe
    overrides: list[str]
    out: Path
    devices: int
    on_gpu: bool
    steps: int = 4
    """Steps of a launch whose median counts, after one to warm up."""
    stage: int = ZERO_STAGE
    compile_blocks: bool | None = None
    """Whether to compile blocks; None: if the recipe's own run would."""
    under_launcher: bool = True
    """Whether `deepspeed` starts ours; a single device needs no launcher, which takes seconds."""
    threads: int | None = None
    """Threads of each process; None divides the cores among them."""

    def ranks(self, side: str) -> int:
        """Number of processes of a side."""
        return 1 if side == "trainer" else self.devices

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled; although short, a launch does what the recipe's own run does."""
        if self.compile_blocks is not None:
            return self.compile_blocks
        return ds_config.compiles_blocks(self.recipe, self.stage, self.devices, "cuda" if self.on_gpu else "cpu")

    @property
    def zero_config(self) -> Path:
        """The checkout's ds_config of this stage."""
        return ROOT / "ds_configs" / f"zero{self.stage}.json"

    def environment(self, side: str) -> dict[str, str]:
        """The environment: one thread a process, or all threads for a single process; no access to a hub."""
        threads = self.threads or (os.cpu_count() or 1) // self.ranks(side) or 1
        accelerator = {} if self.on_gpu else {"DS_ACCELERATOR": "cpu"}
        return os.environ | accelerator | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def lay_out(recipe: Recipe, out: Path) -> list[str]:
    """Write random ids and a made-up tokenizer of the recipe's size; returns the overrides that use them."""
    import tokenizers

    out.mkdir(parents=True, exist_ok=True)

    vocab_size = recipe.model.vocab_size
    special = {number: name for name, number in recipe.tokenizer.special_tokens.items()}
    vocabulary = {special.get(number, f"t{number}"): number for number in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (out / "tokenizer").mkdir(exist_ok=True)
    backend.save(str(out / "tokenizer" / "tokenizer.json"))

    # with the frequencies of words, by Zipf's law: repeated ids cost time in the embedding's backward pass
    ids = np.random.default_rng(0).zipf(1.1, size=ROWS * (recipe.data.seq_len + 1)) % vocab_size
    ids.astype("<u2" if vocab_size <= 1 << 16 else "<u4").tofile(out / "ids.bin")

    return [
        "tokenizer.kind=hf",
        f"tokenizer.path={out / 'tokenizer'}",
        f"tokenizer.vocab_size={vocab_size}",
        "data.val_fraction=0.05",
        "run.eval_every_steps=1000000",
        "run.save_every_steps=1000000",
        "run.log_every_steps=1",
        "eval.prompts=[]",
    ]


def write_ds_config(bench: Bench, folder: Path) -> Path:
    """Write the ds_config of a user's launch, with blocks compiled or not as in the recipe's own run."""
    path = folder / "ds_config.json"
    path.write_text(json.dumps(ds_config.read(bench.zero_config) | {"compile_blocks": bench.compiled}))
    return path


def under_deepspeed(ranks: int) -> list[str]:
    """The beginning of a command that DeepSpeed launches."""
    port = str(world.free_port())
    return [str(PROGRAMS / "deepspeed"), "--quiet", "--num_accelerators", str(ranks), "--master_port", port]


def shared_flags(bench: Bench, ranks: int, micro_batch: int, accumulation: int) -> list[str]:
    """The flags of each side for the recipe and its batch."""
    settings = [f"train.global_batch_tokens={ranks * micro_batch * accumulation * bench.recipe.data.seq_len}"]
    flags = [word for pair in [*bench.overrides, *settings] for word in ("--set", pair)]
    return [*flags, "--recipe", bench.name, "--micro-batch", str(micro_batch)]


def our_command(
    bench: Bench, folder: Path, micro_batch: int, accumulation: int, steps: int, launcher: Sequence[str] = ()
) -> list[str]:
    """The command of the real program, whose run goes into `folder`.

    Args:
        bench: what is trained.
        folder: where its ds_config and its run go.
        micro_batch: rows of a forward.
        accumulation: forwards of a rank in a step.
        steps: the number of steps.
        launcher: the beginning of the command; if left out, all ranks start on this machine.
    """
    flags = shared_flags(bench, bench.devices, micro_batch, accumulation)
    for source in bench.recipe.data.source:
        flags += ["--source", f"{source.name}={bench.out}/ids.bin"]
    flags += ["--run-dir", str(folder / "run"), "--data-root", str(bench.out / "data"), "--max-steps", str(steps)]
    flags += ["--ds-config", str(write_ds_config(bench, folder))]
    usual = under_deepspeed(bench.devices) if bench.under_launcher else [sys.executable, "-u"]
    return [*(launcher or usual), str(PRETRAIN), *flags]


def launch(bench: Bench, side: str, micro_batch: int, accumulation: int) -> Launch:
    """Start one side and wait for its end. Raises DataError with its output if it fails."""
    ranks = bench.ranks(side)
    folder = bench.out / "launches" / f"{side}-{micro_batch}-{accumulation}-{time.monotonic_ns()}"
    folder.mkdir(parents=True)

    if side == "ours":
        command = our_command(bench, folder, micro_batch, accumulation, bench.steps + 1)
    else:
        kind, _, under = side.partition("-")
        command = [sys.executable] if side == "trainer" else under_deepspeed(ranks)
        command += [str(ROOT / "benchmarks" / "rivals.py"), kind]
        command += [*shared_flags(bench, ranks, micro_batch, accumulation), "--ids", str(bench.out / "ids.bin")]
        command += [
            "--accumulation",
            str(accumulation),
            "--steps",
            str(bench.steps + 1),
            "--out",
            str(folder / "out.json"),
        ]
        command += ["--deepspeed", str(bench.zero_config)] if under else []
        command += ["--compiled"] if kind == "bare" and bench.compiled else []

    # Only ours prints a line for its first step: its start-up ends there.
    begin_s, first_step_s, said = time.monotonic(), None, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=bench.environment(side)
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("step 1/"):
                first_step_s = time.monotonic() - begin_s

    if process.returncode:
        raise DataError(f"{side} failed ({process.returncode}):\n{''.join(said[-30:])}")
    if side != "ours":
        found = json.loads((folder / "out.json").read_text())
        return Launch(statistics.median(found["step_s"][1:]), found["peak_memory_gb"], None)

    steps = metrics_file.read(folder / "run")["train"]
    start_s = first_step_s - steps[0]["step_s"] if first_step_s is not None else None
    return Launch(statistics.median(one["step_s"] for one in steps[1:]), steps[-1]["peak_memory_gb"], start_s)


def measure(bench: Bench, side: str, micro_batch: int, few: Launch | None = None) -> Round:
    """Measure both accumulations of one side, and compute the recipe's step from them.

    Args:
        bench: what is trained.
        side: the side that trains it.
        micro_batch: rows of a forward.
        few: a launch of the first accumulation, if there was one.
    """
    few = few or launch(bench, side, micro_batch, ACCUMULATIONS[0])
    many = launch(bench, side, micro_batch, ACCUMULATIONS[1])
    micro_s = (many.step_s - few.step_s) / (ACCUMULATIONS[1] - ACCUMULATIONS[0])
    if micro_s <= 0:
        raise DataError(
            f"{side}: a step of {ACCUMULATIONS[1]} forwards took {many.step_s:.3f} s, one of {ACCUMULATIONS[0]} "
            f"{few.step_s:.3f} s: other work runs on this machine. Measure again when it is quiet."
        )
    optimizer_s = max(few.step_s - ACCUMULATIONS[0] * micro_s, 0.0)
    cut = counts.batch(bench.recipe, bench.ranks(side), micro_batch)
    step_s = cut.accumulation_steps * micro_s + optimizer_s
    tokens_per_s = bench.recipe.train.global_batch_tokens / step_s
    return Round(micro_batch, micro_s, optimizer_s, tokens_per_s, many.peak_gb, few.start_s)


def memory(bench: Bench, micro_batch: int, sides: Sequence[str]) -> Table:
    """Peak memory of each side at one micro-batch, with a single forward and backward before each step."""
    grid = Table(title=f"{bench.name}, micro-batch {micro_batch}: peak memory of rank 0")
    for name in ("side", "ranks", "GB"):
        grid.add_column(name, justify="left" if name == "side" else "right")
    for side in sides:
        grid.add_row(side, str(bench.ranks(side)), f"{launch(bench, side, micro_batch, 1).peak_gb:.2f}")
        print(f"{side}: done", flush=True)
    return grid


def best_micro_batch(bench: Bench, side: str, choices: Sequence[int]) -> int:
    """The micro-batch with the most rows a second. A single choice is not tried."""
    return choices[0] if len(choices) == 1 else fastest(try_micro_batches(bench, side, choices))


def try_micro_batches(bench: Bench, side: str, choices: Sequence[int]) -> dict[int, Launch]:
    """A launch of the first accumulation at each micro-batch; a micro-batch that does not fit is skipped."""
    tried: dict[int, Launch] = {}
    for choice in choices:
        try:
            tried[choice] = launch(bench, side, choice, ACCUMULATIONS[0])
        except DataError as error:
            print(f"{side}, micro-batch {choice}: left out\n{error}", flush=True)

    if not tried:
        raise DataError(f"{side} runs at no micro-batch of {', '.join(map(str, choices))}.")
    speeds = (f"{choice} x {choice / one.step_s:.3g} rows/s" for choice, one in tried.items())
    print(f"{side}: {', '.join(speeds)}", flush=True)
    return tried


def fastest(tried: dict[int, Launch]) -> int:
    """The micro-batch with the most rows a second."""
    return max(tried, key=lambda choice: choice / tried[choice].step_s)


def table(bench: Bench, rounds: dict[str, list[Round]], device: str, peak_flops: float | None) -> Table:
    """A table with a row for each side."""
    kind = "GPU" if bench.on_gpu else "CPU"
    grid = Table(title=f"{bench.name}, {bench.recipe.train.precision}, {bench.devices} {kind} ranks, {device}")

    names = (
        "side",
        "micro-batch",
        "tokens/s",
        "spread",
        "MFU",
        "micro-batch s",
        "optimiser s",
        "peak GB",
        "ours to it",
    )
    for name in names:
        grid.add_column(name, justify="left" if name == "side" else "right")

    ours = statistics.median(one.tokens_per_s for one in rounds["ours"]) if "ours" in rounds else None
    for side, found in rounds.items():
        speeds = [one.tokens_per_s for one in found]
        speed = statistics.median(speeds)
        flops = plan.flops_per_token(bench.recipe.model, bench.recipe.data.seq_len) * speed

        grid.add_row(
            side,
            str(found[0].micro_batch),
            f"{speed:,.0f}",
            f"{(max(speeds) - min(speeds)) / speed:.1%}",
            f"{flops / peak_flops:.1%}" if peak_flops else "-",
            f"{statistics.median(one.micro_s for one in found):.3f}",
            f"{statistics.median(one.optimizer_s for one in found):.3f}",
            f"{max(one.peak_gb for one in found):.2f}",
            f"{ours / speed:.2f}" if ours else "-",
        )
    return grid


def bench_of(name: str, settings: list[str], out: Path, steps: int = Bench.steps) -> Bench:
    """A recipe on all devices of this machine, its made-up data laid out in `out`."""
    import torch

    on_gpu = torch.cuda.is_available()
    recipe = loading.load(name, settings)
    overrides = [*settings, *lay_out(recipe, out)]
    devices = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    return Bench(name, recipe, overrides, out, devices, on_gpu, steps)


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--all", action="store_true", help="the whole table, and no recipe")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"), help="of --all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=Bench.steps, help="steps that count, after one to warm up")
    parser.add_argument("--memory", action="store_true", help="peak memory alone, at the first micro-batch")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    args = parser.parse_args()

    if args.all == bool(args.recipe):
        parser.error("name a recipe, or give --all")
    if args.all:
        for name in ("set", "sides", "rounds", "memory"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is not for --all: name a recipe")
        from benchmarks import training_table

        training_table.run(args.out.resolve() / "table", args.micro_batches, args.steps, args.precisions)
        return 0

    import torch

    from ds_slm.model.kernels import DTYPES
    from ds_slm.run import measure as device_measure

    out = args.out.resolve() / loading.recipe_path(args.recipe).stem
    bench = bench_of(args.recipe, args.set, out, args.steps)

    if args.memory:
        Console(width=TABLE_WIDTH).print(memory(bench, args.micro_batches[0], args.sides))
        return 0

    chosen = {side: best_micro_batch(bench, side, args.micro_batches) for side in args.sides}
    rounds: dict[str, list[Round]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        for side in args.sides:
            rounds[side].append(measure(bench, side, chosen[side]))
            print(f"round {number + 1}, {side}: {rounds[side][-1].tokens_per_s:,.0f} tokens/s", flush=True)

    device = torch.device("cuda" if bench.on_gpu else "cpu")
    peak = device_measure.peak_flops(device, DTYPES[bench.recipe.train.precision])
    peak = peak and peak * (bench.devices if bench.on_gpu else 1)  # on a CPU it is measured with all threads
    name = device_measure.device_name(device)
    starts = [one.start_s for one in rounds.get("ours", []) if one.start_s is not None]

    Console(width=TABLE_WIDTH).print(table(bench, rounds, name, peak))
    if starts:
        print(f"ours: from the command to the first forward {statistics.median(starts):.1f} s")

    result = {
        "recipe": args.recipe,
        "overrides": args.set,
        "device": name,
        "torch": torch.__version__,
        "devices": bench.devices,
        "load": os.getloadavg()[0],
        "rounds": {side: [asdict(one) for one in found] for side, found in rounds.items()},
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
