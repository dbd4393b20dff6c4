"""The result of `make demo`: held-out bits per byte beside three baselines, and text from the exported model.

    runs/demo + data/demo + exports/demo --> table, samples, exit code 1 if a baseline was not beaten

python benchmarks/demo_report.py runs/demo exports/demo [--data-root data]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ds_slm.data.shards import prepared
from ds_slm.errors import CheckpointError, run_program
from ds_slm.publish import baselines
from ds_slm.recipe import loading
from ds_slm.run import metrics_file

PROMPTS = ("The function returns", "If the file does not exist,")


def continuations(folder: Path, prompts: tuple[str, ...]) -> tuple[int, dict[str, str]]:
    """The number of parameters by transformers, and each prompt continued through `AutoModelForCausalLM`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    torch.manual_seed(0)
    texts = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=40,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
        texts[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return model.num_parameters(), texts


def main() -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    args = parser.parse_args()

    if not (args.run / "done.json").is_file():
        raise CheckpointError(f"{args.run} has no done.json: the run is not finished; launch it again to go on.")

    done = json.loads((args.run / "done.json").read_text())
    steps = metrics_file.read(args.run)["train"]

    # The baselines learn from the training tokens, and are measured on the same held-out bytes as the model.
    recipe = loading.load(str(args.run / "recipe.toml"))
    data = prepared.open_prepared(recipe, args.data_root / args.run.name)
    train_ids, held_out_ids = np.asarray(data.tokens("train")[0]), np.asarray(data.tokens("val")[0])
    unigram, bigram = baselines.ngram_bits_per_byte(
        train_ids, held_out_ids, data.vocab_size, data.eos_id, data.val_bytes
    )

    ours, perplexity = done["val_bits_per_byte"], done["val_perplexity"]
    rivals = {"gzip -9": baselines.gzip_bits_per_byte(data.val_text()), "unigram": unigram, "bigram": bigram}
    parameters, texts = continuations(args.export, PROMPTS)

    console = Console()
    table = Table()
    table.add_column(f"{data.val_bytes:,} held-out bytes, {data.val_tokens:,} tokens")
    table.add_column("bits per byte", justify="right")
    for name, value in {**rivals, f"{args.run} ({parameters:,} parameters)": ours}.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)

    for text in texts.values():
        console.print(text, markup=False, highlight=False)

    seconds = sum(record["step_s"] for record in steps)
    speed = sorted(record["tokens_per_s"] for record in steps)[len(steps) // 2]
    peak_gb = max(record["peak_memory_gb"] for record in steps)
    console.print(
        f"\nmade: {args.run}: step {done['step']}, {done['tokens']:,} tokens in {seconds:.0f} s of steps\n"
        f"      median {speed:,.0f} tokens/s, peak {peak_gb:.2f} GB on rank 0\n"
        f"      held-out loss {done['val_loss']:.4f}, perplexity {perplexity:.2f}, bits per byte {ours:.4f}\n"
        f"      {args.export}: a Hugging Face folder of {parameters:,} parameters\n"
        f"look: tensorboard --logdir {args.run.parent}",
        highlight=False,
    )

    beaten = all(ours < value for value in rivals.values())
    if not beaten:
        console.print("the model does not beat all three baselines", style="bold red")
    return 0 if beaten else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
