"""Supervised runs across hosts that die, hang, are cut off and come back: `ds-slm train R --hostfile H --restarts K`.

The quick tests belong to `make cluster-test`; all of them are `make cluster-faults`, which prints how long each fault
cost. Oracle: the plain `deepspeed --hostfile` run of the same recipe, bit for bit on the same hosts; on other numbers
of ranks one rank's run, with equal ledgers and losses within the bound for fp32.
"""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.hosts import Hosts
from ds_slm.distributed.store import wait_until
from tests.cluster.supervised import (
    CHECKOUT,
    PATIENCE_S,
    STEPS,
    TOO_LATE_S,
    Supervised,
    load,
    make_hosts,
    newest,
    records,
)
from tests.support import runs
from tests.support.assistants import small_talk, write_base, write_sft

LAUNCH_TIMEOUT_S = 240.0
LOSS = 5e-6, 300
"""Relative, over the first steps: at this rate what other numbers of ranks round differently grows with every step."""
LOSS_BF16 = 2e-3, 30
"""Undisturbed runs of plain DeepSpeed on 1, 2 and 4 ranks: 6.4e-4 apart over 30 steps, 1.8e-3 over 50, in ZeRO-3."""
EXACT = ("step", "tokens", "loss", "grad_norm", "ledger")


def plain_steps(hosts: Hosts, folder: Path, program: str, recipe: str, *flags: str) -> list[list]:
    """The steps of a run by plain `deepspeed --hostfile`, with nothing to disturb it."""
    name, hostfile = f"plain-{Path(recipe).stem}", folder / "plain.hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    command = ["deepspeed", "--hostfile", str(hostfile), program, "--recipe", str(folder / recipe)]
    done = hosts.launch([*command, "--run-dir", f"runs/{name}", *STEPS, *flags], LAUNCH_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-6000:]
    return steps_of(hosts, name)


def steps_of(hosts: Hosts, name: str) -> list[list]:
    """What must be equal of a run's steps, to the bit."""
    return [[one[key] for key in EXACT] for one in records(hosts, "node1", name)]


def kill_a_rank(run: Supervised) -> None:
    """SIGKILL to node2's rank behind the first checkpoint; the run goes on, to its end."""
    run.wait_for("step 13", lambda: newest(run.hosts, "node1", run.name) >= 13)
    run.fault("a rank is killed", lambda: run.ranks("node2")[0].kill(), ranks=2)
    assert run.process.wait(PATIENCE_S) == 0, run.output


def test_a_killed_rank_changes_no_bit(two: Hosts, folder: Path) -> None:
    """SIGKILL to node2's rank behind the first checkpoint. Oracle: the plain run on the same hosts."""
    last = ["--max-steps", "200"]
    expected = plain_steps(two, folder, "ds_slm/pretrain.py", "tiny.toml", *last)
    run = Supervised(two, folder, "killed", ("node1", "node2"), *last)
    kill_a_rank(run)
    assert "restart 1 of 3" in run.output
    assert steps_of(two, "killed") == expected


def test_a_mistake_on_one_host_ends_all_in_its_own_words(two: Hosts, folder: Path) -> None:
    """node2's run folder is somebody's notes. No restart helps, and no host trains on."""
    (two.runs("node2") / "mistake").mkdir()
    (two.runs("node2") / "mistake" / "notes.txt").write_text("do not touch")
    run = Supervised(two, folder, "mistake", ("node1", "node2"))
    assert run.process.wait(PATIENCE_S) == 2, run.output
    assert run.output.count("not a run folder") == 1
    assert "Traceback" not in run.output and "restart" not in run.output
    assert wait_until(lambda: not two.processes("node1") and not two.processes("node2"), 30, 0.1)  # sshd may end later


