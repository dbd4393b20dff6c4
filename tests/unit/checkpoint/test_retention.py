"""Which checkpoints stay, and what is in their way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import retention
from tests.unit.checkpoint.test_files import write


def damage(checkpoint: Path) -> None:
    """One byte less."""
    state = checkpoint / "state.json"
    state.write_bytes(state.read_bytes()[:-1])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step-"))


def test_damaged_newer_checkpoints_take_no_place(tmp_path: Path) -> None:
    """Oracle: by hand: 100 and 150 damaged, resumed from 50, saves at 60, 70, 80: whole are 70 and 80."""
    for step in (50, 100, 150):
        write(tmp_path, step)
    for step in (100, 150):
        damage(checkpoint_files.folder_of_step(tmp_path, step))
    whole = {50: retention.stamps(checkpoint_files.folder_of_step(tmp_path, 50))}
    for step in (60, 70, 80):
        whole[step] = retention.stamps(write(tmp_path, step))
        said = retention.retain(tmp_path, keep_last=2, keep_best=True, whole=whole)
        assert len(said) == (2 if step == 60 else 0)
    assert checkpoint_files.steps(tmp_path) == [70, 80]
    aside = [path.name for path in retention.set_aside_ones(tmp_path)]
    assert aside == ["step-00000100", "step-00000150"]


def lose(checkpoint: Path) -> None:
    """One file less."""
    (checkpoint / "model.safetensors").unlink()


def flip(checkpoint: Path) -> None:
    """One bit, the size stays."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("harm", [damage, lose, flip])
