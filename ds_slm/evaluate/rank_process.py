"""The process of a rank that `ds-slm eval --devices` starts beside rank 0 (`on_devices`).

python -m ds_slm.evaluate.rank_process FILE_DESCRIPTOR RANK RANKS THREADS MODEL SHA256
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ds_slm.errors import CheckpointError, UserError
from ds_slm.evaluate.on_devices import PipeRanks
from ds_slm.evaluate.on_ranks import serve
from ds_slm.evaluate.opening import open_scorer


def main(arguments: Sequence[str]) -> None:
    """Score for rank 0 on a device of this machine; the arguments are those above."""
    *numbers, path, sha256 = arguments
    descriptor, rank, world_size, threads = map(int, numbers)

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    with Connection(descriptor) as pipe, Path(os.devnull).open("w") as nowhere:
        sys.stderr = nowhere  # only rank 0 prints
        score_for_rank_0(PipeRanks(rank, world_size, {0: pipe}), Path(path), sha256)


def score_for_rank_0(ranks: PipeRanks, path: Path, sha256: str) -> None:
    """Open a model and score what rank 0 sends, until rank 0 ends; report errors to it.

    Args:
        ranks: this rank's pipe.
        path: the model.
        sha256: the hash of rank 0's weights.
    """
    try:
        opened = open_scorer(path)
        if opened.facts["sha256"] != sha256:
            raise CheckpointError(f"{path} was written anew while it was opened: score it again.")
        serve(opened.scorer, ranks)
    except EOFError:
        return
    except Exception as error:  # whatever a forward raises, such as too little memory
        reason = (str(error) or "no reason given").splitlines()[0]
        unforeseen = [f"{type(error).__name__}: {reason}; the same command with --devices 1 may say more."]
        with suppress(ConnectionError):
            ranks.fail(error.problems if isinstance(error, UserError) else unforeseen)


if __name__ == "__main__":
    main(sys.argv[1:])