@pytest.mark.slow
def test_a_fine_tuning_goes_on_too(two: Hosts, folder: Path) -> None:
    """SIGKILL to node2's rank; node2 is sent the base. Oracle: the plain fine-tuning on the same hosts, bit for bit."""
    base, recipe = two.runs("node1") / "base", write_sft(folder, small_talk())
    shutil.copytree(write_base(folder), base)
    flags = ["--base", "runs/base", "--max-steps", "30"]
    expected = plain_steps(two, folder, "sft/train.py", recipe.name, *flags)
    shutil.rmtree(two.runs("node2") / "base")

    run = Supervised(two, folder, "sft", ("node1", "node2"), *flags, verb="sft")
    kill_a_rank(run)
    assert (two.runs("node2") / "base" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert steps_of(two, "sft") == expected


@pytest.mark.slow
def test_hosts_die_hang_are_cut_off_and_come_back(tmp_path: Path, folder: Path) -> None:
    """One run through all of it, launched from a third host. Its rows are those of a run that nothing happened to."""
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "faults", ("node1", "node2"))
        try:
            run.await_steps(ranks=2)
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
        compare_with_one_rank(hosts, folder, "faults")


@pytest.mark.slow
def test_agents_die_and_freeze_and_short_faults_are_survived(tmp_path: Path, folder: Path) -> None:
    """One run through what happens to agents, to a host's processes, and to the ssh that reaches it."""
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "agents", ("node1", "node2"))
        try:
            run.await_steps(ranks=2)
            run.wait_for("a checkpoint", lambda: newest(hosts, "node1", "agents") > 12)
            ridden_out(run, hosts)
            frozen = run.agents("node2")[0]
            run.fault("node2's agent freezes", lambda: frozen.send_signal(signal.SIGSTOP), 1)
            run.fault("it thaws", lambda: frozen.send_signal(signal.SIGCONT), 2)
            run.fault("node2's agent is killed", lambda: run.agents("node2")[0].kill(), 2)
            run.fault("node1's agent is told to end", lambda: run.agents("node1")[0].terminate(), 2)
            run.fault("a rank is told to end", lambda: run.ranks("node2")[0].terminate(), 2)
            run.fault("all processes of node2 are killed", lambda: kill_all(hosts, "node2"), 2)
            run.fault("node2's ssh is killed", lambda: run.ssh("node2").kill(), 2)
            run.supervisor().terminate()
            assert run.process.wait(PATIENCE_S) == 75, run.output
            assert not hosts.processes("node1") and not hosts.processes("node2")
        finally:
            print(run.output[-3000:])
            run.end()
        compare_with_one_rank(hosts, folder, "agents")


def ridden_out(run: Supervised, hosts: Hosts) -> None:
    """A cable that is cut for 5 seconds: the same ranks go on."""
    before, began_s = run.output, time.monotonic()
    hosts.cut("node2")
    time.sleep(5)
    stood = newest(hosts, "node1", run.name)
    hosts.mend("node2")
    run.wait_for("a step behind the cut", lambda: newest(hosts, "node1", run.name) > stood)
    print(f"{run.name}: node2 is cut off for 5 s: a step after {time.monotonic() - began_s:.1f} s, {load()}")
    assert "tiny on" not in run.output[len(before) :]


def kill_all(hosts: Hosts, node: str) -> None:
    """Unlike a host without power, its kernel tells the others."""
    for process in hosts.processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def cut_off(run: Supervised, hosts: Hosts) -> None:
    """A cut cable: node2 must be empty before node1 takes a step alone."""
    before = run.output
    cut = run.ranks("node2")
    hosts.cut("node2")
    empty_s = run.wait_for("node2 to be empty", lambda: not any(one.is_running() for one in cut))
    assert "tiny on 1 x" not in run.output[len(before) :]
    alone_s = empty_s + run.await_steps(before, 1, resumes=True)
    print(f"{run.name}: node2 is cut off: empty after {empty_s:.1f} s, node1 alone after {alone_s:.1f} s, {load()}")


