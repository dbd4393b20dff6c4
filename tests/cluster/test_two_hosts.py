"""DeepSpeed across two hosts, as a user types it: run by `make cluster-test`, which needs root and Debian packages.

Launches of the demo recipe, each of a few steps. The oracle of every loss is the same recipe on two ranks of one host;
that of resuming is the run that was never interrupted.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import TwoHosts
from tests.support import tolerances

CHECKOUT = Path(__file__).resolve().parents[2]
TWO_HOSTS = ["deepspeed", "--hostfile", "hostfiles/two_node", "ds_slm/pretrain.py"]
ONE_HOST = ["deepspeed", "--num_accelerators", "2", "ds_slm/pretrain.py"]
# The first step of the warm-up has learning rate 0: the third loss is the first to show an update.
STEPS = 4
INTERRUPTED_AT = 2
LAUNCH_TIMEOUT_S = 240.0
TOLERANCE = tolerances.TOPOLOGIES["bf16"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if problems := missing_requirements():
        pytest.fail("two hosts cannot be made here. " + " ".join(problems), pytrace=False)
    with TwoHosts(CHECKOUT, tmp_path_factory.mktemp("hosts")) as two_hosts:
        yield two_hosts


@pytest.fixture(scope="module")
def across(hosts: TwoHosts) -> list[dict]:
    """The documented command but for --max-steps: ZeRO-1 on two hosts, into runs/demo, data prepared on each."""
    train(hosts, TWO_HOSTS, STEPS)
    return train_records(hosts, "demo")


@pytest.fixture(scope="module")
def alone(hosts: TwoHosts, across: list[dict]) -> list[dict]:
    """The same on two ranks of node1."""
    train(hosts, ONE_HOST, STEPS, "--run-dir", "runs/alone")
    return train_records(hosts, "alone")


def train(hosts: TwoHosts, command: list[str], max_steps: int, *flags: str) -> str:
    """Launch on node1; its output. Fails with the end of it if the launch does."""
    start = time.monotonic()
    done = hosts.launch([*command, "--max-steps", str(max_steps), *flags], timeout_s=LAUNCH_TIMEOUT_S)
    print(f"{time.monotonic() - start:.0f} s: {' '.join(done.args)}")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def train_records(hosts: TwoHosts, run: str) -> list[dict]:
    """The train records of a run; every host that took part has the same steps."""
    files = [path for node in hosts.nodes if (path := hosts.runs(node) / run / "metrics.jsonl").exists()]
    found = [
        [one for one in map(json.loads, path.read_text().splitlines()) if one["kind"] == "train"] for path in files
    ]
    for theirs in found[1:]:
        assert_same_training(theirs, found[0])
    return found[0]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def assert_same_training(got: list[dict], expected: list[dict]) -> None:
    assert [record["step"] for record in got] == list(range(1, len(got) + 1))
    for ours, theirs in zip(got, expected, strict=False):
        assert (ours["step"], ours["tokens"], ours["ledger"]) == (theirs["step"], theirs["tokens"], theirs["ledger"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE.loss)


def test_zero1_gives_the_losses_of_two_ranks_on_one_host(across: list[dict], alone: list[dict]) -> None:
    """Oracle: the same recipe on two ranks of node1: equal tokens and ledgers, losses apart by rounding alone."""
    assert len(across) == len(alone) == STEPS
    assert_same_training(across, alone)
    assert across[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=TOLERANCE.grad_norm)


@pytest.mark.parametrize("stage", [2, 3])
def test_other_stages_give_them_too(hosts: TwoHosts, alone: list[dict], stage: int) -> None:
    """Oracle: the losses of ZeRO-1 on two ranks of node1; the stage that was asked for, in each host's env.json."""
    steps, run = STEPS - 1, f"z{stage}"
    train(hosts, TWO_HOSTS, steps, "--ds-config", f"ds_configs/zero{stage}.json", "--run-dir", f"runs/{run}")
    records = train_records(hosts, run)
    assert len(records) == steps
    assert_same_training(records, alone)
    for node in hosts.nodes:
        assert read_json(hosts.runs(node) / run / "env.json")["zero_stage"] == stage


