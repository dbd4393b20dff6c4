"""One optimiser step of the whole axiom-380m-instruct recipe on a CPU: its time and its peak memory.

    ranks --> cl100k tokenizer + fresh weights --> OUT/base --deepspeed sft/train.py--> OUT/run --> time, memory

python benchmarks/sft_380m.py CONVERSATIONS.jsonl --ranks cl100k_base.tiktoken [--out runs/sft_380m]

All 24 layers and 385,849,344 parameters, micro-batch 1 of 1,024 tokens, two micro-batches, gradient checkpointing and
8-bit AdamW, with the embedding's moments in 8 bits too; one process. A step of the recipe has 312 rows, here it has
two, because memory does not depend on their number. The weights are random, so the loss means nothing.

Memory is the kernel's peak of resident memory up to the end of the step (including loading the base and an evaluation)
minus what the process held before it built the model. The card's 5.32 GB are the figure of CUDA's allocator.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ds_slm.errors import DataError, run_program
from ds_slm.recipe import loading
from ds_slm.run import metrics_file

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "axiom-380m-instruct"
CARD_GB = 5.32


def write_base(ranks: Path, folder: Path) -> int:
    """Write fresh weights in the recipe's shape as a Hugging Face folder; returns the number of parameters."""
    from ds_slm.data.tokenizers.tokenizer import build_tokenizer
    from ds_slm.model import decoder
    from ds_slm.publish.export import export

    recipe = loading.load(RECIPE, [f"tokenizer.path={ranks}"])
    tokenizer = folder.parent / "tokenizer"
    build_tokenizer(recipe, lambda source: iter(())).save(tokenizer)
    model = decoder.build(recipe.model, recipe.train.seed)
    return export(dict(model.named_parameters()), recipe.model, tokenizer, folder)


def train(conversations: Path, ranks: Path, out: Path) -> int:
    """One step as a user would launch it; returns the launcher's exit code."""
    overrides = [f"tokenizer.path={ranks}", "train.global_batch_tokens=2048", "run.eval_rows=1", "eval.prompts=[]"]
    command = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_accelerators", "1", ROOT / "sft/train.py"]
    command += ["--recipe", RECIPE, "--base", out / "base", "--run-dir", out / "run", "--data-root", out / "data"]
    command += ["--source", f"smol-smoltalk={conversations}", "--micro-batch", "1", "--max-steps", "1"]
    command += [word for override in overrides for word in ("--set", override)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count())}
    return subprocess.run(list(map(str, command)), env=environment, check=False).returncode


def main() -> int:
    """Make the base, take the step, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("conversations", type=Path, help="a .jsonl or .parquet file with a messages column")
    parser.add_argument("--ranks", type=Path, required=True, help="cl100k_base.tiktoken")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sft_380m", help="where everything is written, 7 GB")
    args = parser.parse_args()

    if missing := [str(path) for path in (args.conversations, args.ranks) if not path.exists()]:
        raise DataError(f"missing: {', '.join(missing)}.")

    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    parameters = write_base(args.ranks.resolve(), out / "base")
    if code := train(args.conversations.resolve(), args.ranks.resolve(), out):
        return code

    step = metrics_file.read(out / "run")["train"][0]
    before_gb = json.loads((out / "run" / "env.json").read_text())["resident_gb_before_model"]
    print(
        f"{parameters:,} parameters, {step['real']:,} tokens ({step['supervised']:,} targets), {step['step_s']:.0f} s\n"
        f"loss {step['loss']:.3f}, peak {step['peak_memory_gb']:.2f} GB less {before_gb:.2f} GB before the model: "
        f"{step['peak_memory_gb'] - before_gb:.2f} GB (the card, on CUDA: {CARD_GB} GB)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