def test_what_is_damaged_after_it_was_written_takes_no_place(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """Steps 50 to 80 are written by one launch; 60 and 70 are damaged before 80 comes. Oracle: 50 and 80 stay."""
    whole = {step: retention.stamps(write(tmp_path, step)) for step in (50, 60, 70, 80)}
    for step in (60, 70):
        harm(checkpoint_files.folder_of_step(tmp_path, step))
    said = retention.retain(tmp_path, keep_last=2, keep_best=True, whole=whole)
    assert len(said) == 2 and checkpoint_files.steps(tmp_path) == [50, 80] == sorted(whole)
    assert not any(checkpoint_files.verify(checkpoint_files.folder_of_step(tmp_path, step)) for step in (50, 80))


def test_a_checkpoint_whose_times_changed_is_read_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files that are hashed: none of one that was just written, all of one whose times changed, once."""
    whole = {50: retention.stamps(write(tmp_path, 50))}
    read: list[str] = []
    fingerprint = checkpoint_files._fingerprint
    monkeypatch.setattr(checkpoint_files, "_fingerprint", lambda path: read.append(path.name) or fingerprint(path))
    retention.retain(tmp_path, 2, keep_best=True, whole=whole)
    assert read == []
    os.utime(checkpoint_files.folder_of_step(tmp_path, 50) / "state.json")
    retention.retain(tmp_path, 2, keep_best=True, whole=whole)
    retention.retain(tmp_path, 2, keep_best=True, whole=whole)
    assert sorted(read) == ["model.safetensors", "optimizer-exp_avg.safetensors", "state.json"]


def test_what_was_set_aside_is_told_of(tmp_path: Path, ds_slm: Any) -> None:
    """Oracle: exit code 0 (the run is whole), the file that is damaged, and that it is not used."""
    write(tmp_path, 50)
    for _ in range(2):
        again = write(tmp_path, 60)
        damage(again)
        retention.set_aside(again)
    told = ds_slm("verify", tmp_path)
    assert told.returncode == 0 and "damaged/step-00000060: set aside, not used: " in told.stdout
    assert "state.json" in told.stdout and "damaged/step-00000060.2: set aside" in told.stdout
    found = json.loads(ds_slm("verify", tmp_path, "--json").stdout)
    assert found["whole"] and set(found["set_aside"]) == {"damaged/step-00000060", "damaged/step-00000060.2"}


def test_what_is_no_checkpoint_stops_no_clearing_up(tmp_path: Path) -> None:
    """Oracle: links, a file and a foreign folder with checkpoints' names: none is followed, the rest is in order."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    linked = write(outside, 2)
    (outside / "mine").mkdir()
    (outside / "mine" / "thesis.txt").write_text("x")
    for step in (1, 3, 20, 21):
        write(run, step)
    folder = run / "checkpoints"
    (folder / "step-00000002").symlink_to(linked)
    (folder / "step-00000004").write_text("a file")
    (folder / "step-00000005").mkdir()
    (folder / "step-00000005" / "thesis.txt").write_text("x")
    (folder / "step-00000006").symlink_to(outside / "mine")
    (folder / "step-00000007").symlink_to(outside / "nothing")
    (folder / "step-00000099").mkdir()
    (folder / "step-000000020").mkdir()  # not how we write 20

    retention.retain(run, keep_last=2, keep_best=True)
    assert checkpoint_files.steps(run) == [20, 21]
    assert checkpoint_files.verify(linked) == [] and (outside / "mine" / "thesis.txt").is_file()
    aside = sorted(path.name for path in retention.set_aside_ones(run))
    assert aside == [f"step-{step:08d}" for step in (4, 5, 6, 7, 99)]
    assert (folder / "damaged" / "step-00000005" / "thesis.txt").is_file()
    write(run, 22)
    retention.retain(run, keep_last=2, keep_best=True)
    assert checkpoint_files.steps(run) == [21, 22]


def test_one_that_cannot_be_deleted_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: renaming step 2 fails: it is told of and stays, 1 and 3 go."""
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if Path(old).name == "step-00000002":
            raise PermissionError(1, "Operation not permitted")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    said = retention.retain(tmp_path, keep_last=1, keep_best=True)
    assert checkpoint_files.steps(tmp_path) == [2, 4]
    assert len(said) == 1 and "step-00000002 could not be put in order: Operation not permitted" in said[0]


def test_a_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: which ones are read: of three old ones the newest, once; never what is known, or goes anyway."""
    read: list[str] = []

    def verify(checkpoint: Path, read_it: bool) -> list[str]:
        read.extend([checkpoint.name] if read_it else [])
        return []

    monkeypatch.setattr(retention, "verify", lambda checkpoint, read: verify(checkpoint, read))
    for step in (1, 2, 3):
        write(tmp_path, step)
    whole: dict[int, retention.Stamps] = {}
    for step in (4, 5):
        whole[step] = retention.stamps(write(tmp_path, step))
        retention.retain(tmp_path, keep_last=3, keep_best=True, whole=whole)
    assert read == ["step-00000003", "step-00000002"]
    assert checkpoint_files.steps(tmp_path) == [3, 4, 5]


def test_a_damaged_pointer_keeps_nothing_from_being_cleared(tmp_path: Path) -> None:
    """Oracle: `best` holds bytes that are no text, `latest` a path: neither ends the clearing up."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "best").write_bytes(b"\xff\xfe")
    (tmp_path / "checkpoints" / "latest").write_text("../../etc")
    assert retention.retain(tmp_path, keep_last=1, keep_best=True) == []
    assert checkpoint_files.steps(tmp_path) == [3]
    assert checkpoint_files.named_by(tmp_path, "best") is None


def test_the_best_stays_though_its_pointer_is_late(tmp_path: Path) -> None:
    """Oracle: `best` could not be moved from 1 to 2: both stay until it is."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint_files.mark_best(checkpoint_files.folder_of_step(tmp_path, 1))
    retention.retain(tmp_path, keep_last=1, keep_best=True, best_step=2)
    assert checkpoint_files.steps(tmp_path) == [1, 2, 3]
    checkpoint_files.mark_best(checkpoint_files.folder_of_step(tmp_path, 2))
    retention.retain(tmp_path, keep_last=1, keep_best=True, best_step=2)
    assert checkpoint_files.steps(tmp_path) == [2, 3]


def test_a_living_writer_keeps_its_folder(tmp_path: Path) -> None:
    """Oracle: temporary folders of a process that lives, of one that ended, and of another host: the second goes."""
    write(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lives:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        here = checkpoint_files.writer_name().rpartition("-")[0]
        places = {who: f".step-00000002.tmp-{who}" for who in (f"{here}-{lives.pid}", f"{here}-{ended.pid}", "else-1")}
        for place in places.values():
            (tmp_path / "checkpoints" / place).mkdir()
        retention.retain(tmp_path, keep_last=1, keep_best=True)
        left = {path.name for path in (tmp_path / "checkpoints").glob(".step-*")}
        assert left == {places[f"{here}-{lives.pid}"], places["else-1"]}
        lives.communicate(b"\n")
