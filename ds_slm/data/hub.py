"""Datasets on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_slm.errors import DataError
from ds_slm.recipe.schema import Source


def read_hub(source: Source, mark: int) -> Iterator[tuple[str, int]]:
    """The documents of a hub dataset from a row on."""
    from datasets import load_dataset

    with _reachable(source):
        rows = load_dataset(str(source.id), source.config, split=source.split, streaming=True)
        for place, row in enumerate(rows.select_columns([source.column]).skip(mark), start=mark + 1):
            value = row[source.column]
            yield value if isinstance(value, str) else "", place


def downloaded_tokens(source: Source) -> Path:
    """The token files of a hub dataset, downloaded."""
    from huggingface_hub import snapshot_download

    with _reachable(source):
        return Path(snapshot_download(str(source.id), repo_type="dataset", allow_patterns="*.bin"))


@contextmanager
def _reachable(source: Source) -> Iterator[None]:
    """One error for the many kinds that the hub's libraries raise, with what to do without a hub."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"source {source.name!r}: the hub gave no {source.id!r} ({reason}); to do without it, {way_out(source)}."
        ) from error


def way_out(source: Source) -> str:
    """What to do without a hub, and where a path is wrong."""
    return f"name a local file or folder with --source {source.name}=PATH"


def hub_identity(source: Source) -> dict[str, Any]:
    """What tells this dataset from others."""
    return {"kind": "hub", "id": source.id, "config": source.config, "split": source.split, "column": source.column}
