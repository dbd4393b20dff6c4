"""Folders that some hosts lack: what arrives where, and what happens when it cannot. Hosts are threads here."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ds_slm.distributed import sharing
from ds_slm.distributed.rendezvous import Rendezvous
from ds_slm.distributed.world import World
from ds_slm.errors import DataError
from ds_slm.files import NeededFolder
from tests.support import runs
from tests.unit.distributed.test_rendezvous import QUICK

SIGN = "manifest.json"


@pytest.fixture(autouse=True)
def hosts_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "host_id", lambda: threading.current_thread().name)
    monkeypatch.setattr(sharing, "CHUNK_BYTES", 1000)  # several chunks a file, more than the store holds at once


def launch(
    hosts: Sequence[str], tmp_path: Path, needed: str = "demo/docs", recipes: Sequence[str] = ("same",)
) -> list[BaseException | str]:
    """One rank on each of the hosts named, in turn; what each said, or raised."""
    world, said = World(size=len(hosts), port=runs.free_port()), [[] for _ in hosts]
    raised: dict[int, BaseException] = {}
    meetings = [Rendezvous(replace(world, rank=rank), QUICK) for rank in range(len(hosts))]

    def run(rank: int) -> None:
        path = tmp_path / hosts[rank] / needed
        files = [one for one in sorted(path.rglob("*")) if one.is_file() and one.name != SIGN]
        names = (*(one.relative_to(path).as_posix() for one in files), SIGN) if (path / SIGN).is_file() else None
        try:
            folder = NeededFolder(needed, path, names, is_absent=not (path / "foreign").exists(), lock=path.parent)
            sharing.share(meetings[rank], [folder], recipes[rank % len(recipes)], said[rank].append)
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=host) for rank, host in enumerate(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    for meeting in meetings:
        meeting.close()
    return [raised.get(rank) or "\n".join(said[rank]) for rank in range(len(hosts))]


def write(path: Path, seed: int = 0) -> dict[str, bytes]:
    """A whole folder: a file of several chunks, an empty one, one in a folder of its own, and the sign."""
    content = {
        "train-00000.bin": bytes((seed + 7 * place) % 251 for place in range(9_999)),
        "val-00000.bin": b"",
        "checkpoints/best": b"step",
        SIGN: b'{"whole": true}',
    }
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return content


def read(path: Path) -> dict[str, bytes]:
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_hosts_that_lack_a_folder_receive_it(tmp_path: Path) -> None:
    """Oracle: the source's bytes; what another host has of its own stays; ranks of one host receive once."""
    content, own = write(tmp_path / "node2" / "demo/docs"), write(tmp_path / "node3" / "demo/docs", seed=1)
    said = launch(["node1", "node1", "node2", "node3"], tmp_path)
    assert read(tmp_path / "node1" / "demo/docs") == content
    assert read(tmp_path / "node3" / "demo/docs") == own
    assert said[0].startswith("demo/docs: receiving 0.0 MB") and said[1:] == ["", "", ""]


def test_what_a_killed_preparation_left_is_completed(tmp_path: Path) -> None:
    """Oracle: the source's files beside the rest that was there."""
    content = write(tmp_path / "node1" / "demo/docs")
    place = tmp_path / "node2" / "demo/docs"
    place.mkdir(parents=True)
    (place / "journal.json").write_bytes(b"{")
    (place / "train-00000.bin").write_bytes(b"cut")
    launch(["node1", "node2"], tmp_path)
    assert read(place) == {**content, "journal.json": b"{"}


def test_what_is_not_this_recipes_is_never_overwritten(tmp_path: Path) -> None:
    """Oracle: the files there, byte for byte; what is said of them is the preparation's business."""
    write(tmp_path / "node1" / "demo/docs")
    foreign = write(tmp_path / "node2" / "demo/docs", seed=1)
    (tmp_path / "node2" / "demo/docs" / SIGN).unlink()
    (tmp_path / "node2" / "demo/docs" / "foreign").write_bytes(b"")
    del foreign[SIGN]
    assert launch(["node1", "node2"], tmp_path) == ["", ""]
    assert read(tmp_path / "node2" / "demo/docs") == {**foreign, "foreign": b""}


def test_nothing_is_sent_between_hosts_with_other_recipes(tmp_path: Path) -> None:
    """Oracle: both go on, to be refused where recipes are compared; nothing was written."""
    write(tmp_path / "node1" / "demo/docs")
    assert launch(["node1", "node2"], tmp_path, recipes=("one", "another")) == ["", ""]
    assert read(tmp_path / "node2") == {}


def test_a_folder_that_nobody_or_everybody_has_is_left_alone(tmp_path: Path) -> None:
    """Oracle: still no file where there was none; where both hosts have the folder, each one's own bytes."""
    assert launch(["node1", "node2"], tmp_path) == ["", ""]
    assert list(tmp_path.iterdir()) == []
    own = {host: write(tmp_path / host / "demo/docs", seed) for seed, host in enumerate(("node1", "node2"))}
    assert launch(["node1", "node2"], tmp_path) == ["", ""]
    assert {host: read(tmp_path / host / "demo/docs") for host in own} == own


def test_a_file_that_changes_while_it_is_sent_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an error, and no file of the folder."""
    write(tmp_path / "node1" / "demo/docs")
    chunks = sharing._chunks
    monkeypatch.setattr(sharing, "_chunks", lambda paths: [*chunks(paths)][:-3])
    _, error = launch(["node1", "node2"], tmp_path)
    assert isinstance(error, DataError) and "changed while it was sent" in str(error)
    assert read(tmp_path / "node2") == {}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../b", "a//b", ""])
def test_names_outside_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Oracle: nothing is written, whatever the other host says."""
    write(tmp_path / "node1" / "demo/docs")
    store_set = sharing.Store.set

    def lie(self: sharing.Store, key: str, value: str) -> None:
        store_set(self, key, value.replace("val-00000.bin", name) if key.endswith("/files") else value)

    monkeypatch.setattr(sharing.Store, "set", lie)
    monkeypatch.setattr(sharing._Sending, "_forget", lambda self, number: None)  # nobody takes the chunks
    _, error = launch(["node1", "node2"], tmp_path)
    assert isinstance(error, DataError) and "outside its folder" in str(error)
    assert read(tmp_path / "node2") == {}


def test_a_host_with_older_code_is_named(tmp_path: Path) -> None:
    """It comes to the meeting without having looked. Oracle: a sentence instead of a wait without end."""
    world = World(size=2, port=runs.free_port())
    new, old = (Rendezvous(replace(world, rank=rank), QUICK) for rank in range(2))
    arriving = threading.Thread(target=old.arrive, args=({},), daemon=True)
    arriving.start()
    needed = NeededFolder("demo/docs", tmp_path, None, is_absent=True, lock=tmp_path)
    with pytest.raises(DataError, match=r"the hosts differ in their code: .* runs an older version"):
        sharing.share(new, [needed], "same", print)
    old._met.set()  # its process would end
    arriving.join(timeout=20)
    assert not arriving.is_alive()
    for meeting in (new, old):
        meeting.close()
