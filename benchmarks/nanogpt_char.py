"""Another trainer's published figure, reproduced: nanoGPT's character model of tinyshakespeare in its CPU shape.

    tinyshakespeare.txt --> FOLDER/{characters/, tinyshakespeare.txt} --ds_slm/pretrain.py--> FOLDER/runs/nanogpt_char
    done.json + metrics.jsonl --> loss beside nanoGPT's 1.88, seconds, tokens/s; exit code 1 if it is missed

python benchmarks/nanogpt_char.py tinyshakespeare.txt [--folder runs/nanogpt_char] [--set section.key=value ...]

The text is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn. Its last 10 % are held out, cut at the same
character as in nanoGPT. The loss is the mean over every held-out character, in consecutive rows of 64: the n-th
character of a row is predicted from n before it, as in nanoGPT's random crops, so contexts have the same lengths. It
also counts two targets of 111,541 that nanoGPT does not have: the text's first character, after an EOS, and the EOS at
its end. Held-out losses during training are over 240 rows, the same number as nanoGPT's 20 batches of 12.

Known gaps: our decoder is not a GPT-2 (RoPE, RMSNorm, SwiGLU instead of learned positions, LayerNorm, GELU). So this
shows that the trainer learns what it should, not that two programs are equal. Rows begin only at multiples of 64.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ds_slm.errors import DataError, run_program
from ds_slm.recipe import loading
from ds_slm.run import metrics_file

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "benchmarks" / "nanogpt_char.toml"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def lay_out(text: Path, folder: Path) -> None:
    """Write the text and its character tokenizer, with ids in the order of characters, where the recipe reads them."""
    import tokenizers

    content = text.read_bytes() if text.is_file() else b""
    if (found := hashlib.sha256(content).hexdigest()) != TEXT_SHA256:
        raise DataError(
            f"{text} is missing or another text (sha256 {found}, expected {TEXT_SHA256}): "
            "get data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn."
        )

    # Every character is one token.
    characters = sorted(set(content.decode()))
    vocabulary = {character: number for number, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()

    (folder / "characters").mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "characters" / "tokenizer.json"))
    shutil.copyfile(text, folder / "tinyshakespeare.txt")


def main() -> int:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / "nanogpt_char", help="where everything is written"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the recipe")
    args = parser.parse_args()
    lay_out(args.text, args.folder)

    overrides = [word for pair in args.set for word in ("--set", pair)]
    command = [sys.executable, str(ROOT / "ds_slm" / "pretrain.py"), "--recipe", str(RECIPE), *overrides]
    begin_s = time.monotonic()
    code = subprocess.run(command, cwd=args.folder, check=False).returncode
    if code:
        return code

    run, elapsed_s = args.folder / "runs" / RECIPE.stem, time.monotonic() - begin_s
    done = json.loads((run / "done.json").read_text())
    steps = metrics_file.read(run)["train"]
    speed = sorted(record["tokens_per_s"] for record in steps)[len(steps) // 2]

    target = loading.load(str(run / "recipe.toml")).targets[0]
    assert target.tolerance is not None
    reached = done["val_loss"] <= target.published + target.tolerance

    print(
        f"\nheld-out loss {done['val_loss']:.4f} nats per character; nanoGPT published {target.published} "
        f"(reproduced up to {target.published + target.tolerance:.2f}): {'reproduced' if reached else 'MISSED'}\n"
        f"{done['tokens']:,} tokens in {sum(record['step_s'] for record in steps):.0f} s of steps, "
        f"median {speed:,.0f} tokens/s; this launch took {elapsed_s:.0f} s"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
