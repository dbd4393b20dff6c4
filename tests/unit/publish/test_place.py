"""`ds-slm export --out`: what cannot be taken is refused before a weight is read, and nothing is left behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.errors import CheckpointError
from ds_slm.files import obstacle, write_json
from ds_slm.publish import export as exporting
from ds_slm.publish.place import appears_whole, free_place
from ds_slm.recipe import loading
from tests.support.runs import TINY
from tests.unit.data.test_file_systems import mount, read_only  # noqa: F401 - a fixture


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose weights must not be looked for."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml").write_text(loading.to_toml(loading.parse(TINY)))
    write_json(folder / "env.json", {})
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read before the place is checked")

    monkeypatch.setattr(checkpoint_files, "choose", read)
    yield


def refusal(run: Path, out: Path) -> str:
    """The sentence with which a place is refused; or what else came of it, a change on disk among that."""
    before = sorted(run.parent.rglob("*"))
    try:
        exporting.export_run(run, out)
    except (CheckpointError, OSError) as error:
        after = sorted(run.parent.rglob("*"))
        return str(error) if after == before else f"left behind: {sorted({*after} ^ {*before})}"
    return "was taken"


def test_places_that_cannot_be_taken(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sentence for each kind of place; none of them a traceback or `Device or resource busy`."""
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "to-full").symlink_to(tmp_path / "full")
    (tmp_path / "here").mkdir()
    assert "file is a file, expected a folder" in refusal(run, tmp_path / "file")
    assert "file is a file, expected a folder" in refusal(run, tmp_path / "file" / "below")
    assert "is not an empty folder" in refusal(run, tmp_path / "full")
    assert "is not an empty folder" in refusal(run, tmp_path / "to-full")
    assert "nothing is a link to nothing" in refusal(run, tmp_path / "nothing")
    assert "nothing is a link to nothing" in refusal(run, tmp_path / "nothing" / "below")
    assert "lies in the run folder" in refusal(run, run)
    assert "lies in the run folder" in refusal(run, run / "export")
    assert "lies in the run folder" in refusal(run, run / "checkpoints" / "hf")
    monkeypatch.chdir(tmp_path / "here")
    assert "is the folder this command runs in" in refusal(run, Path("."))
    assert "is the folder this command runs in" in refusal(run, Path(""))
    assert "is not an empty folder" in refusal(run, Path(".."))
    assert "is not an empty folder" in refusal(run, Path("/"))
    assert "/proc" in refusal(run, Path("/proc/x"))


def test_a_mount_point_is_refused(run: Path, tmp_path: Path) -> None:
    """Oracle: a real mount; a folder within it can be taken."""
    (tmp_path / "mounted").mkdir()
    if not mount("--bind", tmp_path / "mounted", tmp_path / "mounted"):
        pytest.skip("this user may not mount")
    try:
        assert "is a mount point, which cannot be replaced: name a folder in it" in refusal(run, tmp_path / "mounted")
        assert free_place(tmp_path / "mounted" / "hf", run) == tmp_path / "mounted" / "hf"
    finally:
        os.system(f"umount -l '{tmp_path / 'mounted'}'")


def test_a_read_only_place_is_refused(run: Path, tmp_path: Path, read_only) -> None:  # noqa: F811
    """Oracle: a real read-only mount."""
    (tmp_path / "mounted").mkdir()
    read_only(tmp_path / "mounted")
    assert "Read-only file system" in refusal(run, tmp_path / "mounted" / "hf")


def test_places_that_can(run: Path, tmp_path: Path) -> None:
    """Oracle: new names, missing parents, an empty folder and a link to one; nothing is made by looking."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert free_place(tmp_path / "empty", run) == free_place(tmp_path / "link", run) == tmp_path / "empty"
    assert free_place(tmp_path / "a" / "b", run) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists() and not list((tmp_path / "empty").iterdir())


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    """Oracle: the folder of a process that has ended goes; one that lives, or of another host, keeps its own."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    host = socket.gethostname()
    left, alive, elsewhere = (
        tmp_path / f".export.tmp-{name}" for name in (f"{host}-{ended.pid}", f"{host}-1", f"other-{ended.pid}")
    )
    for folder in (left, alive, elsewhere):
        folder.mkdir()
    with appears_whole(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, elsewhere.name}


def test_a_folder_that_another_rank_makes_meanwhile_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made between two questions about it. Oracle: none, where a file in its place is one."""
    place = tmp_path / "run"

    def make_it(path: Path) -> bool:
        if path == place:
            place.mkdir()
        return False

    monkeypatch.setattr(Path, "is_symlink", make_it)
    assert obstacle(place) is None
    place.rmdir()
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    place.touch()
    assert "is a file" in str(obstacle(place))
