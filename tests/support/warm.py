"""Programs that tests run, forked from a process that has imported torch and DeepSpeed already.

    run --command, folder, environment, files--> server --fork--> deepspeed --fork--> its launcher --fork--> ranks
    run <------------ exit code ---------------- server

Imports take most of the time of a tiny launch: DeepSpeed's runner, its launcher and every rank import torch anew,
unless they are forks. All else is as users have it: DeepSpeed's own runner and launcher, a process for each rank, the
environment, signals, exit codes, the end of the interpreter. A program is started anew where its environment says
something that is read on import (`can_run`), and where a test kills it.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from benchmarks import tiny_runs
from benchmarks.tiny_runs import BIN, ROOT

IMPORTED = (
    "torch", "torch._dynamo", "deepspeed", "deepspeed.comm.torch", "deepspeed.launcher.launch",
    "deepspeed.launcher.runner", "deepspeed.runtime.zero.muon.original_muon",
    "bitsandbytes", "transformers", "transformers.models.auto",
    "torch.utils.tensorboard", "safetensors.torch", "ds_slm.pretrain", "ds_slm.train.launch",
    "ds_slm.data.shards.prepare", "ds_slm.data.rows", "ds_slm.publish.generate",
     "ds_slm.publish.export", "ds_slm.cli.main", "sft.train", "sft.prepare",
    "sft.rows", "sft.preview",
)  # fmt: skip
READ_ON_IMPORT = (
    "OMP_", "MKL_", "OPENBLAS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "PYTHON", "LD_", "DS_ACCELERATOR",
    "TORCH", "TRITON",
)  # fmt: skip
"""Variables that libraries read while they are imported begin with these."""
REAL_POPEN = subprocess.Popen


# --- the test's side ------------------------------------------------------------------------------------------------


def can_run(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command is a Python program, and its environment says nothing new on import."""
    return _program_of(command) is not None and _read_on_import(environment) == _read_on_import(tiny_runs.environment())


def run(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured output. Raises subprocess.TimeoutExpired, once the program has been ended."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        request = {"command": list(command), "cwd": str(cwd), "environment": dict(environment)}
        with _server().start(request, stdout.fileno(), stderr.fileno()) as answers:
            answers.settimeout(timeout_s)
            pid = int(answers.recv(64))
            try:
                code = int(answers.recv(64))
            except TimeoutError:
                _end(pid)
                code = None

        outputs = []
        for file in (stdout, stderr):
            file.seek(0)
            outputs.append(file.read().decode())
    if code is None:
        raise subprocess.TimeoutExpired(list(command), timeout_s, *(text.encode() for text in outputs))
    return subprocess.CompletedProcess(list(command), code, *outputs)


class _Server:
    """The warm process. It ends when this one does: then nobody holds the other end of its socket."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Ranks look for DeepSpeed's launcher in the command line of their parent.
            command = [sys.executable, "-m", "tests.support.warm", "deepspeed.launcher.launch", str(theirs.fileno())]
            environment = {**tiny_runs.environment(), "PYTHONPATH": str(ROOT)}
            self._process = REAL_POPEN(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])

    def start(self, request: Mapping[str, Any], stdout: int, stderr: int) -> socket.socket:
        """Where the program's process id will come, and then its exit code."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as written:
            written.write(json.dumps(request).encode())
            written.seek(0)
            socket.send_fds(self._requests, [b"run"], [written.fileno(), theirs.fileno(), stdout, stderr])
        return ours


@cache
def _server() -> _Server:
    return _Server()


def _read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ON_IMPORT)}


def _end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        program = psutil.Process(pid)
        processes = [*program.children(recursive=True), program]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(processes, timeout=10)


# --- the warm process -----------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> Callable[[], object] | None:
    """Fork a process for each request. Returns in each of them, with the program to run; None in the server itself."""
    for module in IMPORTED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page

    while True:
        _, files, _, _ = socket.recv_fds(requests, 16, 4)
        if not files:
            return None
        keeper = os.fork()
        if keeper == 0:
            break
        for file in files:
            os.close(file)
        _reap()

    # In the keeper, which waits for the program in place of the server.
    requests.close()
    answers = socket.socket(fileno=files[1])
    with open(files[0]) as file:
        request = json.load(file)
    program = os.fork()
    if program:
        answers.send(str(program).encode())
        _, status = os.waitpid(program, 0)
        with contextlib.suppress(OSError):  # nobody waits any longer
            answers.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)

    # In the program.
    answers.close()
    os.dup2(files[2], 1)
    os.dup2(files[3], 2)
    os.close(files[2])
    os.close(files[3])
    os.chdir(request["cwd"])
    return _prepared(request["command"], request["environment"])


def _reap() -> None:
    """Forget keepers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _program_of(command: Sequence[str]) -> Callable[[], object] | None:
    """What runs a command in this process; None where it is not a Python program of those known here."""
    words = list(map(str, command))
    if words[0] == str(BIN / "deepspeed"):
        return lambda: importlib.import_module("deepspeed.launcher.runner").main()
    if words[0] == str(BIN / "ds-slm"):
        return lambda: importlib.import_module("ds_slm.cli.main").run()
    words = _without_interpreter(words)
    if words[:2] == ["-m", "deepspeed.launcher.launch"]:
        return lambda: importlib.import_module("deepspeed.launcher.launch").main()
    if words and words[0].endswith(".py"):
        return lambda: runpy.run_path(words[0], run_name="__main__")
    return None


def _without_interpreter(words: list[str]) -> list[str]:
    """A Python command's words behind the interpreter and -u; none where it is another program."""
    if words[0] not in (sys.executable, str(BIN / "python")):
        return []
    return words[2:] if words[1:2] == ["-u"] else words[1:]


def _prepared(command: Sequence[str], environment: Mapping[str, str]) -> Callable[[], object]:
    """The program of a command, once this process looks as if it had been started so."""
    words = list(map(str, command))
    program = _program_of(words)
    assert program is not None
    os.environ.clear()
    os.environ.update(environment)
    arguments = _without_interpreter(words) or words
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)

    # DeepSpeed's runner and launcher start other programs of ours; these start none in this way.
    is_script = arguments[0].endswith(".py")
    subprocess.Popen = REAL_POPEN if is_script else ForkedPopen
    if "-u" in words[:2]:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)  # pyright: ignore
    else:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    return program


class ForkedPopen:
    """As much of subprocess.Popen as DeepSpeed's runner and launcher use."""

    def __class_getitem__(cls, item: Any) -> Any:
        """For annotations, as with a real one."""
        return cls

    def __new__(cls, command: Any, env: Mapping[str, str] | None = None, **settings: Any) -> Any:
        """A real one where the command is not a program of those known here."""
        if settings or env is None or not can_run(command, env):
            return REAL_POPEN(command, env=env, **settings)
        return super().__new__(cls)

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.args, self.returncode = command, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            raise Started(_prepared(command, env))

    def poll(self) -> int | None:
        """The exit code; None where it still runs."""
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


class Started(BaseException):
    """Takes a forked program out of the launcher's stack."""

    def __init__(self, program: Callable[[], object]) -> None:
        self.program = program


def main() -> object:
    """Serve; in a forked process, be its program."""
    program = serve(socket.socket(fileno=int(sys.argv[-1])))
    while program is not None:
        try:
            return program()
        except Started as started:
            program = started.program
    return 0


if __name__ == "__main__":
    main()
