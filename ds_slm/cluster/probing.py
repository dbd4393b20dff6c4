"""A probe on a host: one ssh starts it, lines of JSON ask it, and it ends with the connection.

    doctor ── ssh -R PORT:127.0.0.1:OWN HOST ── sh: "connected" ── PYTHON: the text of probe.py, then its questions

The text of the probe is sent too, so that a host with another version of the project, or without it, understands the
same questions. On this machine ssh is not used.
"""

import contextlib
import inspect
import json
import queue
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_slm.cluster import probe

CONNECT_S = 4
"""ssh gives up after this time, so that a host that is off is named within 5 s."""
ANSWER_S = 20
"""Limit for an answer: a loaded host takes some seconds to start Python."""
FORWARD_S = 2
FAREWELL_S = 1
CONNECTED = "connected"
SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "ControlPath=none"]
SSH += ["-o", "LogLevel=INFO"]  # at this level ssh prints the port that it got
_ALLOCATED = re.compile(r"Allocated port (\d+) for remote forward")
_BOOT = "import sys; exec(compile(sys.stdin.read(int(sys.stdin.readline())), 'probe.py', 'exec'))"


class Forward:
    """A port of this machine's loopback that sends a word to everyone who connects; ssh forwards it."""

    def __init__(self, word: str) -> None:
        """Listens until the process ends."""
        self.word = word
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.sendall(self.word.encode())


class Session:
    """One host's probe."""

    def __init__(self, host: str | None, folder: Path, forward: Forward | None = None) -> None:
        """Start to connect, without waiting.

        Args:
            host: the name for ssh; None for this machine, without ssh.
            folder: the folder on the host to start in, if it exists.
            forward: the target of a port on the host's loopback.
        """
        script = (
            f"echo {CONNECTED}; cd {shlex.quote(str(folder))} 2>/dev/null; python={shlex.quote(sys.executable)}; "
            f'[ -x "$python" ] || python=python3; exec "$python" -u -c {shlex.quote(_BOOT)}'
        )
        tunnel = ["-R", f"0:127.0.0.1:{forward.port}"] if forward else []
        command = ["sh", "-c", script] if host is None else [*SSH, *tunnel, host, f"exec sh -c {shlex.quote(script)}"]

        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

        # A thread reads each of its outputs, so that waiting for an answer can end.
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._threads = [threading.Thread(target=copy, daemon=True) for copy in (self._read_answers, self._read_errors)]
        for thread in self._threads:
            thread.start()

    @property
    def said(self) -> str:
        """What ssh, the shell and Python wrote to stderr."""
        return "".join(self._said)

    @property
    def is_over(self) -> bool:
        """Whether the probe takes no more questions."""
        return self._process.poll() is not None

    def connect(self) -> str | None:
        """Wait for the host; returns what ssh said if it does not answer."""
        deadline = self._began + ANSWER_S  # ssh itself gives up earlier where nothing answers
        try:
            line = self._next_line(deadline)
            while line is not None and line.strip() != CONNECTED:  # what a shell's start-up file prints
                line = self._next_line(deadline)
        except TimeoutError:
            self.close()
            return "Connection timed out"
        if line is None:
            self.close()
            return self.said or "ssh ended without a word"

        self.connected_s = time.monotonic() - self._began
        source = inspect.getsource(probe)
        self._write(f"{len(source)}\n{source}")
        return None

    def ask(self, question: str, **details: Any) -> dict[str, Any]:
        """The probe's answer: an object, which holds `error` if it cannot answer."""
        self._write(json.dumps({"ask": question, **details}) + "\n")
        deadline = time.monotonic() + ANSWER_S
        try:
            line = self._next_line(deadline)
            while line is not None and not line.startswith("{"):
                line = self._next_line(deadline)
        except TimeoutError:
            self.close()
            return {"error": f"no answer within {ANSWER_S:.0f} s"}
        if line is not None:
            return json.loads(line)
        self.close()
        return {"error": (self.said.strip().splitlines() or ["the connection was cut"])[-1]}

    def forwarded_port(self) -> int | None:
        """The port of the host that leads here; None if the server refuses to forward one."""
        deadline = time.monotonic() + FORWARD_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := _ALLOCATED.search(self.said):
                return int(found[1])
            if "forwarding failed" in self.said:
                return None
            time.sleep(0.02)
        return None

    def clock_offset(self, times: int = 5) -> tuple[float, float] | None:
        """By how much the host's clock is ahead of this machine's, and the uncertainty of that, in seconds."""
        found = []
        for _ in range(times):
            began = time.time()
            answer = self.ask("clock")
            ended = time.time()
            if "time" not in answer:
                return None
            found.append(((ended - began) / 2, answer["time"] - (began + ended) / 2))
        error, offset = min(found)
        return offset, error

    def close(self) -> None:
        """End the connection: without further questions the probe ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(timeout=FAREWELL_S)

    def _next_line(self, deadline: float) -> str | None:
        """The host's next line; None if there are no more. Raises TimeoutError at the deadline."""
        try:
            return self._lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise TimeoutError from None

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has ended: the answer says so
            return

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)


def close_all(sessions: Sequence[Session]) -> None:
    """End some probes."""
    for session in sessions:
        session.close()
