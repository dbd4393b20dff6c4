"""Supervised runs on hosts that must end, or be refused, and what a full disk and an edited hostfile do not end.

Every fault is made on one host with the system's own means. The oracle is the list of what was made: the exit code that
is documented, its words, and no process of the run on any host.
"""

import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import safetensors

from benchmarks.hosts import Hosts
from tests.cluster.commands import mounted, on
from tests.cluster.supervised import CHECKOUT, PATIENCE_S, TOO_LATE_S, Supervised, load, make_hosts, newest
from tests.support.runs import write_recipe

SITE = Path(safetensors.__file__).parents[1]
PAIR = ("node1", "node2")


def assert_refused(run: Supervised, *words: str) -> None:
    """The run ends with a user's mistake, in words that stand once on the terminal, and nothing goes on."""
    began_s = time.monotonic()
    assert run.process.wait(PATIENCE_S) == 2, run.output
    for text in words:
        assert run.output.count(text) == 1, f"{text!r} in\n{run.output}"
    assert "Traceback" not in run.output and "restart" not in run.output, run.output
    print(f"{run.name}: exit code 2 after {time.monotonic() - began_s:.1f} s, {load()}")
    assert not any(run.hosts.processes(node) for node in run.hosts.nodes)


def replaced(hosts: Hosts, folder: Path, path: Path, change: Callable[[str], str]) -> ExitStack:
    """On node2 a file of all hosts has another content, for a time."""
    text = path.read_text()
    other = folder / f"other-{path.name}"
    other.write_text(change(text))
    assert other.read_text() != text
    stack = ExitStack()
    stack.enter_context(mounted(hosts, "node2", f"mount --bind {other} {path}", f"umount {path}"))
    return stack


@pytest.mark.slow
def test_hosts_with_another_version_end_the_run_in_one_paragraph(two: Hosts, folder: Path) -> None:
    """On node2 another line of code, and another version of a library. Oracle: both are named, with both hosts."""
    (metadata,) = SITE.glob("safetensors-*.dist-info/METADATA")
    with (
        replaced(two, folder, CHECKOUT / "ds_slm" / "errors.py", lambda text: f"{text}\n# another version\n"),
        replaced(two, folder, metadata, lambda text: text.replace("\nVersion: ", "\nVersion: 9", 1)),
    ):
        run = Supervised(two, folder, "versions", PAIR)
        assert_refused(run, "the hosts differ in the source files of ds_slm", "the hosts differ in safetensors")


@pytest.mark.slow
def test_a_shard_that_was_changed_on_one_host_ends_the_run_in_one_paragraph(two: Hosts, folder: Path) -> None:
    """A shard's first bytes are others on node2. Oracle: exit code 2, and that shard's name, once."""
    run = Supervised(two, folder, "whole", PAIR, "--max-steps", "2")
    assert run.process.wait(PATIENCE_S) == 0, run.output
    shard = next(two.data("node2").rglob("train-*.bin"))
    content = shard.read_bytes()
    shard.write_bytes(b"\x11\x00" + content[2:])
    try:
        assert_refused(Supervised(two, folder, "changed", PAIR), shard.name)
    finally:
        shard.write_bytes(content)


@pytest.mark.slow
def test_a_host_whose_clock_is_off_is_refused(two: Hosts, folder: Path) -> None:
    """In every Python of node2 the clock is 30 s ahead."""
    startup = min(SITE.glob("*.pth"))
    ahead = "import time; time.time = lambda time=time: time.clock_gettime(time.CLOCK_REALTIME) + 30"
    with replaced(two, folder, startup, lambda text: f"{text}\n{ahead}\n"):
        run = Supervised(two, folder, "clock", PAIR)
        assert_refused(run, "host node2's clock is", "s ahead, expected at most 5 s")
        assert re.search("is (29|30) s", run.output), run.output


