"""Checkpoints that records tell of and that are not there: nothing begins anew unasked, and no record is lost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.checkpoint import resume
from ds_slm.errors import CheckpointError
from ds_slm.run import folder
from tests.support import ranks
from tests.unit.checkpoint.test_files import write
from tests.unit.checkpoint.test_manager import HOSTS, Host, fail_at, faults, snapshots  # noqa: F401 - fixtures

ALONE: Any = SimpleNamespace(
    leads_host=True, rank=0, hosts=["here"], gather=lambda value: [value], broadcast=lambda value, source: value
)


def record(run: Path, *kinds_and_steps: tuple[str, int]) -> None:
    """Lines of metrics.jsonl."""
    lines = [json.dumps({"kind": kind, "step": step}) for kind, step in kinds_and_steps]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a link to nothing"])
@pytest.mark.parametrize("sign", ["saved.json", "done.json", "stopped.json"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path: Path, sign: str, there: str) -> None:
    """Oracle: refused with the step and the ways out, whatever file tells of it; the records are untouched."""
    record(tmp_path, ("train", 4))
    (tmp_path / sign).write_text(json.dumps({"step": 4}))
    if there == "an empty folder":
        (tmp_path / "checkpoints").mkdir()
    elif there == "a link to nothing":
        (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"step 4 was saved.*mount the disk.*To begin anew name another --run-di"):
        resume.find(ALONE, tmp_path, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("saves", "sign", "refused"),
    [
        ([10, 20], None, True),  # an older version's: the second waited for the first
        ([10], None, False),  # it may have been killed while it was saving
        ([10, 20], {"step": 0, "held_by": []}, False),  # no disk took any of them
        ([], {"step": "4"}, False),
    ],
)
def test_a_save_that_may_not_have_ended_is_no_sign(
    tmp_path: Path, saves: list[int], sign: dict[str, Any] | None, refused: bool
) -> None:
    """Oracle: by hand, for what older versions recorded and for runs that never saved anything whole."""
    record(tmp_path, *(("save", step) for step in saves), ("train", 21))
    if sign is not None:
        (tmp_path / "saved.json").write_text(json.dumps(sign))
    if refused:
        with pytest.raises(CheckpointError, match="step 10 was saved"):
            resume.find(ALONE, tmp_path, {})
    else:
        assert resume.find(ALONE, tmp_path, {}) is None


def test_an_older_checkpoint_is_resumed_and_the_lost_one_told_of(tmp_path: Path) -> None:
    """Oracle: the step and host that saved.json names; a copy of every record; nothing where the newest is there."""
    write(tmp_path, 100)
    folder.tell_saved(tmp_path, 100, ["here"])
    found = resume.find(ALONE, tmp_path, {})
    assert found is not None and found.lost == ""
    folder.tell_saved(tmp_path, 500, ["node1", "node2"])
    found = resume.find(ALONE, tmp_path, {})
    assert found is not None and found.content["step"] == 100
    assert found.lost.startswith("step 500 was saved on node1, node2, and no host of this launch holds it whole")

    assert folder.keep_records(tmp_path, 3) is None
    record(tmp_path, ("train", 100), ("train", 500))
    kept = folder.keep_records(tmp_path, 3)
    assert kept and kept.read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()


def test_every_host_knows_of_a_save(tmp_path: Path, faults: list) -> None:  # noqa: F811
    """Oracle: host 1's disk refuses the checkpoint of step 10 and both that of 20: both folders name 10, on host 0."""
    faults.append(fail_at("host1", "state", 10, 20))
    faults.append(fail_at("host0", "state", 20))

    def train(control: Any) -> list[tuple[int, list[str]]]:
        host = Host(control, tmp_path)
        told = []
        for step in (10, 20):
            host.save(step)
            told.append(folder.newest_saved(host.folder))
        return told

    assert ranks.run(HOSTS, train) == 2 * [2 * [(10, ["host0"])]]


@pytest.mark.parametrize("name", ["checkpoints", "logs", "tb"])
@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_is_in_a_folders_way_is_found_before_training(tmp_path: Path, name: str, kind: str) -> None:
    """Oracle: a sentence that names it and the way out; a link to a folder is none."""
    path = tmp_path / name
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name} is a {kind}, expected a folder: mend or remove it"):
        folder.refuse_unusable(tmp_path)
    path.unlink()
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    folder.refuse_unusable(tmp_path)


@pytest.mark.parametrize("name", ["env.json", "metrics.jsonl", "done.json", "ds_config.json"])
def test_a_folder_in_place_of_a_file_is_found_before_training(tmp_path: Path, name: str) -> None:
    """Oracle: a sentence that names it and the way out."""
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is a folder, expected a file: move it away"):
        folder.refuse_unusable(tmp_path)
