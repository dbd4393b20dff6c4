"""Supervised runs across hosts that die, hang, are cut off and come back: `ds-slm train R --hostfile H --restarts K`.

The quick tests belong to `make cluster-test`; all of them are `make cluster-faults`, which prints how long each fault
cost. Oracle: the plain `deepspeed --hostfile` run of the same recipe, bit for bit on the same hosts; on other numbers
of ranks one rank's run, with equal ledgers and losses within the bound for fp32.
"""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts, missing_requirements
from tests.support import runs

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
LAUNCH_TIMEOUT_S = 240.0
TOO_LATE_S = 90.0
"""A fault may cost so much on a machine that does other things, too; without them half of it."""
LOSS, LOSS_STEPS = 5e-6, 300
"""Relative, over the first steps: at this rate what other numbers of ranks round differently grows with every step."""
STEPS = ["--set", "train.steps=100000"]
EXACT = ("step", "tokens", "loss", "grad_norm", "ledger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and its text, which every host sees at the same path."""
    path = tmp_path_factory.mktemp("recipe")
    runs.write_recipe(path)
    return path


def make_hosts(folder: Path, *nodes: str) -> Hosts:
    if problems := missing_requirements():
        pytest.fail("hosts cannot be made here. " + " ".join(problems), pytrace=False)
    return Hosts(CHECKOUT, folder, nodes)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with make_hosts(tmp_path_factory.mktemp("two"), "node1", "node2") as hosts:
        yield hosts


class Supervised:
    """A supervised run on some hosts, and what it prints."""

    def __init__(self, hosts: Hosts, folder: Path, name: str, trained_on: tuple[str, ...], *flags: str) -> None:
        self.hosts, self.name, self._output = hosts, name, folder / f"{name}.output"
        hostfile = folder / f"{name}.hostfile"
        hostfile.write_text("".join(f"{node} slots=1\n" for node in trained_on))
        command = ["ds-slm", "train", str(folder / "tiny.toml"), "--hostfile", str(hostfile), "--restarts", "3"]
        with self._output.open("w") as output:
            self.process = hosts.start(
                [*command, "--hang-timeout", "20", "--run-dir", f"runs/{name}", *STEPS, *flags], output, output
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def supervisor(self) -> psutil.Process:
        """The process that was typed, within its host."""
        typed = [one for one in self.hosts.processes(self.hosts.nodes[0]) if "--restarts" in one.cmdline()]
        return next(one for one in typed if f"runs/{self.name}" in one.cmdline())

    def ranks(self, node: str) -> list[psutil.Process]:
        """The host's processes of the training program."""
        found = []
        for process in self.hosts.processes(node):
            line = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
            if line[2:3] and line[2].endswith("pretrain.py"):
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

    def await_steps(self, text: str = "", hosts: int | None = None, resumes: bool = False) -> float:
        """Seconds until a step is taken by a launch that began behind some output, on a number of hosts."""
        begins = re.compile(rf"tiny on {hosts or '[0-9]+'} x .*, hosts (\w+)")

        def stepped() -> bool:
            added = self.output[len(text) :]
            if not (begun := begins.search(added)):
                return False
            resumed = re.search(r"resumed at step (\d+)", added[begun.end() :])
            if resumes and not resumed:
                return False
            return newest(self.hosts, begun[1], self.name) > int(resumed[1] if resumed else 0)

        return self.wait_for(f"steps on {hosts or 'any'} hosts", stepped)

    def fault(self, what: str, action: Callable[[], object], hosts: int) -> None:
        """Do something to the run; it must be training again, on so many hosts, in time."""
        before = self.output
        action()
        took_s = self.await_steps(before, hosts, resumes=True)
        print(f"{self.name}: {what}: a step again, on {hosts} hosts, after {took_s:.1f} s")
        assert took_s < TOO_LATE_S
        time.sleep(1)  # some steps more

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.hosts.end_processes()


def records(hosts: Hosts, node: str, run: str) -> list[dict]:
    return runs.records(hosts.runs(node) / run)


def newest(hosts: Hosts, node: str, run: str) -> int:
    path = hosts.runs(node) / run / "metrics.jsonl"
    found = re.findall(r'"step": ?(\d+)', path.read_text()[-2000:]) if path.is_file() else []
    return int(found[-1]) if found else 0


def test_a_killed_rank_changes_no_bit(two: Hosts, folder: Path) -> None:
    """SIGKILL to node2's rank behind the first checkpoint. Oracle: the plain run on the same hosts."""
    last = ["--max-steps", "40"]
    hostfile = folder / "plain.hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    plain = ["deepspeed", "--hostfile", str(hostfile), "ds_slm/pretrain.py", "--recipe", str(folder / "tiny.toml")]
    done = two.launch([*plain, "--run-dir", "runs/plain", *STEPS, *last], LAUNCH_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-6000:]

    run = Supervised(two, folder, "killed", ("node1", "node2"), *last)
    run.wait_for("step 13", lambda: newest(two, "node1", "killed") >= 13)
    run.fault("a rank is killed", lambda: run.ranks("node2")[0].kill(), hosts=2)
    assert run.process.wait(PATIENCE_S) == 0, run.output
    assert "restart 1 of 3" in run.output
    found, expected = (
        [[one[key] for key in EXACT] for one in records(two, "node1", name)] for name in ("killed", "plain")
    )
    assert found == expected


def test_a_mistake_on_one_host_ends_all_in_its_own_words(two: Hosts, folder: Path) -> None:
    """node2's run folder is somebody's notes. No restart helps, and no host trains on."""
    (two.runs("node2") / "mistake").mkdir()
    (two.runs("node2") / "mistake" / "notes.txt").write_text("do not touch")
    run = Supervised(two, folder, "mistake", ("node1", "node2"))
    assert run.process.wait(PATIENCE_S) == 2, run.output
    assert run.output.count("not a run folder") == 1
    assert "Traceback" not in run.output and "restart" not in run.output
    assert not two.processes("node1") and not two.processes("node2")


@pytest.mark.slow
def test_hosts_die_hang_are_cut_off_and_come_back(tmp_path: Path, folder: Path) -> None:
    """One run through all of it, launched from a third host. Its rows are those of a run that nothing happened to."""
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "faults", ("node1", "node2"))
        try:
            run.await_steps(hosts=2)
            run.wait_for("a checkpoint", lambda: newest(hosts, "node1", "faults") > 12)
            run.fault("rank 0 is killed", lambda: run.ranks("node1")[0].kill(), 2)
            run.fault("node2 is off", lambda: hosts.power_off("node2"), 1)
            run.fault("node2 is on again", lambda: hosts.power_on("node2"), 2)
            run.fault("node1, rank 0's, is off", lambda: hosts.power_off("node1"), 1)
            run.fault("node1 is on again", lambda: hosts.power_on("node1"), 2)
            run.fault("a rank freezes", lambda: run.ranks("node2")[0].send_signal(signal.SIGSTOP), 2)
            cut_off(run, hosts)
            run.fault("the cable is mended", lambda: hosts.mend("node2"), 2)
            run.supervisor().terminate()
            assert run.process.wait(PATIENCE_S) == 75, run.output
        finally:
            print(run.output[-3000:])
            run.end()
        compare_with_one_rank(hosts, folder)


def cut_off(run: Supervised, hosts: Hosts) -> None:
    """A cut cable: node2 must be empty before node1 takes a step alone."""
    before = run.output
    cut = run.ranks("node2")
    hosts.cut("node2")
    empty_s = run.wait_for("node2 to be empty", lambda: not any(one.is_running() for one in cut))
    assert "tiny on 1 x" not in run.output[len(before) :]
    alone_s = empty_s + run.await_steps(before, 1, resumes=True)
    print(f"{run.name}: node2 is cut off: empty after {empty_s:.1f} s, node1 alone after {alone_s:.1f} s")


def compare_with_one_rank(hosts: Hosts, folder: Path) -> None:
    found = records(hosts, "node1", "faults")
    assert [one["step"] for one in found] == list(range(1, len(found) + 1))
    assert [one["ledger"] for one in records(hosts, "node2", "faults")] == [one["ledger"] for one in found]
    rare = ["--set", "run.eval_every_steps=100000", "--set", "run.save_every_steps=100000"]
    flags = ["--recipe", "tiny.toml", "--run-dir", "whole", *STEPS, *rare, "--max-steps", str(len(found))]
    done = runs.run(runs.deepspeed_command(1, *flags), folder, timeout_s=900)
    assert done.returncode == 0, done.stderr
    whole = runs.records(folder / "whole")
    assert [one["ledger"] for one in found] == [one["ledger"] for one in whole]
    apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, whole, strict=True)]
    worst = max(apart[:LOSS_STEPS])
    print(f"faults: {len(found)} steps, ledgers equal; losses within {worst:.1e} of one rank's, {max(apart):.1e} later")
    assert worst < LOSS


