"""A preparation that did not end, because it failed or was killed, binds no later one.

    prepare --marked--> .unfinished.json names the parts that it makes --whole--> the mark is removed
    prepare again: parts that are named there and that belong to another recipe by now --drop--> made anew

Parts of a preparation that ended are never dropped: they are used, or refused. Nothing is dropped where the recipe is
the same: such a preparation goes on where it stopped. All of this happens under the folder's lock.

Known gap: folders of older versions have no mark; what they hold is refused where it belongs to another recipe.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_slm.data.shards.identity import MANIFEST, TOKENIZER
from ds_slm.files import is_plain_name, read_json, write_json

MARK = ".unfinished.json"


@contextmanager
def marked(folder: Path, missing: Collection[str]) -> Iterator[None]:
    """Name the parts that are being made, besides those of an earlier preparation that did not end, until all are."""
    parts = sorted({*unfinished_parts(folder), *missing})
    write_json(folder / MARK, {"parts": parts})
    yield
    (folder / MARK).unlink(missing_ok=True)


def unfinished_parts(folder: Path) -> list[str]:
    """The parts that a preparation which did not end has made, or begun."""
    parts = (read_json(folder / MARK) or {}).get("parts", [])
    return [part for part in parts if is_plain_name(part)]


def drop(folder: Path, conflicting: Collection[str], report: Callable[[str], None]) -> None:
    """Remove the conflicting parts of a preparation that did not end, and with a tokenizer all that it encoded.

    Args:
        folder: the folder of the prepared data; its lock is held.
        conflicting: parts that were made with another recipe, other files or for another base.
        report: takes a line if something is removed.
    """
    unfinished = [part for part in unfinished_parts(folder) if (folder / part / MANIFEST).is_file()]
    dropped = unfinished if TOKENIZER in unfinished and TOKENIZER in conflicting else set(unfinished) & {*conflicting}
    if dropped:
        names = ", ".join(sorted(dropped))
        report(f"{folder}: {names} of an earlier preparation, which did not end, had other settings: made anew")
    for part in dropped:
        shutil.rmtree(folder / part)
