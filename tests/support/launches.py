"""Launches whose ranks are threads of this process: how they meet, and what each of them ends with."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ds_slm.distributed.rendezvous import Rendezvous
from ds_slm.distributed.store import Intervals
from ds_slm.distributed.world import World
from tests.support import runs

QUICK = Intervals(
    poll_s=0.01,
    beat_s=0.02,
    first_word_s=60,
    word_every_s=60,
    connect_s=20,
    silent_s=20,
    together_s=2,
    come_out_s=0.2,
    linger_s=0.5,
)


class Launch:
    """Ranks of one launch, each with an end that is recorded instead of ending this process."""

    def __init__(self, size: int, folder: Path, intervals: Intervals = QUICK, on_one_host: bool = False) -> None:
        self.world = World(size=size, port=runs.free_port(), local_size=size if on_one_host else None)
        self.intervals, self.codes = intervals, dict[int, int]()
        self.mains: list[tuple[int, threading.Thread]] = []
        self._log = os.open(folder / "terminal", os.O_CREAT | os.O_RDWR | os.O_APPEND)
        self._path = folder / "terminal"
        self.made: list[Rendezvous] = []
        self.ranks = [self.rank(number) for number in range(size)]

    def rank(self, number: int) -> Rendezvous:
        def end(code: int) -> None:
            self.codes.setdefault(number, code)
            raise SystemExit

        self.made.append(Rendezvous(replace(self.world, rank=number), self.intervals, self._log, end))
        return self.made[-1]

    @property
    def told(self) -> str:
        return self._path.read_text()

    def run(self, *actions: Callable[[Rendezvous], object]) -> None:
        """Each rank's main thread; returns when all have ended."""
        for rank, action in zip(self.ranks, actions, strict=False):
            main = threading.Thread(target=action, args=(rank,), daemon=True)
            main.start()
            self.mains.append((rank.world.rank, main))
        deadline_s = time.monotonic() + 20
        while self.unfinished and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Ranks whose main thread has neither returned nor been ended."""
        return [rank for rank, main in self.mains if main.is_alive() and rank not in self.codes]

    def await_codes(self, count: int) -> None:
        deadline_s = time.monotonic() + 20
        while len(self.codes) < count and time.monotonic() < deadline_s:
            time.sleep(0.01)

    def close(self) -> None:
        for rank in self.made:
            rank._met.set()  # a main thread whose process ended in earnest would be gone
            rank.close()

        # A thread that comes back from C++ while the interpreter ends would abort it.
        for rank in self.made:
            if rank._thread is not None:
                rank._thread.join(timeout=30)
                assert not rank._thread.is_alive()
        os.close(self._log)


def arrives(rank: Rendezvous) -> None:
    rank.open()
    rank.arrive(f"I am {rank.world.rank}")


def fails(error: BaseException, when_open: bool = True) -> Callable[[Rendezvous], None]:
    def action(rank: Rendezvous) -> None:
        if when_open:
            rank.open()
        rank.fail(error)

    return action


def prepares(rank: Rendezvous) -> None:
    """Opens, and is busy with something else from then on."""
    rank.open()
