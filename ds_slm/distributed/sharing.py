"""Folders that every host needs and some lack: sent from a host that has them, before anything is prepared.

    each host: which folders are whole here --> the store --> the lowest rank that has one sends it, in chunks
                                                          --> temporary files, sha256, then into the folder

The chunks pass through the launch's store, a few at a time, so no other port or program is needed. The file that marks
a folder as whole comes last. On each host only the first rank takes part; the others wait.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from ds_slm.distributed.rendezvous import Rendezvous
from ds_slm.distributed.store import Store
from ds_slm.distributed.world import host_id
from ds_slm.errors import DataError
from ds_slm.files import NeededFolder, fsync, is_plain_name, locked, new_folder, remove_where_dead, writer_name

CHUNK_BYTES = 4 << 20
"""Bytes of a chunk: the store refuses more than 8 MiB."""
WINDOW = 4
"""Chunks in the store at the same time."""
POLL_S = 0.002
"""Seconds between two looks for the next chunk."""
HOSTS_POLL_S = 0.1
"""Seconds between two looks for other hosts."""
TELL_EVERY_S = 5.0
TEMPORARY = ".receiving.tmp"
CHANGED = "changed while it was sent: launch again."


def share(
    meeting: Rendezvous, folders: Sequence[NeededFolder], recipe_sha256: str, report: Callable[[str], None]
) -> None:
    """Send folders that are whole on some hosts to the hosts that lack them. Collective; returns once they are there.

    If ranks differ in recipe or folders, nothing is sent: a later check names the differences.

    Args:
        meeting: the rendezvous of a launch with several ranks.
        folders: the folders that this host needs, and what it has of them.
        recipe_sha256: identity of what is trained.
        report: takes lines of progress, on hosts that receive.

    Raises:
        DataError: the received files are not the sent ones, or another rank runs a version that does not send.
    """
    store, rank, size = meeting.connected(), meeting.world.rank, meeting.world.size

    # Every rank reports its host and the host's folders; no rank prepares anything before all have looked.
    own = {
        "host": host_id(),
        "needs": [recipe_sha256, *(folder.name for folder in folders)],
        "has": [folder.name for folder in folders if folder.files is not None],
        "lacks": [folder.name for folder in folders if folder.is_absent and folder.files is None],
    }
    store.set(f"folders/{rank}", json.dumps(own))
    _wait(lambda: all(_has_looked(store, other) for other in range(size)), HOSTS_POLL_S)
    everyone = [json.loads(store.get(f"folders/{other}")) for other in range(size)]
    if any(one["needs"] != own["needs"] for one in everyone):
        return

    hosts = [one["host"] for one in everyone]
    leaders = [other for other, host in enumerate(hosts) if host not in hosts[:other]]
    leader = hosts.index(hosts[rank])

    for folder in folders:
        having = [other for other in leaders if folder.name in everyone[other]["has"]]
        lacking = [other for other in leaders if folder.name in everyone[other]["lacks"]]
        if not having or not lacking:
            continue
        if rank == having[0]:
            _Sending(store, folder, len(lacking)).run()
        elif rank in lacking:
            source = str(store.get(f"host/{having[0]}"))
            _Receiving(store, folder, lambda line, source=source: report(f"{line} from {source}")).run()
            store.set(f"received/{folder.name}/{rank}", "")
        elif leader in lacking:
            _wait(lambda folder=folder: store.has(f"received/{folder.name}/{leader}"), HOSTS_POLL_S)


def _has_looked(store: Store, rank: int) -> bool:
    """Whether a rank has reported its host's folders. A rank that is ready without a report runs other code."""
    is_ready = store.has(f"message/{rank}")
    if store.has(f"folders/{rank}"):
        return True
    if is_ready:
        host = store.get(f"host/{rank}")
        raise DataError(f"the hosts differ in their code: {host} runs an older version. Bring all to the same one.")
    return False