def compare_with_one_rank(hosts: Hosts, folder: Path, name: str, *flags: str, bound: tuple[float, int] = LOSS) -> None:
    """The records of both hosts against one rank that nothing happened to."""
    found = records(hosts, "node1", name)
    assert [one["step"] for one in found] == list(range(1, len(found) + 1))
    assert [one["ledger"] for one in records(hosts, "node2", name)] == [one["ledger"] for one in found]
    rare = ["--set", "run.eval_every_steps=100000", "--set", "run.save_every_steps=100000"]
    launch = ["--recipe", "tiny.toml", "--run-dir", f"whole-{name}", *STEPS, *rare, "--max-steps", str(len(found))]
    done = runs.run(runs.deepspeed_command(1, *launch, *flags), folder, timeout_s=900)
    assert done.returncode == 0, done.stderr
    whole = runs.records(folder / f"whole-{name}")
    assert [one["ledger"] for one in found] == [one["ledger"] for one in whole]
    apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, whole, strict=True)]
    most, steps = bound
    worst = max(apart[:steps])
    print(f"{name}: {len(found)} steps, ledgers equal; losses within {worst:.1e} of one rank's, {max(apart):.1e} later")
    assert worst < most


@pytest.mark.slow
def test_when_the_supervisor_is_killed_all_hosts_save_and_end(tmp_path: Path, folder: Path) -> None:
    """SIGKILL on the launching host. The same command goes on without a lost step."""
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "orphans", ("node1", "node2"))
        run.await_steps(ranks=2)
        began_s = time.monotonic()
        run.supervisor().kill()
        while hosts.processes("node1") or hosts.processes("node2"):
            assert time.monotonic() - began_s < TOO_LATE_S
            time.sleep(0.05)
        print(f"the supervisor is killed: no process on any host after {time.monotonic() - began_s:.1f} s, {load()}")
        last = newest(hosts, "node1", "orphans")
        for node in ("node1", "node2"):
            assert json.loads((hosts.runs(node) / "orphans" / "saved.json").read_text())["step"] == last

        again = Supervised(hosts, folder, "orphans", ("node1", "node2"))
        again.await_steps(ranks=2, resumes=True)
        assert f"resumed at step {last}" in again.output
        again.supervisor().terminate()
        assert again.process.wait(PATIENCE_S) == 75, again.output


@pytest.mark.slow
def test_two_ranks_a_host_in_bf16_under_zero_3_are_survived(tmp_path: Path, folder: Path) -> None:
    """Partitions of weights and 8-bit moments are put together from a checkpoint for two, and for four ranks again."""
    flags = ["--ds-config", str(CHECKOUT / "ds_configs" / "zero3.json")]
    flags += ["--set", "train.precision=bf16", "--set", "optimizer.name=adamw8bit"]
    with make_hosts(tmp_path / "hosts", "head", "node1", "node2") as hosts:
        run = Supervised(hosts, folder, "zero3", ("node1", "node2"), *flags, slots=2)
        try:
            run.await_steps(ranks=4)
            run.wait_for("a checkpoint", lambda: newest(hosts, "node1", "zero3") > 12)
            run.fault("one of two ranks is killed", lambda: run.ranks("node2")[1].kill(), 4)
            run.fault("node1 is off", lambda: hosts.power_off("node1"), 2)
            run.fault("node1 is on again", lambda: hosts.power_on("node1"), 4)
            run.supervisor().terminate()
            assert run.process.wait(PATIENCE_S) == 75, run.output
        finally:
            print(run.output[-3000:])
            run.end()
        compare_with_one_rank(hosts, folder, "zero3", *flags, bound=LOSS_BF16)


@pytest.mark.slow
def test_rank_0s_host_of_three_dies_and_comes_back(tmp_path: Path, folder: Path) -> None:
    """torchrun alone never heals here: it keeps the first round's address of rank 0."""
    nodes = ("node1", "node2", "node3")
    with make_hosts(tmp_path / "hosts", "head", *nodes) as hosts:
        run = Supervised(hosts, folder, "three", nodes)
        try:
            run.await_steps(ranks=3)
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
    """Oracle: exit code 75 of the run that is stopped; the other then takes further steps, and never restarts."""
    first, second = (Supervised(two, folder, name, ("node1", "node2")) for name in ("first", "second"))
    try:
        first.await_steps()
        second.await_steps()
        first.supervisor().terminate()
        assert first.process.wait(PATIENCE_S) == 75, first.output
        before = newest(two, "node1", "second")
        second.wait_for("further steps", lambda: newest(two, "node1", "second") > before)
        assert "restart" not in second.output
    finally:
        first.end()
        second.end()
