"""`ds-slm import`: a run folder from a Llama or a Qwen3 in the Hugging Face format.

    DIR --checked: shape, tensors, tokenizer--> .export.tmp-*/ is filled, tensor by tensor --> renamed to RUN

    checkpoints/step-00000000/   the weights in fp32, which holds 16-bit ones exactly; no moments: nothing was trained
    tokenizer/                   its files, readable by transformers 4 and 5, and generation_config.json
    imported/                    its config.json, model card and licence, unchanged
    recipe.toml                  its shape and tokenizer; what a model does not say is marked [unstated]

Known gaps: a tokenizer without tokenizer.json, and weights of 8 bits or fewer, are refused. The run cannot be resumed:
it has no moments and no data; another run takes it as its --base.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint.tensor_file import in_file_order
from ds_slm.data.sources.readers import is_unicode
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, GENERATION_CONFIG, Tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError, DataError, UserError
from ds_slm.files import read_json, replace_text, write_json
from ds_slm.publish.models import HEAD, OpenModel, open_model
from ds_slm.publish.place import appears_whole, free_place
from ds_slm.recipe import effects, loading
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.loading import RECIPE_FILE
from ds_slm.recipe.schema import Recipe
from ds_slm.run import software

IMPORTED = "imported"
"""The folder of the model's other files; and, in a checkpoint's state.json, the key for the origin of its weights."""
CARD = "README.md"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
CAME_ALONG = ("config.json", CARD, *LICENCES)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", CHAT_TEMPLATE_FILE, GENERATION_CONFIG,
)  # fmt: skip
FIRST_ROWS, FIRST_STEPS, FIRST_LENGTH = 64, 1000, 1024
"""The recipe's rows of a batch, steps of a run and length of a row, if nothing else is known."""
EMBEDDING = "model.embed_tokens.weight"


def import_model(source: Path, run: Path) -> dict[str, Any]:
    """Make a run folder from a Hugging Face folder. It appears whole, or not at all.

    Args:
        source: the folder.
        run: the run folder to make; it may exist empty.

    Returns:
        What was imported: folder, parameters, architecture, the dtype it was stored in, sha256 of its weights.

    Raises:
        CheckpointError: this decoder does not support the model, files are damaged, or the run exists.
        DataError: the tokenizer cannot be read, or has more ids than the model.
        OSError: the run folder cannot be written to.
    """
    place = free_place(run, flag="--run-dir")
    if not is_unicode(str(place)):
        raise CheckpointError(f"--run-dir {place}: a name that is not UTF-8, which no recipe can hold: name another.")
    opened, tokenizer = _checked(source)
    recipe = _recipe(opened, tokenizer, source, place)
    stored = {one.dtype for one in opened.stored().values()}
    origin = {"name": recipe.card.name, "weights_sha256": opened.sha256, "dtypes": sorted(stored)}

    with appears_whole(place) as folder:
        _copy_tokenizer(source, folder / "tokenizer", tokenizer)
        came_along = folder / IMPORTED
        came_along.mkdir()
        for name in CAME_ALONG:
            if (source / name).is_file():
                shutil.copyfile(source / name, came_along / name)
        _write_checkpoint(folder, opened, {"tokenizer_sha256": tokenizer.sha256, IMPORTED: origin})
        write_json(folder / "env.json", {IMPORTED: origin, **software.describe()})
        replace_text(folder / RECIPE_FILE, loading.to_toml(recipe))

    count, kind = parameters(recipe.model), "qwen3" if recipe.model.qk_norm else "llama"
    return {"folder": str(run), "params": count, "model_type": kind, **origin}


def is_imported(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, by its state.json, holds weights that were imported and not trained here."""
    return IMPORTED in state


def describe_imported(run: Path, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that describe an imported model that is exported again: its own card and licence.

    If no card came with it, the card says so.
    """
    name = state[IMPORTED]["name"]
    text = f"# {name}\n\nThese weights were imported into ds_slm, and exported again without any training.\n"
    card = f"{text}Nothing is known here of how they were made: no model card came with them.\n".encode()
    came = {one: run / IMPORTED / one for one in (CARD, *LICENCES)}
    return {CARD: card, **{one: path.read_bytes() for one, path in came.items() if path.is_file()}}


def _checked(source: Path) -> tuple[OpenModel, Tokenizer]:
    """The model and its tokenizer; does not write. Raises UserError with the problems of both."""
    if (source / RECIPE_FILE).is_file():
        raise CheckpointError(f"{source} is a run folder already: expected a folder in the Hugging Face format.")
    if not (source / "config.json").is_file():
        there = "holds no config.json" if source.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{source} {there}: expected a model in the Hugging Face format; one on the hub comes with `hf download "
            "ORG/NAME --local-dir DIR`."
        )

    problems: list[str] = []
    opened = tokenizer = None
    try:
        opened = open_model(source)
        opened.refuse_other_parameters()
        _refuse_other_head(opened)
        problems += [f"{one}." for one in effects.mistakes({"model": opened.shape})]
    except UserError as error:
        problems += error.problems
    try:
        tokenizer = _tokenizer_of(source)
    except UserError as error:
        problems += error.problems

    if opened and tokenizer and tokenizer.vocab_size > opened.shape.vocab_size:
        problems.append(
            f"the tokenizer in {source} has {tokenizer.vocab_size} ids, the model {opened.shape.vocab_size}: it is not "
            "the one the model was trained with."
        )
    if problems or opened is None or tokenizer is None:
        raise CheckpointError(problems)
    return opened, tokenizer