@dataclass(frozen=True)
class _Sending:
    """Sends one folder to several hosts at once."""

    store: Store
    folder: NeededFolder
    receivers: int

    def run(self) -> None:
        """Send the names and sizes of all files, their content, and its hash."""
        assert self.folder.files is not None
        store, key, digest, number = self.store, f"folder/{self.folder.name}", hashlib.sha256(), 0
        paths = [self.folder.path / name for name in self.folder.files]
        store.set(
            f"{key}/files", json.dumps([[name, (self.folder.path / name).stat().st_size] for name in self.folder.files])
        )

        for number, chunk in enumerate(_chunks(paths), start=1):
            self._forget(number - WINDOW)
            digest.update(chunk)
            store.set_bytes(f"{key}/{number}", chunk)
        store.set(f"{key}/sha256", digest.hexdigest())
        for last in range(number - WINDOW + 1, number + 1):
            self._forget(last)

    def _forget(self, number: int) -> None:
        """Remove a chunk from the store once all hosts have it."""
        key = f"folder/{self.folder.name}/{number}"
        if number > 0:
            _wait(lambda: self.store.count(f"{key}/taken") >= self.receivers)
            self.store.delete(key)


@dataclass(frozen=True)
class _Receiving:
    """Receives one folder from the host that has it."""

    store: Store
    folder: NeededFolder
    report: Callable[[str], None]

    def run(self) -> None:
        """Write all files beside their places, compare the hash, and put them in place in their order."""
        key, folder = f"folder/{self.folder.name}", self.folder.path
        _wait(lambda: self.store.has(f"{key}/files"))
        files = json.loads(self.store.get(f"{key}/files"))
        total_mb = sum(size for _, size in files) / 1e6
        if not all(map(is_plain_name, chain.from_iterable(name.split("/") for name, _ in files))):
            raise DataError(f"{self.folder.name}: the host that sends it names files outside its folder: {files}.")

        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(f"{TEMPORARY}-{socket.gethostname()}-*"):
            remove_where_dead(rest)
        temporary = folder / f"{TEMPORARY}-{writer_name()}"
        new_folder(temporary)
        self.report(f"{self.folder.name}: receiving {total_mb:,.1f} MB")
        try:
            digest = self._receive(files, temporary, total_mb)
            _wait(lambda: self.store.has(f"{key}/sha256"))
            if digest != (sent := self.store.get(f"{key}/sha256")):
                raise DataError(f"{self.folder.name} arrived with sha256 {digest}, {sent} was sent.")

            # Another process of this host may have made the folder whole meanwhile.
            with locked(self.folder.lock, self.report):
                if not (folder / files[-1][0]).exists():
                    self._put_in_place([name for name, _ in files], temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _receive(self, files: Sequence[tuple[str, int]], into: Path, total_mb: float) -> str:
        """Write the files; returns the hash of everything received."""
        chunks, digest, told_s, done = self._chunks(), hashlib.sha256(), time.monotonic(), 0
        for name, size in files:
            left = size
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            with (into / name).open("wb") as file:
                while left > 0:
                    chunk = next(chunks)
                    digest.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
                    done += len(chunk)
                    if time.monotonic() - told_s > TELL_EVERY_S:
                        told_s = time.monotonic()
                        self.report(f"{self.folder.name}: {done / 1e6:,.1f} of {total_mb:,.1f} MB")

            # No chunk holds bytes of two files.
            if left:
                raise DataError(f"{self.folder.name}: {name} {CHANGED}")
            fsync(into / name)
        return digest.hexdigest()

    def _put_in_place(self, names: Sequence[str], temporary: Path) -> None:
        """Move the files to their places; the last name marks the folder as whole."""
        for name in names:
            place = self.folder.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, place)
            fsync(place.parent)

    def _chunks(self) -> Iterator[bytes]:
        """The chunks in their order; no chunk holds bytes of two files."""
        for number in count(1):
            key, end = f"folder/{self.folder.name}/{number}", f"folder/{self.folder.name}/sha256"
            _wait(lambda key=key, end=end: self.store.has(key) or self.store.has(end))
            if not self.store.has(key):
                raise DataError(f"{self.folder.name}: a file {CHANGED}")
            chunk = self.store.get_bytes(key)
            self.store.count(f"{key}/taken", 1)
            yield chunk


def _chunks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _wait(condition: Callable[[], bool], poll_s: float = POLL_S) -> None:
    """Wait without a time limit: if another rank fails, the rendezvous ends this process."""
    while not condition():
        time.sleep(poll_s)
