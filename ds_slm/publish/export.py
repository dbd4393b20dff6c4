"""A Hugging Face folder from named tensors: what `AutoModelForCausalLM.from_pretrained` loads.

    run folder --> checkpoint --> fp32 tensors by name --> .export.tmp-*/ --> every file fsynced --> renamed to OUT

    config.json  generation_config.json  model.safetensors  the tokenizer's files  README.md and its pictures
    the weights in fp32, or rounded to a 16-bit type, which config.json names for transformers 4 and 5
    OUT-f16.gguf if asked for, named after the folder
    modeling_exclusive.py if the model has exclusive attention; the chat template of an assistant

The tokenizer pads on the left, and its chat template lacks the marks of training, so that any Jinja renders it.
config.json has the tokenizer's hash, generation_config.json the unused ids, which must never be generated.
A tied head is stored once, as the embedding, so that transformers counts the same parameters as the recipe.
Known gap: one safetensors file, however large.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.shards.identity import MANIFEST
from ds_slm.data.tokenizers.chat_template import unmarked
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, GENERATION_CONFIG, IM_END, load_tokenizer
from ds_slm.errors import CheckpointError
from ds_slm.files import read_json, sha256_of
from ds_slm.model import hf
from ds_slm.model.decoder import Decoder
from ds_slm.model.kernels import DTYPES
from ds_slm.publish.place import appears_whole, free_place
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Model

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class WeightFormat:
    """In what precision an export stores its weights."""

    dtype: str = "fp32"
    """The type in the folder: one of DTYPES."""
    gguf: str | None = None
    """The type in a GGUF file beside the others, named after the folder: f16 or q8_0; None for no such file."""


FP32 = WeightFormat()


def export_run(
    run: Path,
    out: Path,
    step: int | None = None,
    best: bool = False,
    describe: Callable[[Path], Mapping[str, bytes]] = lambda checkpoint: {},
    weights: WeightFormat = FP32,
) -> dict[str, Any]:
    """Export a run's checkpoint: of a step, the best, or the newest whole one.

    Args:
        run: the run folder.
        out: the folder to make.
        step: the checkpoint's step.
        best: take the checkpoint with the lowest validation loss.
        describe: gives the files of a checkpoint's model card, by name; called before anything is written.
        weights: how the weights are stored.

    Returns:
        What was exported: checkpoint, step, parameters, dtype, folder and sha256 of its weights; a GGUF file as well.

    Raises:
        CheckpointError: the run has no such whole checkpoint, or has another tokenizer, or `out` is in the way.
        UserError: llama.cpp cannot have this model or its tokenizer, found before a weight is read; or a weight is too
            large for its type.
    """
    if not (run / "recipe.toml").is_file():
        reason = "it holds no recipe.toml" if run.is_dir() else "there is no such folder"
        raise CheckpointError(f"{run} is not a run folder: {reason}.")
    free_place(out, run)

    recipe = loading.load_recorded(run)
    checkpoint = checkpoint_files.choose(run, step=step, best=best)
    notes = checkpoint_files.read_state(checkpoint)

    tokenizer, trained_with = load_tokenizer(run / "tokenizer"), notes.get("tokenizer_sha256")
    if trained_with is not None and not tokenizer.has_sha256(trained_with):
        raise CheckpointError(
            f"{run / 'tokenizer'} has sha256 {tokenizer.sha256}, {checkpoint} was trained with {trained_with}: "
            "restore the tokenizer the run had."
        )

    gguf_file = None
    if weights.gguf:
        from ds_slm.publish import gguf  # few exports need it, and its import takes a while

        gguf_file = gguf.prepare(recipe.model, run / "tokenizer", recipe.card.name, weights.gguf)
    gguf_name = name_of_gguf(out, weights.gguf) if weights.gguf else ""
    dtype = DTYPES[weights.dtype]
    described = describe(checkpoint)
    state = checkpoint_files.read_model(checkpoint)
    with export_folder(state, recipe.model, run / "tokenizer", out, dtype) as folder:
        for name, content in described.items():
            (folder / name).write_bytes(content)
        if gguf_file:
            gguf_file.write(folder / gguf_name, state)

    exported = {
        "checkpoint": str(checkpoint),
        "step": notes["step"],
        "params": sum(tensor.numel() for tensor in state.values()),
        "dtype": name_of(dtype),
        "folder": str(out),
        "sha256": sha256_of(out / WEIGHTS),
    }
    if gguf_file:
        exported["gguf"] = {"file": str(out / gguf_name), "stored": gguf_file.stored}
    return exported


def name_of_gguf(out: Path, precision: str) -> str:
    """The GGUF file's name in an exported folder: the folder's name, because such a file is often moved alone."""
    return f"{out.resolve().name}-{precision}.gguf"


def export(
    state: Mapping[str, Tensor],
    shape: Model,
    tokenizer_folder: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a Hugging Face folder. It appears whole, or not at all.

    Args:
        state: every parameter by name, in any dtype.
        shape: the shape the parameters must have.
        tokenizer_folder: a folder that transformers can load; its files are copied.
        out: the folder to make; it may exist empty.
        dtype: the type of the stored weights.

    Returns:
        The number of parameters; a tied head counts once.

    Raises:
        CheckpointError: `out` is not empty, names or shapes are not the model's, or a weight is too large for `dtype`.
        DataError: the tokenizer cannot be read.
    """
    with export_folder(state, shape, tokenizer_folder, out, dtype):
        return sum(tensor.numel() for tensor in state.values())