def _tokenizer_of(source: Path) -> Tokenizer:
    if not (source / "tokenizer.json").is_file():
        raise DataError(
            f"{source} holds no tokenizer.json: copy the tokenizer's files there; where there is only a "
            "tokenizer.model or a vocab.json, write it in Python: from transformers import AutoTokenizer; "
            f"AutoTokenizer.from_pretrained({str(source)!r}).save_pretrained({str(source)!r})"
        )
    return load_tokenizer(source)


def _refuse_other_head(opened: OpenModel) -> None:
    """Raise CheckpointError if a tied head is stored beside the embedding, but differs from it."""
    if not opened.shape.tie_word_embeddings:
        return
    embedding = opened.stored()[EMBEDDING]
    for path in opened.files:
        with checkpoint_files.open_tensors(path) as head:
            if HEAD in head.keys():  # noqa: SIM118 - not a dict
                with checkpoint_files.open_tensors(embedding.path) as other:
                    same = torch.equal(head.get_tensor(HEAD), other.get_tensor(EMBEDDING))
                if not same:
                    raise CheckpointError(
                        f"config.json says that the head is the embedding (tie_word_embeddings), and {path} holds "
                        f"another {HEAD}: set it to false, or take that tensor out."
                    )


def _copy_tokenizer(source: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's files, with a configuration that transformers 4 and 5 read in the same way."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)

    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(readable_by_both(read_json(path) or {}, tokenizer.eos_token), indent=2) + "\n")


def readable_by_both(config: Mapping[str, Any], eos_token: str) -> dict[str, Any]:
    """A tokenizer's configuration for transformers 4, which refuses the words that transformers 5 writes.

    Args:
        config: the content of tokenizer_config.json.
        eos_token: the EOS if the configuration does not name one.
    """
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "backend", "is_local")}
    if kept.get("tokenizer_class") in ("TokenizersBackend", None):
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept.get("eos_token") is None:
        kept["eos_token"] = eos_token
    return kept


def _write_checkpoint(run: Path, opened: OpenModel, notes: Mapping[str, Any]) -> None:
    """Write the checkpoint of step 0, with one tensor in memory at a time."""
    stored = opened.stored()
    writer = checkpoint_files.Writer(run, step=0)
    with ExitStack() as held:
        files = {path: held.enter_context(checkpoint_files.open_tensors(path)) for path in opened.files}
        shapes = {name: one.shape for name, one in stored.items()}
        with writer.begin_tensors(checkpoint_files.MODEL, shapes) as written:
            for name in in_file_order(shapes):
                try:
                    values = files[stored[name].path].get_tensor(name)
                except SafetensorError as error:
                    raise CheckpointError(f"{stored[name].path} cannot be read ({error}).") from error
                written.write(values.to(torch.float32).contiguous().view(-1))
            writer.end_tensors(checkpoint_files.MODEL, written)

    checkpoint = writer.commit({"step": 0, "position": 0, "tokens": 0, "ledger": "", **notes})
    checkpoint_files.mark_latest(checkpoint)


def _recipe(opened: OpenModel, tokenizer: Tokenizer, source: Path, run: Path) -> Recipe:
    """The recipe of a run that would go on from here; choices that a model does not state are ours, in [unstated]."""
    shape, name = opened.shape, source.resolve().name
    name = name if name and is_unicode(name) else "imported"
    seq_len = min(FIRST_LENGTH, shape.max_position_embeddings)
    ours = "ours, to begin with: an imported model does not tell how it was trained"

    return Recipe.model_validate(
        {
            "card": {
                "name": name,
                "reproduces": "a model that was imported and not trained here",
                "params": parameters(shape),
                "sources": {"model": "its config.json", "tokenizer": "its tokenizer.json"},
            },
            "model": shape,
            "tokenizer": {
                "kind": "hf",
                "vocab_size": tokenizer.vocab_size,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "path": str(run / "tokenizer"),
            },
            "data": {
                "seq_len": seq_len,
                "source": [{"name": "text", "kind": "files", "path": "a-text-of-your-own"}],
            },
            "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
            "schedule": {"kind": "cosine", "warmup_steps": FIRST_STEPS // 20},
            "train": {"global_batch_tokens": FIRST_ROWS * seq_len, "steps": FIRST_STEPS},
            "unstated": {
                "data.source": "not known: --source text=PATH names a text to go on with",
                **dict.fromkeys(("data.seq_len", "optimizer", "schedule", "train"), ours),
            },
        }
    )
