"""Prepares data again and again, ended before its n-th change on disk for every n, and each time goes on to the end.

    python killed_preparing.py RECIPE.toml FOLDER STEP --> FOLDER/N/data for N = 0, STEP, 2 STEP, ... as far as there
    are changes; prints the first N beyond them

One process that has imported everything forks a child for each try: `os._exit` loses whatever is buffered, as a kill
does.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_slm.data.shards import journal, prepare, writer
from ds_slm.data.sources import token_files
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe

KILLED = 9
EVERY_ADD = 47
"""Of the many appends to a shard, every so-manieth is a place to be killed at."""

journal.SHARD_TOKENS = 2_000
writer.BATCH_DOCUMENTS = 16
writer.JOURNAL_TOKENS = 2_500
token_files.COPY_TOKENS = 700


def main(recipe_path: str, folder: Path, step: int) -> None:
    """Runs until a try comes to its end without being killed."""
    recipe = loading.load(recipe_path)
    kill_at = 0
    while in_child(recipe, folder / str(kill_at) / "data", kill_at) == KILLED:
        assert in_child(recipe, folder / str(kill_at) / "data", None) == 0
        kill_at += step
    print(kill_at)


def in_child(recipe: Recipe, data_root: Path, kill_at: int | None) -> int:
    """The exit code of preparing in a child of its own."""
    child = os.fork()
    if child == 0:
        try:
            if kill_at is not None:
                arm(kill_at)
            prepare.prepare(recipe, data_root / "made", report=lambda line: None)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def arm(kill_at: int) -> None:
    """End this process before its change number `kill_at`."""
    seen = 0
    appended = 0

    def change(work: Callable[..., Any], counts: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            if counts():
                if seen == kill_at:
                    os._exit(KILLED)
                seen += 1
            return work(*arguments, **options)

        return counted

    def some_appends() -> bool:
        nonlocal appended
        appended += 1
        return appended % EVERY_ADD == 0

    journal._Part.add = change(journal._Part.add, some_appends)  # type: ignore[method-assign]
    os.fsync = change(os.fsync)
    os.replace = change(os.replace)
    Path.rename = change(Path.rename)  # type: ignore[method-assign]
    Path.unlink = change(Path.unlink)  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
