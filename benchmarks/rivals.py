"""The rivals of benchmarks/train.py, each in its own process: the same model shape, ids, optimiser and micro-batch.

    trainer   transformers.Trainer with LlamaForCausalLM or Qwen3ForCausalLM; under DeepSpeed if --deepspeed is given
    bare      our decoder and optimiser in a plain PyTorch loop: what could be gained without DeepSpeed

deepspeed benchmarks/rivals.py bare --recipe slm-10m --ids ids.bin --micro-batch 2 --accumulation 4 --steps 5 --out x

Writes the seconds of every optimiser step and the peak memory of rank 0. Same precision as the recipe: the Trainer's
bf16 is autocast over fp32 weights, as `bf16=True` gives it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ds_slm.errors import RecipeError, run_program
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows_of(ids: Path, seq_len: int, vocab_size: int) -> np.ndarray:
    """The ids of a ready-made token file as rows of seq_len + 1."""
    flat = np.fromfile(ids, "<u2" if vocab_size <= 1 << 16 else "<u4")
    return flat[: len(flat) // (seq_len + 1) * (seq_len + 1)].reshape(-1, seq_len + 1).astype(np.int64)


def now_s() -> float:
    """The time once the device has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer(args: argparse.Namespace, recipe: Recipe) -> list[float]:
    """Step times of transformers' Trainer."""
    import transformers

    from ds_slm.model import hf

    class Clock(transformers.TrainerCallback):
        durations_s: list[float]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.durations_s = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin_s = now_s()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.durations_s.append(now_s() - self.begin_s)

    settings, precision = recipe.optimizer, recipe.train.precision
    options: dict[str, Any] = {
        "output_dir": str(args.out.with_suffix("")),
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "optim": "adamw_torch_fused" if settings.name == "adamw" else "adamw_bnb_8bit",
        "learning_rate": settings.lr,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.grad_clip,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "bf16": precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }

    if args.deepspeed:
        import importlib

        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # minutes of g++, for inference
        options["deepspeed"] = {
            **json.loads(args.deepspeed.read_text()),
            "bf16": {"enabled": "auto"},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        }
    arguments = transformers.TrainingArguments(**options)

    # only our model has exclusive attention: theirs runs without it
    config = hf.hf_config(recipe.model.model_copy(update={"exclusive_attention": False}), eos_id=None, dtype="float32")
    shape = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)

    rows = rows_of(args.ids, recipe.data.seq_len, recipe.model.vocab_size)[:, :-1]
    clock = Clock()
    transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # type: ignore[arg-type]
        data_collator=transformers.default_data_collator,
        callbacks=[clock],
    ).train()
    return clock.durations_s


def bare(args: argparse.Namespace, recipe: Recipe) -> list[float]:
    """Step times of a plain loop: our decoder in the recipe's precision, fp32 gradients and masters, one reduction."""
    from ds_slm.engine.optim import build_optimizer
    from ds_slm.model import decoder, kernels

    kernels.fix_sums(deterministic=False)  # as a run of ours does
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    if world_size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    dtype, z_loss = PRECISIONS[recipe.train.precision], recipe.train.z_loss
    model = decoder.build(recipe.model, recipe.train.seed, recipe.train.gradient_checkpointing).to(device, dtype)
    if args.compiled:
        model.compile_parts()

    # The optimiser steps fp32 masters. In fp32 they are the model itself.
    weights = list(model.parameters())
    masters = decoder.build(recipe.model, recipe.train.seed).to(device) if dtype != torch.float32 else model
    optimizer = build_optimizer(masters, recipe.optimizer)

    rows = rows_of(args.ids, recipe.data.seq_len, recipe.model.vocab_size)
    targets = args.micro_batch * recipe.data.seq_len
    scale = 1 / (targets * args.accumulation * world_size)
    gradients = [torch.zeros_like(one, dtype=torch.float32) for one in weights]
    durations_s, place = [], rank * args.micro_batch

    for _ in range(args.steps):
        begin_s, nll = now_s(), torch.zeros((), device=device)
        for _ in range(args.accumulation):
            ids = torch.from_numpy(rows[(place + np.arange(args.micro_batch)) % len(rows)]).to(device)
            place += world_size * args.micro_batch
            sums = model(ids[:, :-1], ids[:, 1:], z_scale=z_loss)
            (sums.objective * scale).backward()
            nll += sums.nll.detach()
            for total, one in zip(gradients, weights, strict=True):
                total.add_(one.grad)
                one.grad = None

        # Once a step, send all gradients in one message.
        if world_size > 1:
            flat = torch.cat([one.flatten() for one in gradients])
            dist.all_reduce(flat)
            for total, part in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                total.copy_(part.view_as(total))

        for master, total in zip(masters.parameters(), gradients, strict=True):
            master.grad = total
        torch.nn.utils.clip_grad_norm_(masters.parameters(), recipe.optimizer.grad_clip or float("inf"))
        optimizer.step()

        # Copy the masters' new weights into the model.
        with torch.no_grad():
            for one, master in zip(weights, masters.parameters(), strict=True):
                master.grad = None
                one.copy_(master)
        for total in gradients:
            total.zero_()

        # A run of ours reads its loss in every step, too.
        nll.item()
        durations_s.append(now_s() - begin_s)
    return durations_s


def main() -> None:
    """Run one rival."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("trainer", "bare"))
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deepspeed", type=Path)
    parser.add_argument("--compiled", action="store_true", help="the bare loop compiles blocks and loss")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()

    recipe = loading.load(args.recipe, args.set)
    if recipe.train.precision not in PRECISIONS:
        raise RecipeError(f"train.precision = {recipe.train.precision!r}: the rivals run in {' or '.join(PRECISIONS)}.")

    before_gb = measure.resident_memory_bytes() / 1e9
    durations_s = (trainer if args.kind == "trainer" else bare)(args, recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    if int(os.environ.get("RANK", "0")) == 0:
        memory = {"peak_memory_gb": measure.peak_memory_bytes(device) / 1e9, "resident_gb_before_model": before_gb}
        args.out.write_text(json.dumps({"step_s": durations_s, **memory}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_program(main))
