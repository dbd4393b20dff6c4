"""What file systems refuse, and what somebody may have laid in the way: read-only mounts, no locks, no fsync, links."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_slm import files
from ds_slm.data.shards.prepared import STAMPS, open_prepared
from ds_slm.errors import DataError, UserError
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import prepare, recipe, source, texts, two_sources, write_jsonl
from tests.support.faults import fail_at


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    return two_sources(tmp_path)


def mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Mounts a folder read-only over itself until the test ends; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount_read_only(folder: Path) -> None:
        if not mount("--bind", folder, folder):
            pytest.skip("this user may not mount")
        mounted.append(folder)
        if not mount("-o", "remount,bind,ro", folder):
            pytest.skip("this user may not mount read-only")

    yield mount_read_only
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_data_on_a_read_only_mount_are_read(
    made: Recipe, tmp_path: Path, read_only: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the hash of the data before they were mounted; no word, for their stamps were written with them."""
    whole = prepare(made, tmp_path / "data").sha256
    read_only(tmp_path / "data")
    said: list[str] = []
    assert prepare(made, tmp_path / "data", report=said.append).sha256 == whole
    assert not said and not capsys.readouterr().err


def test_a_read_only_copy_is_checked_each_time_and_that_is_told(
    made: Recipe, tmp_path: Path, read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: stamps of other files: each opening reads all four shards; a shard that differs is refused."""
    prepared = prepare(made, tmp_path / "data")
    (prepared.folder / STAMPS).write_text("{}")
    shard = prepared.folder / "first" / "val-00000.bin"
    content = shard.read_bytes()
    read_only(tmp_path / "data")
    for _ in range(2):
        said: list[str] = []
        assert prepare(made, tmp_path / "data", report=said.append).sha256 == prepared.sha256
        [warning] = said
        assert "cannot be written to (Read-only file system)" in warning and "at every launch" in warning
    mount("-o", "remount,bind,rw", tmp_path / "data")
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    mount("-o", "remount,bind,ro", tmp_path / "data")
    with pytest.raises(DataError, match=r"val-00000.bin was changed"):
        prepare(made, tmp_path / "data")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_nothing_is_opened_for_writing_to_read_whole_data(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A data root of another user. Oracle: every way to write is refused, and the hash is that of before."""
    whole = prepare(made, tmp_path / "data").sha256
    refuse_writing(monkeypatch, tmp_path / "data", number)
    assert prepare(made, tmp_path / "data").sha256 == whole


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_is_missing_where_nothing_can_be_written_is_told(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Oracle: the part that is missing, the reason, and the way out, in one sentence."""
    folder = prepare(made, tmp_path / "data").folder
    (folder / "second" / "manifest.json").unlink()
    refuse_writing(monkeypatch, tmp_path / "data", number)
    with pytest.raises(DataError, match=rf"lacks second.*{os.strerror(number)}.*name another --data-root"):
        prepare(made, tmp_path / "data")


def refuse_writing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """As a file system does that this user may only read."""
    work = {name: getattr(os, name) for name in ("open", "unlink", "rename", "replace", "mkdir")}

    def refused(path: Any, flags: int | None) -> bool:
        writes = flags is None or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and Path(os.fsdecode(path)).is_relative_to(folder)

    def guarded(name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            flags = arguments[0] if name == "open" else None
            if isinstance(path, str | os.PathLike) and refused(path, flags):
                if name == "mkdir" and Path(path).is_dir():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
                raise OSError(number, os.strerror(number), str(path))
            return work[name](path, *arguments, **options)

        return call

    for name in work:
        monkeypatch.setattr(os, name, guarded(name))


def test_readers_do_not_wait_for_one_another(made: Recipe, tmp_path: Path) -> None:
    """Oracle: eight processes read whole data while this one holds the lock; data that lack a part wait for it."""
    prepared = prepare(made, tmp_path / "data")
    lock = os.open(prepared.folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    found: list[str] = []
    readers = [
        threading.Thread(target=lambda: found.append(prepare(made, tmp_path / "data").sha256), daemon=True)
        for _ in range(8)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert found == [prepared.sha256] * 8

    (prepared.folder / "second" / "manifest.json").unlink()
    waits = threading.Event()
    said: list[str] = []
    late = threading.Thread(
        target=lambda: prepare(made, tmp_path / "data", report=lambda line: (said.append(line), waits.set())),
        daemon=True,
    )
    late.start()
    assert waits.wait(timeout=60) and "another rank of this launch, prepares or checks it: waiting" in said[0]
    os.close(lock)
    late.join(timeout=60)
    assert prepare(made, tmp_path / "data").sha256 == prepared.sha256


def test_a_copy_is_checked_by_one_process(made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: of four that open it at once, a count of the shards that are hashed: each once."""
    prepared = prepare(made, tmp_path / "data")
    (prepared.folder / STAMPS).unlink()
    hashed: list[str] = []
    work = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(file.name), work(file, name))[1])
    readers = [threading.Thread(target=prepare, args=(made, tmp_path / "data"), daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert len(hashed) == len(set(hashed)) == 4


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_processes_of_a_host_still_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Oracle: the second process waits for the first, by a file elsewhere; that there are no locks is told."""
    folder = tmp_path / "data"
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    work = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):
            raise OSError(number, os.strerror(number))
        work(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said: list[str] = []
    second_waits, second_in = threading.Event(), threading.Event()

    def second() -> None:
        with files.locked(folder, lambda line: second_waits.set() if "waiting" in line else None):
            second_in.set()

    with files.locked(folder, said.append):
        threading.Thread(target=second, daemon=True).start()
        assert second_waits.wait(timeout=60) and not second_in.is_set()
    assert second_in.wait(timeout=60)
    assert len(said) == 1 and "has no locks" in said[0] and os.strerror(number) in said[0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_folders_that_cannot_be_synced_are_told_of_once(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Oracle: the data of a file system that can; a folder's word on stderr once; a disk's failure is still raised."""
    whole = prepare(made, tmp_path / "whole").sha256
    work = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        work(descriptor)

    files._tell_once.cache_clear()
    monkeypatch.setattr(os, "fsync", fsync)
    assert prepare(made, tmp_path / "data").sha256 == whole
    told = capsys.readouterr().err.splitlines()
    assert told and len(told) == len(set(told)) and all("cannot sync folders" in line for line in told)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        files.replace_text(tmp_path / "a.txt", "a")


def test_links_in_place_of_our_own_files_are_not_followed(made: Recipe, tmp_path: Path) -> None:
    """Oracle: what the links lead to is not touched; a lock that is one is refused, temporary files are made anew."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "data" / "made"
    (folder / "first").mkdir(parents=True)
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock is a link"):
        prepare(made, tmp_path / "data")
    (folder / ".lock").unlink()
    (folder / "tokenizer.tmp").symlink_to(tmp_path / "elsewhere")
    (folder / f".{STAMPS}.tmp-{files.writer_name()}").symlink_to(victim)
    (folder / "first" / f".manifest.json.tmp-{files.writer_name()}").symlink_to(victim)
    (folder / "first" / "train-00000.bin.part").symlink_to(victim)
    prepare(made, tmp_path / "data")
    assert victim.read_text() == "precious" and not list((tmp_path / "elsewhere").iterdir())


def test_a_pipe_in_place_of_the_lock_is_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: a sentence; opening a pipe would wait for ever."""
    (tmp_path / "data" / "made").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "made" / ".lock")
    with pytest.raises(UserError, match=r"\.lock is a pipe"):
        prepare(made, tmp_path / "data")


def test_a_data_root_that_is_a_link(made: Recipe, tmp_path: Path) -> None:
    """Oracle: a link to a folder works; to nothing, or to a file, is told with the way out."""
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "real")
    whole = prepare(made, tmp_path / "data").sha256
    assert prepare(made, tmp_path / "real").sha256 == whole
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"--data-root: .*nothing is a link to nothing: mend or remove it"):
        prepare(made, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--data-root: .*file is a file, expected a folder"):
        prepare(made, tmp_path / "file")


@pytest.mark.parametrize("name", ["../../first.bin", "/etc/passwd", "a/b.bin", "..", "", 7])
def test_a_manifest_names_files_beside_it_alone(made: Recipe, tmp_path: Path, name: object) -> None:
    """Oracle: refused before anything is read, naming the manifest."""
    path = prepare(made, tmp_path / "data").folder / "first" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"]["val"][0]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"first/manifest.json is damaged"):
        open_prepared(made, tmp_path / "data" / "made")


def test_a_shard_that_is_a_link_is_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: refused with the way out; a source's folder that is a link works."""
    folder = prepare(made, tmp_path / "data").folder
    (folder / "first").rename(tmp_path / "first")
    (folder / "first").symlink_to(tmp_path / "first")
    open_prepared(made, tmp_path / "data" / "made")
    (tmp_path / "first" / "val-00000.bin").rename(tmp_path / "val.bin")
    (tmp_path / "first" / "val-00000.bin").symlink_to(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"val-00000.bin is a link, expected the shard itself"):
        open_prepared(made, tmp_path / "data" / "made")


HALVES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b"\xff\xfe" + content,
    "a list": lambda content: b"[1]",
    "an empty object": lambda content: b"{}",
    "half an object": lambda content: json.dumps(dict([*json.loads(content).items()][::2])).encode(),
}