@contextlib.contextmanager
def export_folder(
    state: Mapping[str, Tensor],
    shape: Model,
    tokenizer_folder: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Path]:
    """Within it the folder of `export` is complete under a temporary name, and takes more files; then it is `out`."""
    out = free_place(out)
    refuse_other_shape(state, shape)
    _refuse_overflow(state, dtype)
    tokenizer = load_tokenizer(tokenizer_folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_folder} has {tokenizer.vocab_size} ids, the model {shape.vocab_size}: "
            "it is not the one the model was trained with."
        )

    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    unused_ids = tokenizer.unused_ids(shape.vocab_size)
    generation: dict[str, Any] = hf.generation_config(**ids)
    is_assistant = (tokenizer_folder / CHAT_TEMPLATE_FILE).is_file() and tokenizer.has_token(IM_END)
    if is_assistant:  # the end of a turn also ends the answer
        generation["eos_token_id"] = [tokenizer.token_id(IM_END), tokenizer.eos_id]
    generation |= read_json(tokenizer_folder / GENERATION_CONFIG) or {}  # an imported model has its own
    if unused_ids:
        generation["suppress_tokens"] = unused_ids

    with appears_whole(out) as folder:
        for path in tokenizer_folder.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST:
                shutil.copyfile(path, folder / path.name)
        _make_readable_by_others(folder)

        config = hf.hf_config(shape, dtype=name_of(dtype), **ids) | {"tokenizer_sha256": tokenizer.sha256}
        _write_json(folder / "config.json", config)
        _write_json(folder / GENERATION_CONFIG, generation)
        if shape.exclusive_attention:
            shutil.copyfile(hf.MODELING_FILE, folder / hf.MODELING_FILE.name)
        _write_tensors(folder / WEIGHTS, state, dtype)
        yield folder


def _make_readable_by_others(folder: Path) -> None:
    """Change what only training needs, or leaves open, in a copy of a tokenizer's folder."""
    # A decoder goes on from the last token, so a shorter prompt of a batch is filled up in front.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    _write_json(config_file, config | {"padding_side": "left"})

    template_file = folder / CHAT_TEMPLATE_FILE
    if template_file.is_file():
        template_file.write_text(unmarked(template_file.read_text(encoding="utf-8")), encoding="utf-8")


def refuse_other_shape(state: Mapping[str, Tensor], shape: Model) -> None:
    """Raise CheckpointError with every parameter whose name or shape is not the model's, if there are any."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Decoder(shape).named_parameters()}
    problems = [f"{name} is missing." for name in expected.keys() - state.keys()]
    problems += [f"{name} belongs to no part of the model." for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name])}."
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name]
    ]
    if problems:
        raise CheckpointError(["these weights are not the recipe's model:", *sorted(problems)])


def _refuse_overflow(state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise CheckpointError with every parameter that has a weight beyond the largest number of a type, if any has."""
    largest = torch.finfo(dtype).max
    sizes = (
        {name: float(tensor.detach().abs().max()) for name, tensor in state.items()} if dtype == torch.float16 else {}
    )
    problems = [f"{name} holds {size:.6g}." for name, size in sizes.items() if size > largest]
    if problems:
        raise CheckpointError(
            [f"weights beyond {largest:,.0f}, the largest number of {name_of(dtype)}:", *problems, "Use --dtype bf16."]
        )


def _write_tensors(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((path.parent / "config.json").stat().st_mode)  # safetensors makes it readable only by its owner


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_of(dtype: torch.dtype) -> str:
    """The type's name in torch and config.json, such as float32."""
    return str(dtype).removeprefix("torch.")
