"""What is recorded of the golden artefacts when they are made, and measured again by tests/launch/test_golden.py.

The functions `of_...` ask the code for it: its names may change, what it gives may not.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint.resume import file_of_kind
from ds_slm.data.order import extend_ledger, ledger_text
from ds_slm.data.shards.prepared import Prepared
from ds_slm.engine.partitions import KINDS
from ds_slm.publish.export import export
from ds_slm.recipe.schema import Recipe

MADE = Path(__file__).parent / "made"
"""The artefacts, laid out as a user's working folder."""
EXPECTED = "expected.json"
RUN, EXPORT, DATA = "run", "export", "data"
PRETRAINING, FINE_TUNING = "tiny", "tiny-instruct"
"""Recipes; the prepared data of each has its name."""

RANKS, STEPS, SAVED_STEPS = 2, 12, (4, 8)
SKIPPED_ROWS = (57, 59)
"""Positions that the run leaves out, in the step after the last checkpoint: a resumption must remember them."""
ROW_STEPS = 3
"""Steps whose rows are recorded with all they hold."""


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file under a folder, by its place there; hidden files are left out."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    }


def of_data(prepared: Prepared, rows: Any) -> dict[str, Any]:
    """What is recorded of prepared data and of the rows that a run draws from them."""
    return {
        "sha256": prepared.sha256,
        "tokenizer_sha256": prepared.tokenizer_sha256,
        "train_tokens": prepared.train_tokens,
        "val_tokens": prepared.val_tokens,
        "ledger": _ledger(rows, prepared.sha256),
        "rows_sha256": _rows_sha256(rows),
    }


def of_checkpoint(run: Path, step: int) -> dict[str, Any]:
    """What is recorded of a checkpoint: one hash of it all, and its tensors as they are read."""
    checkpoint = checkpoint_files.folder_of_step(run, step)
    tensors = {}
    for kind in KINDS:
        with checkpoint_files.open_tensors(checkpoint / file_of_kind(kind)) as stored:
            tensors[kind] = _tensor_hashes((name, stored.get_tensor(name)) for name in sorted(stored.keys()))
    return {"sha256": checkpoint_files.manifest_sha256(checkpoint), "tensors": tensors}


def of_exports(run: Path, recipe: Recipe, chat_tokenizer: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of more exports of the run's last checkpoint, made in `folder`: in bf16, and as an assistant."""
    state = checkpoint_files.read_model(checkpoint_files.choose(run))
    export(state, recipe.model, run / "tokenizer", folder / "bfloat16", dtype=torch.bfloat16)
    export(state, recipe.model, chat_tokenizer, folder / "assistant")
    return {name: file_hashes(folder / name) for name in ("bfloat16", "assistant")}


def _tensor_hashes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> dtype, shape, and the sha256 of the values' bytes."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
        for name, tensor in tensors
    }


def _ledger(rows: Any, data_sha256: str) -> list[str]:
    """The ledger after each step of a run that leaves out no row."""
    links, position = [data_sha256], 0
    for _ in range(STEPS):
        links.append(extend_ledger(links[-1], ledger_text(rows.row_ids(position))))
        position = rows.next_position(position)
    return links[1:]


def _rows_sha256(rows: Any) -> str:
    """One hash of what the first steps' rows and all held-out rows hold: ids, weights, documents."""
    found, position = hashlib.sha256(), 0
    reads = [rows.read(rows.val_row_ids(), split) for split in rows.measures.values()]
    for _ in range(ROW_STEPS):
        reads.append(rows.read(rows.row_ids(position)))
        position = rows.next_position(position)
    for read in reads:
        for array in (read.token_ids, read.weights, read.document_ids):
            found.update(b"none" if array is None else f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()
