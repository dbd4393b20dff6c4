"""metrics.jsonl, the records of a run: a JSON object a line, with its kind, step and values.

    metrics.jsonl --read--> kind --> records, for people, cards, proofs and measurements

records.py writes it, and cuts it where a resumed run goes on; ledger.py refuses a file with a damaged line.
"""

from pathlib import Path
from typing import Any

from ds_slm.files import read_json_lines

METRICS = "metrics.jsonl"
"""The file's name in a run folder."""


def read(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Kind -> records, in the file's order; damaged lines, and those without a step, are passed over."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_json_lines(run / METRICS):
        if isinstance(record.get("step"), int):
            found.setdefault(str(record.get("kind")), []).append(record)
    return found
