"""`sbatch hostfiles/slurm.sh` under a real Slurm: a controller and two nodes, each in namespaces of its own.

Needs Debian's slurmctld, slurmd, slurm-client and munge; skipped where they are missing.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import ADDRESSES, TwoHosts
from tests.support import runs

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(program, path=SBIN) for program in PROGRAMS),
        reason="apt-get install slurmctld slurmd slurm-client munge",
    ),
]
CONFIG = """
ClusterName=two
SlurmctldHost=node1({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/dev/shm/munge.socket
CredType=cred/munge
StateSaveLocation=/dev/shm/slurmctld
SlurmdSpoolDir=/dev/shm/slurmd
SlurmctldPidFile=/dev/shm/slurmctld.pid
SlurmdPidFile=/dev/shm/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Slurm on two hosts. /dev/shm is each host's own, so its sockets and state lie there."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.hosts, self._folder = hosts, folder
        nodes = "".join(f"NodeName={node} NodeAddr={address} CPUs=2\n" for node, address in ADDRESSES.items())
        (folder / "slurm.conf").write_text(CONFIG.format(address=ADDRESSES["node1"], folder=folder) + nodes)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(b"k" * 1024)
        key.chmod(0o600)
        munge = (
            f"munged --force --key-file={key} --socket=/dev/shm/munge.socket --pid-file=/dev/shm/munge.pid "
            f"--log-file={folder}/munge-$(hostname).log --seed-file=/dev/shm/munge.seed"
        )
        for node in hosts.nodes:
            self.on(node, f"mkdir -p /dev/shm/slurmd /dev/shm/slurmctld && {munge}")
        self.on("node1", "slurmctld")
        for node in hosts.nodes:
            self.on(node, f"slurmd -N {node}")
        self.until(lambda: self.on("node1", "sinfo --noheader --format %t").strip() == "idle")

    def on(self, node: str, command: str) -> str:
        """Run a command on a host, its output; daemons leave the terminal by themselves."""
        command = (
            f"cd {CHECKOUT} && PATH=$PATH:{SBIN} SLURM_CONF={self._folder}/slurm.conf sh -c '{command}' </dev/null"
        )
        done = self.hosts.launch(["sh", "-c", command] if node == "node1" else ["ssh", node, command], timeout_s=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def until(self, condition: Callable[[], object], longest_s: float = 400) -> None:
        """Look until something is so. A job that is queued again begins after two minutes."""
        end_s = time.monotonic() + longest_s
        while not condition():
            assert time.monotonic() < end_s, self.on("node1", "scontrol --oneliner show jobs")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if problems := missing_requirements():
        pytest.fail("two hosts cannot be made here. " + " ".join(problems), pytrace=False)
    folder = tmp_path_factory.mktemp("slurm")
    with TwoHosts(CHECKOUT, folder / "hosts") as hosts:
        yield Slurm(hosts, folder)


def losses(run: Path) -> dict[int, float]:
    return {one["step"]: one["loss"] for one in runs.records(run)}


def test_a_job_that_is_told_to_end_is_queued_again_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """Oracle: the losses of the same run that nobody interrupted, on both nodes, bit for bit."""
    recipe = runs.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 20", "steps = 200"))

    def submit(run: str) -> Path:
        slurm.on(
            "node1",
            f"sbatch --parsable --job-name={run} --output={tmp_path}/%x.out --export=ALL,RUN_DIR=runs/{run} "
            f"hostfiles/slurm.sh {recipe} --data-root {tmp_path}/data --set run.save_every_steps=1000",
        )
        return slurm.hosts.runs("node1") / run

    told = submit("told")
    slurm.until(lambda: (told / "metrics.jsonl").exists() and len(losses(told)) > 5)
    slurm.on("node1", "scancel --signal=TERM --name=told")
    slurm.until(lambda: (told / "stopped.json").exists())
    stopped_at = json.loads((told / "stopped.json").read_text())["step"]
    assert 5 < stopped_at < 200

    whole = submit("whole")
    for run in (whole, told):
        slurm.until(lambda run=run: (run / "done.json").exists())
    assert json.loads((told / "env.json").read_text())["begins_at_step"] == stopped_at
    for node in slurm.hosts.nodes:
        assert losses(slurm.hosts.runs(node) / "told") == losses(whole)
    slurm.until(lambda: not slurm.on("node1", "squeue --noheader"))
    states = slurm.on("node1", "scontrol --oneliner show jobs")
    assert states.count("JobState=COMPLETED") == 2 and "ExitCode=0:0" in states


def test_a_mistake_ends_the_job_with_its_words(slurm: Slurm, tmp_path: Path) -> None:
    """Oracle: the job fails, is not queued again, and its output has the sentence."""
    slurm.on("node1", f"sbatch --parsable --job-name=wrong --output={tmp_path}/wrong.out hostfiles/slurm.sh no-such")
    slurm.until(lambda: "JobName=wrong" in (found := slurm.on("node1", "scontrol --oneliner show jobs")) and (
        "JobName=wrong" in next((one for one in found.splitlines() if "JobState=FAILED" in one), "")
    ))  # fmt: skip
    text = (tmp_path / "wrong.out").read_text()
    assert "no-such" in text and "Traceback" not in text
