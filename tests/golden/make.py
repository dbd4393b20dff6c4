"""Make the golden artefacts: what today's code writes, for later code to read, resume and compare.

    python -m tests.golden.make              refuses where they are there
    python -m tests.golden.make --overwrite

    made/tiny.toml  corpus.jsonl    the recipe of a pretraining, and the text of one of its two sources
    made/tiny-instruct.toml         the recipe of a fine-tuning of that model
    made/data/                      both prepared
    made/run/                       the pretraining, stopped after step 8 of 12: fp32, ZeRO-1, two ranks
    made/export/                    its last checkpoint as a Hugging Face folder
    made/expected.json              hashes of all this, and how the run goes on where nothing stops it

They prove that a change of the code leaves files and results as they were. Making them anew gives that proof up: then
they show only that the code agrees with itself. Those in the repository were made by the code of commit
e4eaed9f4dbe3ee4cd3f007530386d1943babe34; `made_by` in expected.json says so as well, with the versions of the
libraries. When something is renamed, this program's imports follow, and what it has made stays.

The recipes have a source of `kind = "embedded"`. What such a source holds depends on the machine's installation, so
made-up text stands in for it: recipes, manifests and hashes hold the kind's name, and that is what they are kept for.
logs/ and tb/ are left out, and the host's name in env.json is replaced: no resumption reads them.
"""

import argparse
import contextlib
import json
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepare import prepare
from ds_slm.data.shards.writer import TEXT
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.files import write_json
from ds_slm.publish.export import export_run
from ds_slm.publish.models import open_model
from ds_slm.recipe import loading
from ds_slm.run import software
from sft.encode import conversation_format
from sft.prepare import prepare_conversations
from sft.rows import ConversationRows
from tests.golden import facts
from tests.support import conversations, runs

SHARED = """
[card]
name = "golden"
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
vocab_size = 280
max_position_embeddings = 160
qk_norm = true
init_std = 0.1
[tokenizer]
kind = "bpe"
vocab_size = 276
special_tokens = { "<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3 }
pad_token = "<|pad|>"
[optimizer]
name = "adamw"
lr = 3e-3
min_lr = 3e-4
[schedule]
kind = "cosine"
warmup_steps = 2
[run]
eval_every_steps = 4
eval_rows = 4
save_every_steps = 4
[eval]
prompts = ["the cat"]
"""

PRETRAINING = f"""{SHARED}
[train]
global_batch_tokens = 224
steps = {facts.STEPS}
seed = 5
precision = "fp32"
z_loss = 1e-4
[data]
seq_len = 32
val_fraction = 0.2
[[data.source]]
name = "documentation"
kind = "embedded"
weight = 2
[[data.source]]
name = "stories"
kind = "files"
path = "corpus.jsonl"
weight = 1
"""

FINE_TUNING = f"""{SHARED}
[train]
global_batch_tokens = 512
steps = 6
seed = 5
precision = "fp32"
[data]
seq_len = 128
val_fraction = 0.2
[[data.source]]
name = "questions"
kind = "embedded"
column = "messages"
[sft]
mask = "card"
packing = true
"""

LEFT_OUT = {"logs", "tb"}
"""Folders of a run that no resumption needs, with this machine's names in them. So are hidden files."""
NO_HOST = "node1"


