"""The ledger of a run: which rows it trained on, as a chain of hashes, one link a step, in metrics.jsonl.

    metrics.jsonl --read--> step -> ledger --compare--> how far two runs drew the same rows in the same order

The chain begins with the hash of the data. Every link covers all rows before it (ds_slm.data.order), so one equal link
proves every earlier step, also those that `run.log_every_steps` left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ds_slm.errors import CheckpointError
from ds_slm.run.metrics_file import METRICS


@dataclass(frozen=True)
class Comparison:
    """How far two ledgers agree."""

    same_until_step: int
    """The last step up to which the rows are known to be the same; 0 if not even the first is."""
    differ_at_step: int | None
    """The first common step at which the rows differ; None if they never do."""


def read(run: Path) -> dict[int, str]:
    """Step -> ledger, in order.

    Raises:
        CheckpointError: the folder has no metrics.jsonl, a line of it is damaged, or it holds no step.
    """
    path = run / METRICS
    if not path.is_file():
        raise CheckpointError(f"{run} holds no metrics.jsonl: name the folder of a run that has trained.")

    ledger, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                ledger[int(record["step"])] = str(record["ledger"])
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}, line {number} is damaged ({error}): resuming the run mends it.")

    if problems:
        raise CheckpointError(problems)
    if not ledger:
        raise CheckpointError(f"{path} holds no training step yet: let the run take one.")
    return dict(sorted(ledger.items()))


def compare(ours: dict[int, str], theirs: dict[int, str]) -> Comparison:
    """How far two runs drew the same rows. Raises CheckpointError if they logged no step in common."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise CheckpointError("the two runs logged no step in common: nothing to compare; see run.log_every_steps.")
    differing = next((step for step in common if ours[step] != theirs[step]), None)
    same = [step for step in common if ours[step] == theirs[step]]
    return Comparison(same[-1] if same else 0, differing)
