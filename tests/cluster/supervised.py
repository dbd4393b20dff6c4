"""A supervised run on hosts in namespaces, as `ds-slm train R --hostfile H --restarts K` starts it, and its story."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import Hosts
from tests.support import runs

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
TOO_LATE_S = 90.0
"""A fault may cost so much on a machine that does other things, too; without them half of it."""
STEPS = ["--set", "train.steps=100000"]


def make_hosts(folder: Path, *nodes: str) -> Hosts:
    """Hosts for the time of a `with` block; the test fails where they cannot be made."""
    if problems := missing_requirements():
        pytest.fail("hosts cannot be made here. " + " ".join(problems), pytrace=False)
    return Hosts(CHECKOUT, folder, nodes)


class Supervised:
    """A supervised run on some hosts, and what it prints."""

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        name: str,
        trained_on: tuple[str, ...],
        *flags: str,
        slots: int = 1,
        verb: str = "train",
        **env: str,
    ) -> None:
        """Type the command on the first host.

        Args:
            hosts: where it happens.
            folder: the recipe's, where output and hostfile go, too.
            name: of the run.
            trained_on: the hosts of the hostfile.
            flags: further ones.
            slots: ranks a host.
            verb: `train` takes tiny.toml, `sft` chatty.toml.
            env: more environment, for the ranks of all hosts, too.
        """
        self.hosts, self.name, self._output = hosts, name, folder / f"{name}.output"
        self.hostfile = folder / f"{name}.hostfile"
        self.hostfile.write_text("".join(f"{node} slots={slots}\n" for node in trained_on))
        recipe = str(folder / {"train": "tiny.toml", "sft": "chatty.toml"}[verb])  # both call their model tiny
        command = ["ds-slm", verb, recipe, "--hostfile", str(self.hostfile), "--restarts", "3"]
        command += ["--hang-timeout", "20", "--run-dir", f"runs/{name}", *flags]
        command += [] if any("train.steps=" in flag for flag in flags) else STEPS
        with self._output.open("w") as output:
            self.process = hosts.start(command, output, output, env)

    @property
    def output(self) -> str:
        """All that the command has printed."""
        return self._output.read_text()

    def supervisor(self) -> psutil.Process:
        """The process that was typed, within its host."""
        typed = [one for one in self.hosts.processes(self.hosts.nodes[0]) if "--restarts" in one.cmdline()]
        return next(one for one in typed if f"runs/{self.name}" in one.cmdline())

    def ranks(self, node: str) -> list[psutil.Process]:
        """The host's processes of the training program."""
        return self._processes(node, lambda line: line[2:3] and line[2].endswith("train.py"))

    def agents(self, node: str) -> list[psutil.Process]:
        """The process that starts the host's ranks, if there is one."""
        return self._processes(node, lambda line: line[1:3] == ["-m", "torch.distributed.run"])

    def ssh(self, node: str) -> psutil.Process:
        """The process on the launching host that the host's agent is reached through."""
        (found,) = self._processes(self.hosts.nodes[0], lambda line: line[:1] == ["ssh"] and node in line)
        return found

    def left(self, node: str) -> list[psutil.Process]:
        """The host's processes but for sshd's: one that its peer took no leave of waits for that."""
        return self._processes(node, lambda line: line and not line[0].startswith("sshd"))

    def _processes(self, node: str, is_meant: Callable[[list[str]], object]) -> list[psutil.Process]:
        found = []
        for process in self.hosts.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
                if is_meant(line):
                    found.append(process)
        return found

    def wait_for(self, what: str, condition: Callable[[], object]) -> float:
        """How long it took until a condition held."""
        began_s = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - began_s
            assert self.process.poll() is None, f"ended while waiting for {what}\n{self.output[-6000:]}"
            assert waited_s < PATIENCE_S, f"waited for {what}\n{self.output[-6000:]}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def await_steps(self, text: str = "", ranks: int | None = None, resumes: bool = False) -> float:
        """Seconds until a step is taken by a launch that began behind some output, on a number of ranks."""
        begins = re.compile(rf"tiny on {ranks or '[0-9]+'} x .*, hosts (\w+)")

        def stepped() -> bool:
            added = self.output[len(text) :]
            if not (begun := begins.search(added)):
                return False
            resumed = re.search(r"resumed at step (\d+)", added[begun.end() :])
            if resumes and not resumed:
                return False
            return newest(self.hosts, begun[1], self.name) > int(resumed[1] if resumed else 0)

        return self.wait_for(f"steps on {ranks or 'any'} ranks", stepped)

    def fault(self, what: str, action: Callable[[], object], ranks: int) -> None:
        """Do something to the run; it must be training again, on so many ranks, in time."""
        before = self.output
        action()
        took_s = self.await_steps(before, ranks, resumes=True)
        print(f"{self.name}: {what}: a step again, on {ranks} ranks, after {took_s:.1f} s, {load()}")
        assert took_s < TOO_LATE_S
        time.sleep(1)  # some steps more

    def end(self) -> None:
        """End every process on all hosts."""
        self.process.kill()
        self.process.wait()
        self.hosts.end_processes()


def load() -> str:
    """How busy this machine is: seconds depend on it."""
    return f"load {os.getloadavg()[0]:.1f}"


def records(hosts: Hosts, node: str, run: str) -> list[dict]:
    """The steps that a host's records tell of."""
    return runs.records(hosts.runs(node) / run)


def newest(hosts: Hosts, node: str, run: str) -> int:
    """The newest step in a host's records."""
    path = hosts.runs(node) / run / "metrics.jsonl"
    found = re.findall(r'"step": ?(\d+)', path.read_text()[-2000:]) if path.is_file() else []
    return int(found[-1]) if found else 0