def test_a_resumed_run_equals_the_uninterrupted_one(hosts: TwoHosts, across: list[dict]) -> None:
    """Same topology, so bit for bit: the oracle is the run of the first test.

    In between the first host lost its run folder and the other one its data: each receives what the other has.
    """
    train(hosts, TWO_HOSTS, INTERRUPTED_AT, "--run-dir", "runs/resumed")
    shutil.rmtree(hosts.runs("node1") / "resumed")
    shutil.rmtree(hosts.data("node2") / "demo")
    said = train(hosts, TWO_HOSTS, STEPS, "--run-dir", "runs/resumed")
    assert "node2: demo/tokenizer: receiving" in said and "from node1" in said
    assert "the records so far were sent to node1" in said

    assert all((hosts.runs(node) / "resumed" / "metrics.jsonl").exists() for node in hosts.nodes)
    records = train_records(hosts, "resumed")
    exact = ("step", "tokens", "loss", "grad_norm", "lr", "ledger")
    assert [[record[key] for key in exact] for record in records] == [
        [record[key] for key in exact] for record in across
    ]
    assert read_json(hosts.runs("node1") / "resumed" / "env.json")["generation"] == 2
    last = f"step-{STEPS:08d}"
    for run in ("demo", "resumed"):
        assert (hosts.runs("node1") / run / "checkpoints" / "latest").read_text().strip() == last
    weights = [manifest(hosts, "node1", run, last)["files"]["model.safetensors"] for run in ("demo", "resumed")]
    assert weights[0] == weights[1]


def manifest(hosts: TwoHosts, node: str, run: str, checkpoint: str) -> dict:
    return read_json(hosts.runs(node) / run / "checkpoints" / checkpoint / "manifest.json")


def test_each_host_has_its_own_copy_of_checkpoint_and_data(hosts: TwoHosts, across: list[dict]) -> None:
    """Nothing is shared: the hosts' folders lie apart on this machine, and hold the same bytes."""
    copies = [manifest(hosts, node, "demo", f"step-{STEPS:08d}") for node in hosts.nodes]
    assert copies[0] == copies[1]
    launches = [read_json(hosts.runs(node) / "demo" / "env.json") for node in hosts.nodes]
    assert launches[0]["data_sha256"] == launches[1]["data_sha256"]
    assert launches[0]["hosts"] == launches[1]["hosts"] == list(hosts.nodes)
    files = [
        sorted(path.relative_to(hosts.data(node)) for path in hosts.data(node).rglob("*.bin")) for node in hosts.nodes
    ]
    assert files[0] == files[1] != []
    for path in files[0]:
        assert (hosts.data("node1") / path).read_bytes() == (hosts.data("node2") / path).read_bytes()


def test_a_base_is_sent_to_a_host_that_lacks_it(hosts: TwoHosts, across: list[dict]) -> None:
    """Oracle: the base's hash in both hosts' records, and the same bytes."""
    assert across
    shutil.copytree(hosts.runs("node1") / "demo", hosts.runs("node1") / "base")
    command = ["deepspeed", "--hostfile", "hostfiles/two_node", "sft/train.py", "--recipe", "demo-instruct"]
    train(hosts, [*command, "--base", "runs/base"], 1, "--run-dir", "runs/assistant")
    launches = [read_json(hosts.runs(node) / "assistant" / "env.json") for node in hosts.nodes]
    name = Path("base") / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    assert (hosts.runs("node1") / name).read_bytes() == (hosts.runs("node2") / name).read_bytes()
    assert launches[0]["base_sha256"] == launches[1]["base_sha256"]


def test_the_interface_that_leads_to_the_other_host_is_taken(hosts: TwoHosts, across: list[dict]) -> None:
    """Each host's own name means 127.0.1.1 to it, and no GLOO_SOCKET_IFNAME is set. Oracle: the hosts' one cable."""
    assert across
    for node in hosts.nodes:
        assert read_json(hosts.runs(node) / "demo" / "env.json")["interfaces"] == dict.fromkeys(hosts.nodes, "eth0")


def test_a_single_remote_host_is_never_mistaken_for_this_one(hosts: TwoHosts, tmp_path: Path) -> None:
    """DeepSpeed would train on node1, where the command is typed, though the hostfile names node2 alone.

    Oracle: on which host the run folder is: on none where `deepspeed` is typed, on node2 where `ds-slm train` is.
    """
    hostfile = tmp_path / "remaining"
    hostfile.write_text("node2 slots=1\n")
    command = ["deepspeed", "--hostfile", str(hostfile), "ds_slm/pretrain.py", "--run-dir", "runs/refused"]
    done = hosts.launch(command, timeout_s=LAUNCH_TIMEOUT_S)
    assert done.returncode == 2, done.stderr
    assert "--force_multi" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (hosts.runs("node1") / "refused").exists()

    train(hosts, ["ds-slm", "train", "demo", "--hostfile", str(hostfile)], 1, "--run-dir", "runs/there")
    assert [(hosts.runs(node) / "there" / "env.json").exists() for node in hosts.nodes] == [False, True]