@pytest.mark.slow
def test_a_crash_that_comes_again_ends_the_run_with_its_first_error(two: Hosts, folder: Path) -> None:
    """Every save of step 20 kills the ranks that write it. Oracle: the restarts that were allowed, and code 1."""
    began_s = time.monotonic()
    run = Supervised(two, folder, "loop", PAIR, "--restarts", "2", DS_SLM_DIE_AT="manifest@20")
    assert run.process.wait(PATIENCE_S) == 1, run.output
    print(run.output)
    print(f"loop: ended after {time.monotonic() - began_s:.1f} s, {load()}")
    assert run.output.count("resumed at step 10") == 2 and "was ended by signal 9" in run.output
    assert "2 restarts brought no step after 2" in run.output
    assert not two.processes("node1") and not two.processes("node2")


@pytest.mark.slow
def test_an_edited_hostfile_counts_for_the_next_launch(two: Hosts, folder: Path, tmp_path: Path) -> None:
    """The running one keeps its hosts. A second command on the folder is refused, and told who runs there."""
    run = Supervised(two, folder, "edited", PAIR)
    run.wait_for("a checkpoint", lambda: newest(two, "node1", "edited") > 12)
    run.hostfile.write_text("node1 slots=1\n")
    run.fault("the hostfile was edited, and a rank is killed", lambda: run.ranks("node2")[0].kill(), 2)

    write_recipe(tmp_path)
    second = Supervised(two, tmp_path, "edited", PAIR)
    assert second.process.wait(PATIENCE_S) == 2
    assert "supervised already, by process " in second.output and "Traceback" not in second.output

    run.supervisor().send_signal(signal.SIGINT)
    assert run.process.wait(PATIENCE_S) == 75, run.output
    assert not two.processes("node1") and not two.processes("node2")


@pytest.mark.slow
def test_a_disk_that_fills_on_one_host_costs_its_copies_alone(two: Hosts, folder: Path) -> None:
    """node2's run folders lie on a small disk. Oracle: steps go on, and saves once there is room again.

    A launch writes into every host's run folder: a rank that dies while the disk is full ends the run, in its words.
    """
    disk = CHECKOUT / "runs"
    fill = f"head -c 20m /dev/zero >{disk}/rest; true"
    with mounted(two, "node2", f"mount -t tmpfs -o size=8m tmpfs {disk}", f"umount -l {disk}"):
        run = Supervised(two, folder, "full", PAIR)
        run.wait_for("a checkpoint", lambda: newest(two, "node1", "full") > 12)

        before = run.output
        on(two, "node2", fill)
        run.wait_for("a save that failed", lambda: "BUT NOT on node2" in run.output[len(before) :])
        stood, began_s = newest(two, "node1", "full"), time.monotonic()
        run.wait_for("further steps", lambda: newest(two, "node1", "full") > stood)
        print(f"full: node2's disk is full: a step after {time.monotonic() - began_s:.1f} s, {load()}")

        before = run.output
        on(two, "node2", f"rm {disk}/rest")
        run.wait_for("a save on both", lambda: re.search(r"saved step-\d+\n", run.output[len(before) :]))

        on(two, "node2", fill)
        run.ranks("node1")[0].kill()
        assert run.process.wait(PATIENCE_S) == 2, run.output
        assert run.output.count("node2: --run-dir runs/full: No space left on device.") == 1
        assert not run.left("node1") and not run.left("node2")


@pytest.mark.slow
def test_when_the_launching_host_is_lost_all_others_save_and_end(tmp_path: Path, folder: Path) -> None:
    """It loses its power, with no farewell. The same command goes on without a lost step once it is back."""
    with make_hosts(tmp_path / "hosts", "head", *PAIR) as hosts:
        run = Supervised(hosts, folder, "headless", PAIR)
        run.await_steps(ranks=2)
        began_s = time.monotonic()
        hosts.power_off("head")
        while any(run.left(node) for node in PAIR):
            assert time.monotonic() - began_s < TOO_LATE_S
            time.sleep(0.05)
        print(f"the launching host is off: no process on any host after {time.monotonic() - began_s:.1f} s, {load()}")
        last = newest(hosts, "node1", "headless")
        for node in PAIR:
            assert json.loads((hosts.runs(node) / "headless" / "saved.json").read_text())["step"] == last

        hosts.power_on("head")
        again = Supervised(hosts, folder, "headless", PAIR)
        again.await_steps(ranks=2, resumes=True)
        assert f"resumed at step {last}" in again.output
        again.supervisor().terminate()
        assert again.process.wait(PATIENCE_S) == 75, again.output
