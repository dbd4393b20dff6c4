"""Who may go on with a run: a launch that begins with what the run began with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.checkpoint import resume
from ds_slm.checkpoint.resume import refuse_other_beginning
from ds_slm.errors import CheckpointError

DATA = {"data_sha256": "d1", "tokenizer_sha256": "t1"}
BASE = {"base_sha256": "b1"}


@pytest.mark.parametrize(
    ("content", "identity", "said"),
    [
        ({**DATA, **BASE}, {**DATA, **BASE}, None),
        (DATA, DATA, None),
        ({**DATA, **BASE}, {**DATA, "base_sha256": "b2"}, "was trained with base_sha256 b1, this launch has b2"),
        ({**DATA, **BASE}, DATA, "began with a base, of weights b1.*add --base MODEL"),
        (DATA, {**DATA, **BASE}, "began without a base: leave out --base"),
        (DATA, {**DATA, "data_sha256": "d2"}, "was trained with data_sha256 d1"),
        ({"imported": {"name": "x"}}, DATA, "ds-slm train RECIPE --base RUN"),
    ],
)  # fmt: skip
def test_a_run_goes_on_as_it_began(content: dict, identity: dict, said: str | None) -> None:
    """Oracle: the hashes that were made up to be the same, others, or absent."""
    if said is None:
        refuse_other_beginning(Path("RUN"), content, identity, {})
    else:
        with pytest.raises(CheckpointError, match=said):
            refuse_other_beginning(Path("RUN"), content, identity, {})


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    """Oracle: refused with the steps there are; where there are none at all, the run is simply new."""
    alone: Any = SimpleNamespace(leads_host=True, rank=0, gather=lambda value: [value])
    assert resume.find(alone, tmp_path, {}) is None
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="steps 10, 20, none of them whole"):
        resume.find(alone, tmp_path, {})
