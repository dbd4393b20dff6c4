"""MODEL on a command line: a run folder, one of its checkpoints, or a Hugging Face folder, opened the same way.

    path --open_model--> shape, tokenizer folder, sha256, and `read()`: fp32 tensors by name; `tensors()` one at a time

A run folder gives its newest whole checkpoint, RUN/checkpoints/best the best one, RUN/checkpoints/step-00000100 the one
of a step. A Hugging Face folder must hold safetensors: no pickle is loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.sources.stand_ins import stand_in_at
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import CheckpointError, UserError
from ds_slm.files import NeededFolder, is_plain_name, read_json, shortened
from ds_slm.model import hf
from ds_slm.model.decoder import Decoder
from ds_slm.publish.export import refuse_other_shape
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model

INDEX = "model.safetensors.index.json"
"""The file in which transformers lists which of several files holds which tensor."""


HEAD = "lm_head.weight"
DTYPES = ("F32", "BF16", "F16")
"""The types in which weights may be stored, by safetensors' names: fp32 holds each of these exactly."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
"""Suffixes of files that hold weights; only a model's own safetensors are read."""
CONFIG = "config.json"


class StoredTensor(NamedTuple):
    """A tensor that is not yet read."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OpenModel:
    """A trained model, not yet read."""

    name: str
    """Its name, from its run's recipe or its folder."""
    folder: Path
    """The checkpoint or folder that was chosen."""
    shape: Model
    tokenizer_folder: Path
    sha256: str
    """One hash of all weights."""
    files: tuple[Path, ...]
    """Its safetensors files."""

    def read(self) -> dict[str, Tensor]:
        """Its parameters by name, in fp32; a tied head occurs once."""
        return dict(self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one at a time. Raises CheckpointError if a file cannot be read."""
        for path in self.files:
            try:
                with checkpoint_files.open_tensors(path) as stored:
                    for name in self._names(stored):
                        yield name, stored.get_tensor(name).to(torch.float32)
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read ({error}): get an intact copy.") from error

    def decoder(self, device: torch.device) -> Decoder:
        """The model in fp32, for running, not training. Raises CheckpointError if its parameters do not fit."""
        self.refuse_other_parameters()
        with torch.device("meta"):
            model = Decoder(self.shape)
        model.load_state_dict(self.read(), assign=True, strict=False)
        return model.to(device).eval()

    def refuse_other_parameters(self) -> None:
        """Raise CheckpointError if names, shapes or types of the tensors are not the model's; reads no tensor."""
        stored = self.stored()
        problems = [
            f"{name} is stored as {one.dtype}, expected one of {', '.join(DTYPES)}."
            for name, one in stored.items()
            if one.dtype not in DTYPES
        ]
        if problems:
            raise CheckpointError([f"{self.folder} holds numbers that this decoder does not read:", *problems])
        refuse_other_shape({name: torch.empty(one.shape, device="meta") for name, one in stored.items()}, self.shape)

    def stored(self) -> dict[str, StoredTensor]:
        """The place of each parameter. Raises CheckpointError if a file is damaged, or a name occurs twice."""
        found: dict[str, StoredTensor] = {}
        for path in self.files:
            try:
                with checkpoint_files.open_tensors(path) as stored:
                    for name in self._names(stored):
                        if name in found:
                            raise CheckpointError(f"{self.folder} holds {name} twice: get an intact copy.")
                        one = stored.get_slice(name)
                        found[name] = StoredTensor(path, tuple(one.get_shape()), one.get_dtype())
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read ({error}): get an intact copy.") from error
        return found

    def _names(self, stored: Any) -> list[str]:
        """A file's parameters, without a tied head's copy and the angles that old versions of transformers stored."""
        names = [name for name in stored.keys() if not name.endswith(".rotary_emb.inv_freq")]  # noqa: SIM118
        return [name for name in names if not (self.shape.tie_word_embeddings and name == HEAD)]


def open_model(path: Path) -> OpenModel:
    """Find and verify a model.

    Raises:
        CheckpointError: there is none, it is damaged, or this decoder cannot have its shape.
    """
    refuse_no_model(path)
    if (path / loading.RECIPE_FILE).is_file():
        return _open_checkpoint(path, checkpoint_files.choose(path))
    if (path / CONFIG).is_file():
        return _open_hf(path)

    # One checkpoint of a run, by its folder's name.
    run = root_of(path)
    if path.name == "best":
        return _open_checkpoint(run, checkpoint_files.choose(run, best=True))
    return _open_checkpoint(run, checkpoint_files.choose(run, step=int(path.name.removeprefix("step-"))))


def refuse_no_model(path: Path) -> None:
    """Raise CheckpointError if a path cannot name a model, judged only by the names of its files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a run folder, a checkpoint or a Hugging Face folder.")

    run = root_of(path)
    is_checkpoint = run != path and (path.name == "best" or path.name.removeprefix("step-").isdecimal())
    is_run = (run / loading.RECIPE_FILE).is_file() and (run == path or is_checkpoint)
    if not is_run and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} is not a model: expected a run folder (with recipe.toml), one of its checkpoints, or a Hugging "
            "Face folder (with config.json)."
        )


def root_of(path: Path) -> Path:
    """The folder that holds all of a model; for RUN/checkpoints/best or .../step-NUMBER it is the run folder."""
    is_checkpoint = path.name == "best" or path.name.startswith("step-")
    return path.parents[1] if is_checkpoint and path.parent.name == checkpoint_files.CHECKPOINTS else path


def files_of(path: Path, opened: OpenModel) -> tuple[str, ...] | None:
    """All files that another host needs to open the same model at the same path, relative to `root_of` the path.

    The last one marks the model as whole. None for a Hugging Face folder that is named like a checkpoint.
    """
    root, chosen = root_of(path), opened.folder
    if opened.tokenizer_folder == chosen:  # a Hugging Face folder
        others = [one for one in sorted(chosen.iterdir()) if one.is_file() and one.suffix not in WEIGHTS]
        found = [*opened.files, *(one for one in others if one.name != CONFIG), chosen / CONFIG]
        return tuple(one.name for one in found) if root == path else None

    pointers = [chosen.parent / name for name in ("latest", "best")]
    pointers = [one for one in pointers if one.is_file() and one.read_text().strip() == chosen.name]
    weights = [one for one in sorted(chosen.iterdir()) if one.name != checkpoint_files.MANIFEST]
    tokenizer = [one for one in sorted(opened.tokenizer_folder.iterdir()) if one.is_file()]
    files = [root / loading.RECIPE_FILE, *tokenizer, *pointers, *weights, chosen / checkpoint_files.MANIFEST]
    return tuple(one.relative_to(root).as_posix() for one in files)


def needed_base(path: Path, opened: Callable[[], OpenModel]) -> NeededFolder:
    """The folder of a base model, which every host needs.

    Args:
        path: the path that names it.
        opened: opens it; if that fails, the host receives the folder and opens it again.
    """
    root = root_of(path)
    try:
        files = files_of(path, opened())
    except UserError:  # another host may have it; if none has, opening it says what is wrong
        files = None
    has_one = (root / CONFIG).exists() or bool(checkpoint_files.steps(root))
    return NeededFolder(str(path), root, files, is_absent=not has_one, lock=root)


def open_base(path: Path, recipe: Recipe) -> OpenModel:
    """Find and verify a model that a run of this recipe can begin with.

    Raises:
        CheckpointError: there is none, it is damaged, or its shape is not the recipe's.
    """
    opened = open_model(path)
    refuse_other_base(recipe, opened)
    opened.refuse_other_parameters()
    return opened


def refuse_other_base(recipe: Recipe, base: OpenModel) -> None:
    """Raise CheckpointError with every difference if the base model has another shape than the recipe."""
    free = {"init_std", "embedding_init_std", "scaled_residual_init"}
    ours, theirs = recipe.model.model_dump(exclude=free), base.shape.model_dump(exclude=free)
    problems = [
        f"model.{field} is {ours[field]!r} in the recipe and {theirs[field]!r} in {base.folder}."
        for field in ours
        if ours[field] != theirs[field]
    ]
    if problems:
        own = root_of(base.folder) / loading.RECIPE_FILE
        taken = f"`base = {json.dumps(str(own))}`" if own.is_file() else "the recipe.toml of its import as `base`"
        way_out = f"A recipe with {taken} at its head takes the model's shape (docs/fine-tuning.md); or name another."
        raise CheckpointError(["--base is not a model of this recipe:", *problems, way_out])


def _open_checkpoint(run: Path, checkpoint: Path) -> OpenModel:
    recipe = loading.load_recorded(run)
    trained_with = checkpoint_files.read_state(checkpoint).get("tokenizer_sha256")
    _refuse_other_tokenizer(run / "tokenizer", trained_with)
    sha256 = checkpoint_files.model_sha256(checkpoint)
    files = (checkpoint / checkpoint_files.MODEL,)
    return OpenModel(recipe.card.name, checkpoint, recipe.model, run / "tokenizer", sha256, files)


def _open_hf(folder: Path) -> OpenModel:
    # A download may have left stand-ins for the files.
    readable = (
        path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors") and path.is_file()
    )
    if problems := [f"{path} cannot be read ({what})." for path in readable if (what := stand_in_at(path))]:
        raise CheckpointError(problems)

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is no JSON ({error}): get an intact copy.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no object: get an intact copy.")

    files = weight_files(folder)
    _refuse_other_tokenizer(folder, config.get("tokenizer_sha256"))
    shape = hf.shape_from_hf(config)
    return OpenModel(folder.resolve().name, folder, shape, folder, sha256_of_weights(files), tuple(files))


def sha256_of_weights(files: Sequence[Path]) -> str:
    """One hash of several files of weights."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; if it has an index, the files that the index names.

    Raises CheckpointError if there is none, or if the index names a missing file.
    """
    path = folder / INDEX
    if not path.is_file():
        if found := sorted(folder.glob("*.safetensors")):
            return found
        raise CheckpointError(_no_safetensors(folder))

    index = read_json(path)
    named = index.get("weight_map") if index else None
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{path} is damaged (no weight_map): get an intact copy.")

    names = sorted({str(name) for name in named.values()})
    problems = [
        f"{path} names {name!r}, which is a path and no file beside it." for name in names if not is_plain_name(name)
    ]
    problems += [
        f"{folder / name}, which {INDEX} names, is not there: get an intact copy."
        for name in names
        if is_plain_name(name) and not (folder / name).is_file()
    ]
    if problems:
        raise CheckpointError(problems)

    return [folder / name for name in names]


def _no_safetensors(folder: Path) -> str:
    """The message that a folder holds none, with the way out from the files that it holds instead."""
    pickles = shortened(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES))
    if not pickles:
        return f"{folder} holds no .safetensors file: save the model in that format, no pickle is read."
    return (
        f"{folder} holds no .safetensors file, but {pickles}: loading a pickle runs the code in it, so none is loaded. "
        "Convert a copy that you trust, in Python: from transformers import AutoModelForCausalLM; "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained('NEW FOLDER'); and copy "
        "the tokenizer's files there."
    )


def _refuse_other_tokenizer(folder: Path, trained_with: str | None) -> None:
    if trained_with is not None and not (found := load_tokenizer(folder)).has_sha256(trained_with):
        raise CheckpointError(
            f"{folder} holds the tokenizer {found.sha256}, its model was trained with {trained_with}: get an intact "
            "copy."
        )