@pytest.mark.slow
def test_when_the_supervisor_is_killed_all_hosts_save_and_end(tmp_path: Path, folder: Path) -> None:
    """SIGKILL on the launching host. The same command goes on without a lost step."""
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "orphans", ("node1", "node2"))
        run.await_steps(hosts=2)
        began_s = time.monotonic()
        run.supervisor().kill()
        while hosts.processes("node1") or hosts.processes("node2"):
            assert time.monotonic() - began_s < TOO_LATE_S
            time.sleep(0.05)
        print(f"the supervisor is killed: no process on any host after {time.monotonic() - began_s:.1f} s")
        last = newest(hosts, "node1", "orphans")
        for node in ("node1", "node2"):
            assert json.loads((hosts.runs(node) / "orphans" / "saved.json").read_text())["step"] == last

        again = Supervised(hosts, folder, "orphans", ("node1", "node2"))
        again.await_steps(hosts=2, resumes=True)
        assert f"resumed at step {last}" in again.output
        again.supervisor().terminate()
        assert again.process.wait(PATIENCE_S) == 75, again.output


@pytest.mark.slow
def test_rank_0s_host_of_three_dies_and_comes_back(tmp_path: Path, folder: Path) -> None:
    """torchrun alone never heals here: it keeps the first round's address of rank 0."""
    nodes = ("node1", "node2", "node3")
    with make_hosts(tmp_path / "hosts", "head", *nodes) as hosts:
        run = Supervised(hosts, folder, "three", nodes)
        try:
            run.await_steps(hosts=3)
            run.wait_for("a checkpoint", lambda: newest(hosts, "node1", "three") > 12)
            run.fault("node1 of three is off", lambda: hosts.power_off("node1"), 2)
            run.fault("node1 of three is on again", lambda: hosts.power_on("node1"), 3)
            run.supervisor().terminate()
            assert run.process.wait(PATIENCE_S) == 75, run.output
            assert not any(hosts.processes(node) for node in nodes)
        finally:
            print(run.output[-3000:])
            run.end()


@pytest.mark.slow
def test_two_runs_on_the_same_hosts_do_not_disturb_each_other(two: Hosts, folder: Path) -> None:
    first, second = (Supervised(two, folder, name, ("node1", "node2")) for name in ("first", "second"))
    try:
        first.await_steps()
        second.await_steps()
        before = newest(two, "node1", "second")
        first.supervisor().terminate()
        assert first.process.wait(PATIENCE_S) == 75, first.output
        second.wait_for("further steps", lambda: newest(two, "node1", "second") > before)
        assert "restart" not in second.output
    finally:
        first.end()
        second.end()
