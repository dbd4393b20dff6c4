"""Checkpoints on disk: whole, or they do not exist."""

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import resume, retention
from ds_slm.errors import CheckpointError


def write(run: Path, step: int, value: float = 1.0) -> Path:
    """A small checkpoint."""
    writer = checkpoint_files.Writer(run, step)
    writer.add_tensors(checkpoint_files.MODEL, {"a": torch.full((3, 2), value), "b": torch.arange(4.0)})
    writer.add_tensors("optimizer-exp_avg.safetensors", {"a": torch.zeros(3, 2)})
    checkpoint = writer.commit({"step": step, "note": "x"})
    checkpoint_files.mark_latest(checkpoint)
    return checkpoint


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Tensors and state come back; `latest` names the newest."""
    write(tmp_path, 3)
    checkpoint = write(tmp_path, 12, 2.5)
    assert checkpoint_files.verify(checkpoint) == []
    assert checkpoint_files.newest_whole(tmp_path) == checkpoint
    assert torch.equal(checkpoint_files.read_model(checkpoint)["a"], torch.full((3, 2), 2.5))
    assert checkpoint_files.read_state(checkpoint) == {"step": 12, "note": "x"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000012"
    assert checkpoint_files.steps(tmp_path) == [3, 12]


def test_verify_names_what_is_damaged(tmp_path: Path, ds_slm: Any) -> None:
    """Oracle: exit code 0 and `whole` for each; after a byte is gone, code 2, the checkpoint and the file."""
    write(tmp_path, 3)
    newer = write(tmp_path, 12)
    whole = ds_slm("verify", tmp_path)
    assert (whole.returncode, whole.stdout.splitlines()) == (0, ["step-00000003: whole", "step-00000012: whole"])
    (newer / "state.json").write_bytes((newer / "state.json").read_bytes()[:-1])
    damaged = ds_slm("verify", tmp_path, "--json")
    found = json.loads(damaged.stdout)["checkpoints"]
    assert damaged.returncode == 2 and found["step-00000003"] == []
    assert "state.json" in found["step-00000012"][0]
    assert "step-00000012 damaged" in damaged.stderr and "Traceback" not in damaged.stderr
    nothing = ds_slm("verify", tmp_path / "none")
    assert nothing.returncode == 2 and "holds no checkpoint" in nothing.stderr


class Alone:
    """A control of one rank that leads its host."""

    rank, leads_host = 0, True

    def gather(self, message: Any) -> list[Any]:
        return [message]

    def broadcast(self, message: Any, source: int) -> Any:
        return message


def test_another_base_or_data_is_no_resumption(tmp_path: Path) -> None:
    """Oracle: what differs, both hashes of it, and the ways out; the recipe's own rules are checked elsewhere."""
    writer = checkpoint_files.Writer(tmp_path, 3)
    writer.add_tensors(checkpoint_files.MODEL, {"a": torch.zeros(1)})
    began = {"base_sha256": "aaa", "data_sha256": "ddd", "recipe_sha256": "rrr"}
    writer.commit({"step": 3, **began})
    control: Any = Alone()
    found = resume.find(control, tmp_path, {**began, "recipe_sha256": "other"})
    assert found is not None and found.content["step"] == 3
    with pytest.raises(
        CheckpointError, match=r"trained with base_sha256 aaa, this launch has bbb.*another --run-dir"
    ) as refused:
        resume.find(control, tmp_path, {**began, "base_sha256": "bbb"})
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-exp_avg.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "swap"])
def test_damage_is_named_and_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    """Every file, damaged in every way: the newest whole checkpoint is the one before."""
    older, newer = write(tmp_path, 1), write(tmp_path, 2, 7.0)
    path = newer / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "delete":
        path.unlink()
    else:
        if name == "optimizer-exp_avg.safetensors":
            pytest.skip("the same in both checkpoints: nothing is damaged")
        shutil.copyfile(older / name, path)
    said: list[str] = []
    assert checkpoint_files.newest_whole(tmp_path, said.append) == older
    assert name in said[0] or "manifest" in said[0]
    with pytest.raises(CheckpointError, match=r"Steps found in .*: 1, 2"):
        checkpoint_files.choose(tmp_path, step=2)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Oracle: 400 single bits in all files of a checkpoint, drawn with a seed: each is a problem, none a traceback."""
    rng, checkpoint = random.Random(7), write(tmp_path, 3)
    files = sorted(checkpoint.iterdir())
    for _ in range(400):
        path = rng.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert checkpoint_files.verify(checkpoint), (path.name, bytes(damaged))
        path.write_bytes(whole)
    assert checkpoint_files.verify(checkpoint) == []


def test_a_killed_writer_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A temporary folder is no checkpoint, and the next rotation removes it."""
    write(tmp_path, 1)
    checkpoint_files.Writer(tmp_path, 2).add_tensors("model.safetensors", {"a": torch.ones(1)})
    assert checkpoint_files.steps(tmp_path) == [1]
    retention.retain(tmp_path, keep_last=1, keep_best=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_rotation(tmp_path: Path) -> None:
    """The newest two and the best stay."""
    for step in range(1, 6):
        checkpoint = write(tmp_path, step)
        if step == 2:
            checkpoint_files.mark_best(checkpoint)
        retention.retain(tmp_path, keep_last=2, keep_best=True)
    assert checkpoint_files.steps(tmp_path) == [2, 4, 5]
    assert checkpoint_files.choose(tmp_path, best=True).name == "step-00000002"
    retention.retain(tmp_path, keep_last=1, keep_best=False)
    assert checkpoint_files.steps(tmp_path) == [5]


def test_a_step_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    """A run that was resumed before a damaged checkpoint writes it anew."""
    first = write(tmp_path, 4, 1.0)
    (first / "state.json").unlink()
    write(tmp_path, 4, 2.0)
    assert checkpoint_files.verify(first) == []
    assert float(checkpoint_files.read_model(first)["a"][0, 0]) == 2.0


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    """Nothing on disk is trusted: a path in the manifest is not followed."""
    checkpoint = write(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (tmp_path / "outside").write_text("x")
    for name in ("../../outside", str(tmp_path / "outside"), "..", ""):
        named = {**manifest["files"], name: {"bytes": 1, "sha256": "0"}}
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": named}))
        [problem] = checkpoint_files.verify(checkpoint)
        assert f"names {name!r}, which is a path" in problem


def test_a_link_in_a_checkpoint_is_no_file_of_it(tmp_path: Path) -> None:
    """Oracle: refused although its content is right: what it leads to may change, or be another checkpoint's."""
    checkpoint = write(tmp_path, 1)
    (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    [problem] = checkpoint_files.verify(checkpoint)
    assert "model.safetensors: a link" in problem


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is saved again, and the process killed when the old checkpoint has lost its name and the new one has none.

    Oracle: the old one, whole, has its name again.
    """
    whole = write(tmp_path, 4)
    before = (whole / "manifest.json").read_bytes()
    monkeypatch.setenv("DS_SLM_DIE_AT", "old-moved@4")
    child = os.fork()
    if child == 0:
        write(tmp_path, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    assert checkpoint_files.newest_whole(tmp_path) is None
    checkpoint_files.put_back(tmp_path)
    assert checkpoint_files.newest_whole(tmp_path) == whole
    assert (whole / "manifest.json").read_bytes() == before and checkpoint_files.verify(whole) == []


def test_a_checkpoint_moved_away_in_vain_comes_back(tmp_path: Path) -> None:
    """A writer killed between its two renames: what it moved is whole, and has its name again; one replaced has not."""
    whole = write(tmp_path, 4)
    moved = whole.with_name(f".{whole.name}.tmp-host-1{checkpoint_files.REPLACED}")
    whole.rename(moved)
    assert checkpoint_files.newest_whole(tmp_path) is None
    checkpoint_files.put_back(tmp_path)
    assert checkpoint_files.newest_whole(tmp_path) == whole
    shutil.copytree(whole, moved)
    checkpoint_files.put_back(tmp_path)
    assert moved.is_dir() and checkpoint_files.verify(whole) == []
