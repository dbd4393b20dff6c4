"""`ds-slm chat` in a pseudo terminal: what somebody sees who types, Ctrl-C and Ctrl-D included."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.assistants import Assistant

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import sys, time
from ds_slm.cli import chat, main
write, seen = chat._write, []
def write_and_wait(piece):
    seen.append(piece)
    write(piece)
    for _ in range(6000 if len(seen) == 1 else 0):
        time.sleep(0.1)  # a signal just before a sleep does not end it: many short ones
chat._write = write_and_wait
sys.argv[0] = "ds-slm"
main.run()
"""
"""The command, whose first answer waits after its first piece: Ctrl-C then comes in the middle."""
CTRL_C, CTRL_D = b"\x03", b"\x04"
AGAIN_S = 2.0
"""After so long without a sign somebody presses a key again."""


class Screen:
    """A program in a pseudo terminal."""

    def __init__(self, command: list[str]) -> None:
        self.text = ""
        self._bytes = b""
        self._place = 0
        self._master, slave = pty.openpty()
        self.program = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave), env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(slave)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def until(self, text: str, longest_s: float = 240, again: bytes = b"") -> str:
        """Wait for a text; returns what was shown from the last one up to it. Press the keys `again` now and then."""
        end_s = time.monotonic() + longest_s
        while (found := self.text.find(text, self._place)) < 0:
            left_s = max(0, end_s - time.monotonic())
            ready, _, _ = select.select([self._master], [], [], min(left_s, AGAIN_S) if again else left_s)
            assert ready or (again and left_s), f"{text!r} did not come: {self.text!r}"
            if not ready:
                self.type(again)
                continue
            self._bytes += os.read(self._master, 4096)
            self.text = self._bytes.decode(errors="ignore")  # the last character may be half there
        before, self._place = self.text[self._place : found], found + len(text)
        return before

    def close(self) -> None:
        """End the program where it still runs."""
        self.program.kill()
        self.program.wait()
        os.close(self._master)


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # keys become signals to this session alone


@pytest.fixture
def screen(assistant: Assistant) -> Iterator[Screen]:
    made = Screen([sys.executable, "-c", SLOW, "chat", str(assistant.run), "--temperature", "0"])
    yield made
    made.close()


def test_keys_of_a_terminal(screen: Screen) -> None:
    """Oracle: what the model was taught; Ctrl-C ends the answer or the line, Ctrl-D the program, with exit code 0."""
    screen.until("/help lists the commands.")
    screen.until("> ")
    screen.type(b"what is the capital of Norway?\n")
    screen.until("\nit")
    screen.type(CTRL_C)
    assert "stopped" in screen.until("\n> ").splitlines()[-1]

    screen.type(b"half a line")
    screen.until("half a line")
    screen.type(CTRL_C)  # Python heeds one that comes between two keys, before it waits again, with the next key
    screen.until("/quit or Ctrl-D ends.", again=CTRL_C)
    screen.until("> ")
    screen.type(b"/reset\n")
    screen.until("begins anew.")
    screen.type(b"what is the capital of Norway?\n")
    screen.until("it is Oslo 🏔️.")
    screen.until("tokens/s")
    screen.until("> ")

    screen.type(CTRL_D)
    assert screen.program.wait(60) == 0
    assert "Traceback" not in screen.text and "half a line" not in screen.text.split("Ctrl-D ends.")[1]