@pytest.mark.parametrize("damage", HALVES)
@pytest.mark.parametrize("part", ["first", "tokenizer"])
def test_damaged_manifests_are_told(made: Recipe, tmp_path: Path, damage: str, part: str) -> None:
    """Oracle: a sentence that names the file and the way out."""
    path = prepare(made, tmp_path / "data").folder / part / "manifest.json"
    path.write_bytes(HALVES[damage](path.read_bytes()))
    for opened in (
        lambda: open_prepared(made, tmp_path / "data" / "made"),
        lambda: prepare(made, tmp_path / "data"),
    ):
        with pytest.raises(DataError, match=rf"{part}/manifest.json (is damaged|has format None).*prepare again"):
            opened()


@pytest.mark.parametrize("damage", HALVES)
def test_damaged_stamps_and_journals_cost_time_alone(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the data of a folder where nothing was damaged."""
    made = recipe(source("first", path=write_jsonl(tmp_path / "one.jsonl", texts(150))))
    whole = prepare(made, tmp_path / "whole")
    stamps = whole.folder / STAMPS
    stamps.write_bytes(HALVES[damage](stamps.read_bytes()))
    assert prepare(made, tmp_path / "whole").sha256 == whole.sha256

    from ds_slm.data.shards import writer

    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(writer, "JOURNAL_TOKENS", 1_000)
    with fail_at("replaced", "journal.json", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "data")
    journal = tmp_path / "data" / "made" / "first" / "journal.json"
    journal.write_bytes(HALVES[damage](journal.read_bytes()))
    assert prepare(made, tmp_path / "data").sha256 == whole.sha256


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    """Oracle: the process's own list of descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with files.locked(tmp_path, lambda line: None):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
