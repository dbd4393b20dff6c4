"""Which rows earlier launches of a run left out: the newest one's env.json says it, and so does every checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_slm.data.skipping import Ranges, merged
from ds_slm.distributed.ranks import Control
from ds_slm.files import read_json
from ds_slm.run import launches


def recorded(control: Control, run: Path, content: Mapping[str, Any]) -> Ranges:
    """The rows that earlier launches left out, from the newest one's env.json, else from the checkpoint. Collective.

    Args:
        control: the ranks' connection.
        run: the run folder, each host's own.
        content: state.json of the checkpoint that is resumed; empty if there is none.
    """
    mine = (read_json(run / "env.json") or {}).get("skipped_rows")
    holders = [(*order, ranges) for order, ranges in control.gather([launches.holder(run).order, mine])]
    generation, launch_id, ranges = max(holders, key=lambda one: one[:2])
    of_launch, of_checkpoint = _valid(ranges), _valid(content.get("skipped_rows"))
    if generation and launch_id and ranges is not None:
        return of_launch
    return merged([*of_launch, *of_checkpoint])  # an older version's launch recorded its own flags alone


def _valid(found: Any) -> Ranges:
    try:
        return merged(found or ())
    except (TypeError, ValueError, IndexError):
        return ()
