"""A run that outlives its ranks and hosts: torchrun's agent on each host, over a store in this process.

    ds-slm train R --hostfile H --restarts K            the supervisor: the run lives as long as it does
      TCPStore on 127.0.0.1                             never on the network
      a thread a host, again and again until the end:
        ssh -R PORT:127.0.0.1:STORE HOST torchrun ...   a host's agent; on this machine torchrun alone
          ranks                                         ds_slm/pretrain.py, unchanged

The agents meet in the store and do the rest (cluster/rendezvous.py). A host's output goes to RUN/logs/HOST.log, which
needs no supervisor; the terminal shows it from there. An exit code under END in the store ends all agents. The end of
the store ends them, too: then ranks save, and the same command goes on.

Known gap: the run does not outlive the machine of this command.
"""

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import TCPStore

from ds_slm.cluster import asking
from ds_slm.cluster.hostfile import Host, is_this_machine
from ds_slm.cluster.limits import END, NAME, Limits
from ds_slm.cluster.link_findings import MOST_CLOCK_DIFFERENCE_S
from ds_slm.cluster.runner_flags import PROGRAMS, refuse_missing
from ds_slm.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, CheckpointError
from ds_slm.files import take_lock
from ds_slm.pulse import FOLDER as PULSES

SSH = [*asking.SSH, "-T", "-o", "ControlPath=none"]
ALIVE_S = 1
"""Seconds between the signs of life that ssh asks for; a lost one delays everything that comes after it."""
TUNNEL = ["-o", "ExitOnForwardFailure=yes", "-o", f"ServerAliveInterval={ALIVE_S}"]
IMPORT_S = 120.0
"""The longest time that a host may take to import torch."""
PORTS = range(20000, 32000)
"""On other hosts the store has one of these ports, which are below the ports that systems give to clients."""
PAUSES_S = (1.0, 10.0)
"""Pauses between two starts of a host's agent: the first, and the longest."""
GIVE_UP = 5
"""If this number of starts of an agent fail at once in a row, its host is left out."""
QUICK_S = 60.0
LOOK_S = 0.2
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")
"""Variables with these prefixes go to other hosts, as with DeepSpeed's launcher."""
_TORCH_LINE = re.compile(
    r"(\[rank\d+\]:)?\[?[DIWEC]\d{4} \d\d:\d\d:\d\d\.\d+ .*\]|frame #\d+: |Exception raised from |<omitting python"
)
"""Log lines of torch's agent and store."""
_KILLED = re.compile(r".*\] failed \(exitcode: -(\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
"""The agent's line about a rank that a signal ended, because such a rank prints nothing itself."""
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Launch:
    """What to run, and where."""

    command: Sequence[str]
    """The training program and its flags."""
    run_dir: Path
    hosts: Sequence[Host]
    """Empty: `devices` of this machine."""
    devices: int
    limits: Limits
    min_hosts: int = 1
    ssh_port: int | None = None
    venv_script: str | None = None
    """A script that every other host sources first."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def places(self) -> list[Host]:
        """The hosts; this machine if none are named."""
        return list(self.hosts) or [Host("127.0.0.1", self.devices)]


def run(launch: Launch) -> int:
    """Run to the end, or to a signal; returns the exit code that `ds-slm train` documents.

    Raises:
        CheckpointError: another supervisor runs in the run folder, or it cannot be written.
    """
    with _alone(launch.run_dir):
        supervisor = Supervisor(launch)
        before = {number: signal.signal(number, supervisor.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return supervisor.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def refuse_unfit(hosts: Sequence[Host], ssh_port: int | None) -> None:
    """Raise HostfileError for every host that ssh does not reach, or whose agent could not start or be understood."""
    refuse_missing({"ssh": PROGRAMS["ssh"]})
    look = "import os, time; first = time.time(); import tempfile, torch.distributed.run; tempfile.TemporaryFile(); "
    look += "print(first, time.time(), flush=True); os._exit(0)"
    script = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, '-c', look])}"

    def problem_of(host: Host, answer: asking.Answer) -> str | None:
        if answer.code:
            said = answer.last_words
            return f"host {host.name} cannot start an agent: {said}. It needs this folder, and this Python, as here."

        # It read its clock after the question and before the answer; in between it imported torch.
        first, *_, last = map(float, answer.output.splitlines()[-1].split())
        ahead_s, behind_s = last - answer.answered_s, answer.asked_s - first
        if max(ahead_s, behind_s) > MOST_CLOCK_DIFFERENCE_S:
            off = f"{ahead_s:.0f} s ahead" if ahead_s > behind_s else f"{behind_s:.0f} s behind"
            most = f"{MOST_CLOCK_DIFFERENCE_S:.0f} s"
            return f"host {host.name}'s clock is {off}, expected at most {most}: set the clocks, with ntp, say."
        return None

    ssh = [*SSH, *asking.port_option(ssh_port)]
    asking.refuse_hosts(hosts, ssh, f"sh -c {shlex.quote(script)}", problem_of, IMPORT_S)


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Within it no other supervisor on this machine runs in the folder."""
    lock = run_dir / "logs" / ".supervisor.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"--run-dir {run_dir}: {error.filename}: {error.strerror}.") from error

    with file:
        try:
            take_lock(file.fileno())
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(
                f"{run_dir} is supervised already, by {file.read() or 'another command'}: let it go on, or end that "
                "process first; it saves."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
        file.flush()
        yield


class Supervisor:
    """The store, and an agent on every host."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._id = launch, uuid.uuid4().hex
        self._is_stopped = False
        self._codes: list[int] = []
        self._agents: dict[str, subprocess.Popen[bytes]] = {}

        # Agents on this machine connect to it directly, agents on other hosts through their ssh.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
            self._store = TCPStore(
                "127.0.0.1",
                self._port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )

    def stop(self, *_: object) -> None:
        """Let all ranks save and end. A signal handler."""
        self._is_stopped = True
        self._end(EXIT_STOPPED)

    def run(self) -> int:
        """Keep an agent on every host until the end; returns the exit code."""
        places = self._launch.places()
        tails = [Tail(self._log(host), f"{host.name}: " if len(places) > 1 else "") for host in places]
        keepers = [threading.Thread(target=self._keep, args=(host,), daemon=True) for host in places]
        for keeper in keepers:
            keeper.start()

        # Show what agents print until they have ended. Once the run ends, they get a limited time.
        ends_s = None
        while any(keeper.is_alive() for keeper in keepers):
            time.sleep(LOOK_S)
            for tail in tails:
                tail.show()
            if self._end_code() is not None:
                ends_s = ends_s or time.monotonic() + self._launch.limits.save + self._launch.limits.lease
                if time.monotonic() > ends_s:
                    self._kill_agents()
        for tail in tails:
            tail.show()

        if self._is_stopped:
            return EXIT_STOPPED if EXIT_STOPPED in self._codes else EXIT_INTERRUPTED
        code = self._end_code()
        return EXIT_FAILURE if code is None else code

    def _keep(self, host: Host) -> None:
        """Start a host's agent again and again, until the run has ended. A host that ssh does not reach may return."""
        pause_s, failed = PAUSES_S[0], 0
        while self._end_code() is None and failed < GIVE_UP:
            began_s = time.monotonic()
            code = self._run_agent(host)
            self._codes.append(code)
            if code == EXIT_OK:  # its ranks came to the end, and so did all others
                self._end(EXIT_OK)

            # Start an agent that lived for long again at once.
            was_quick = time.monotonic() - began_s < QUICK_S
            pause_s = min(2 * pause_s, PAUSES_S[1]) if was_quick else PAUSES_S[0]
            failed = failed + 1 if was_quick and code not in (EXIT_OK, asking.SSH_FAILED) else 0
            deadline_s = time.monotonic() + pause_s
            while self._end_code() is None and time.monotonic() < deadline_s:
                time.sleep(LOOK_S)

        if self._end_code() is None:
            with self._log(host).open("a", encoding="utf-8") as log:
                log.write(f"supervised: its agent failed {GIVE_UP} times in a row: this host is left out\n")

    def _run_agent(self, host: Host) -> int:
        """Run a host's agent to its end; returns its exit code, 255 if ssh failed."""
        launch = self._launch
        if not launch.hosts or is_this_machine(host.name):
            command = ["sh", "-c", self._script(host, self._port, here=True)]
        else:
            port = random.choice(PORTS)
            patience = f"ServerAliveCountMax={launch.limits.lease // ALIVE_S}"  # as long as the agent's
            to = [*SSH, *TUNNEL, "-o", patience, *asking.port_option(launch.ssh_port)]
            script = self._script(host, port, here=False)
            command = [*to, "-R", f"127.0.0.1:{port}:127.0.0.1:{self._port}", host.name, f"sh -c {shlex.quote(script)}"]

        # It gets its own session, because Ctrl-C is for the supervisor, and a file, which outlives the supervisor.
        with self._log(host).open("ab") as log:
            agent = subprocess.Popen(
                command, env=dict(launch.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            self._agents[host.name] = agent
            return agent.wait()

    def _script(self, host: Host, port: int, here: bool) -> str:
        """The script that the shell of a host runs."""
        launch = self._launch
        exported = {} if here else exported_to_hosts(launch.environ)

        agent = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", f"{launch.min_hosts}:{len(launch.places())}", "--nproc-per-node", str(host.slots)),
            *("--rdzv-backend", NAME, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", self._id),
            *("--rdzv-conf", f"{launch.limits.conf}", "--local-addr", host.name.rpartition("@")[2]),
            *("--max-restarts", "1000000"),  # the rendezvous counts
        ]

        # Signs of life and torch's own files are in a folder that this shell removes, however the agent ends.
        lines = [
            f"cd {shlex.quote(str(Path.cwd()))}",
            *([f". {shlex.quote(launch.venv_script)}"] if launch.venv_script and not here else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
            f"{PULSES}=$(mktemp -d -t ds-slm-XXXXXX)",
            f"trap 'rm -rf \"${PULSES}\"' EXIT",
            f"export {PULSES}",
        ]
        run = f'{shlex.join(agent)} --log-dir "${PULSES}" {shlex.join(launch.command)}'
        if here:
            return " && ".join([*lines, run])

        # Ranks that save must not fail because nobody reads their output: ssh may be gone.
        output = f'"${PULSES}/output"'
        lines += [f": >{output}", f"{{ {run} >{output} 2>&1 & }}"]
        return " && ".join(lines) + f"; agent=$!; tail -n +1 -s {LOOK_S} -f --pid $agent {output}; wait $agent"

    def _log(self, host: Host) -> Path:
        return self._launch.run_dir / "logs" / f"{host.name}.log"

    def _end(self, code: int) -> None:
        """Let all agents end with an exit code; the first one counts."""
        self._store.compare_set(END, "", str(code))

    def _end_code(self) -> int | None:
        return int(self._store.get(END)) if self._store.check([END]) else None

    def _kill_agents(self) -> None:
        for agent in self._agents.values():
            with contextlib.suppress(ProcessLookupError):
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)


class Tail:
    """Shows on the terminal what a host's log gains."""

    def __init__(self, log: Path, prefix: str) -> None:
        self._log, self._prefix, self._rest, self._in_traceback = log, prefix, b"", False
        log.touch()
        self._position = log.stat().st_size

    def show(self) -> None:
        """Print the new lines; from torch's agent only which rank a signal ended, from a traceback the last line."""
        with self._log.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        self._position += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")

        for line in (one.decode(errors="replace") for one in lines):
            if (shown := self._shown(line)) is not None:
                print(f"{self._prefix}{shown}", flush=True)

    def _shown(self, line: str) -> str | None:
        """The part of a line that is shown; None if it is not shown."""
        if killed := _KILLED.match(line):
            number, rank, pid = killed.groups()
            return f"rank {rank} of this host (process {pid}) was ended by signal {number}"

        if line == _TRACEBACK:
            self._in_traceback = True
        elif self._in_traceback and not line.startswith(" "):
            self._in_traceback = False
            return f"{line} (traceback: {self._log})"
        elif not self._in_traceback and not _TORCH_LINE.match(line):
            return line
        return None


def exported_to_hosts(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for other hosts: variables with DeepSpeed's prefixes, and the lines of its environment file."""
    found = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    for folder in (Path.home(), Path()):
        path = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        if path.is_file():
            pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
            found |= {name.strip(): value for name, equals, value in pairs if equals and not name.startswith("#")}
    return found