def main() -> None:
    """Make everything in a temporary folder, and put it in its place once it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", action="store_true", help="replace the artefacts: gives up what they prove")
    overwrite = parser.parse_args().overwrite
    if facts.MADE.exists() and not overwrite:
        raise SystemExit(f"{facts.MADE} is there, made by older code: --overwrite replaces it, and what it proves.")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "made")
        folder.mkdir()
        with contextlib.chdir(folder):  # a recipe names its text by a relative path
            expected = make(folder, scratch=Path(temporary))
        forget_this_machine(folder)
        write_json(folder / facts.EXPECTED, {**expected, "files": facts.file_hashes(folder)})
        refuse_private(folder, [socket.gethostname(), temporary, str(runs.ROOT), str(Path.home())])
        shutil.rmtree(facts.MADE, ignore_errors=True)
        shutil.copytree(folder, facts.MADE)
    print(f"{facts.MADE}: {sum(path.stat().st_size for path in facts.MADE.rglob('*') if path.is_file()):,} bytes")


def make(folder: Path, scratch: Path) -> dict[str, Any]:
    """All artefacts, in a folder; returns what is to be recorded of them."""
    recipe_file, tuning_file = (folder / f"{name}.toml" for name in (facts.PRETRAINING, facts.FINE_TUNING))
    recipe_file.write_text(PRETRAINING.lstrip())
    tuning_file.write_text(FINE_TUNING.lstrip())
    recipe, tuning = loading.load(str(recipe_file)), loading.load(str(tuning_file))

    # Few documents: an epoch of each source ends within the run. Made-up text stands in for the installation's.
    runs.write_corpus(folder / "corpus.jsonl", documents=8)
    texts = [json.loads(line)["text"] for line in runs.write_corpus(scratch / "texts", documents=13, seed=1).open()]
    talks = [json.dumps(talk) for talk in conversations.made(30, longest=2)]
    tokenizer, root = scratch / "tokenizer", folder / facts.DATA
    text = replace(TEXT, builtin=lambda: texts, tokenizer_folder=tokenizer)
    chat = replace(conversation_format(tuning, tokenizer), builtin=lambda: talks)
    build_tokenizer(recipe, lambda source: iter(texts)).save(tokenizer)
    prepared = prepare(recipe, root / facts.PRETRAINING, document_format=text)
    prepare(tuning, root / facts.FINE_TUNING, document_format=chat)
    chats = prepare_conversations(tuning, root / facts.FINE_TUNING, tokenizer)

    # Launched twice: only the first launch is told which rows to leave out, and only env.json knows of the second.
    run, whole = folder / facts.RUN, scratch / "whole"
    skip = ("--skip-rows", "{}:{}".format(*facts.SKIPPED_ROWS))
    train(folder, whole, *skip)
    train(folder, run, *skip, "--max-steps", facts.SAVED_STEPS[0])
    train(folder, run, "--max-steps", facts.SAVED_STEPS[-1])
    export_run(run, folder / facts.EXPORT)
    last = checkpoint_files.folder_of_step(whole, facts.STEPS)
    return {
        "made_by": software.describe(),
        "recipes": {facts.PRETRAINING: recipe.identity_sha256(), facts.FINE_TUNING: tuning.identity_sha256()},
        "data": {
            facts.PRETRAINING: facts.of_data(prepared, PretrainRows(recipe, prepared)),
            facts.FINE_TUNING: facts.of_data(chats, ConversationRows(tuning, chats)),
        },
        "checkpoints": {str(step): facts.of_checkpoint(run, step) for step in facts.SAVED_STEPS},
        "models": {name: open_model(folder / name).sha256 for name in (facts.RUN, facts.EXPORT)},
        "exports": facts.of_exports(run, recipe, chats.tokenizer_folder, scratch),
        "undisturbed": {
            **{kind: runs.records(whole, kind) for kind in ("train", "val", "eval")},
            "state": checkpoint_files.read_state(last),
            "done": json.loads((whole / "done.json").read_text()),
        },
    }


def train(folder: Path, run: Path, *flags: object) -> None:
    """Train on two ranks, in the folder."""
    arguments = ("--recipe", f"{facts.PRETRAINING}.toml", "--run-dir", run, "--micro-batch", 2, *flags)
    done = runs.run(runs.deepspeed_command(facts.RANKS, *arguments), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def forget_this_machine(folder: Path) -> None:
    """Remove what no resumption needs, and replace the host's name in env.json."""
    run, host = folder / facts.RUN, socket.gethostname()
    for path in [*folder.rglob(".*"), *(run / name for name in LEFT_OUT)]:
        checkpoint_files.remove(path)
    environment = run / "env.json"
    environment.write_text(environment.read_text().replace(json.dumps(host), json.dumps(NO_HOST)))


def refuse_private(folder: Path, names: Sequence[str]) -> None:
    """Raise AssertionError where a file names something of this machine."""
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name in names if len(name) > 2 and name.encode() in content], path


if __name__ == "__main__":
    main()
