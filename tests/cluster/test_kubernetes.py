"""The pods of hostfiles/kubernetes.yaml: their command, run on two hosts with the names that the Job would give them.

Kubernetes itself is not here. What it does with a pod's exit code is its `podFailurePolicy`: 2 ends the Job, 75 starts
the pod again.
"""

import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.host_tools import missing_requirements
from benchmarks.hosts import ADDRESSES, TwoHosts
from tests.support import runs

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job() -> dict:
    """The Job of the file."""
    return list(yaml.safe_load_all((CHECKOUT / "hostfiles" / "kubernetes.yaml").read_text()))[1]


class Pods:
    """The Job's pods, one on each host."""

    def __init__(self, hosts: TwoHosts, job: dict, folder: Path) -> None:
        self.hosts, self._folder = hosts, folder
        names = "".join(f"{address} ds-slm-{index}.ds-slm\n" for index, address in enumerate(ADDRESSES.values()))
        (folder / "names").write_text(names)
        (command,) = (one["command"] for one in job["spec"]["template"]["spec"]["containers"])
        assert command[:2] == ["bash", "-c"]
        (folder / "pod.sh").write_text(command[2])
        for node in hosts.nodes:
            self._on(node, f"cat {folder}/names >> /etc/hosts")

    def run(self, recipe: Path | str, *flags: str) -> list[int]:
        """Both pods to their end; their exit codes."""
        codes: dict[str, int] = {}

        def pod(index: int, node: str) -> None:
            values = {"RECIPE": recipe, "NODES": 2, "GPUS": 1, "POD": "ds-slm", "JOB_COMPLETION_INDEX": index}
            environment = " ".join(f"{name}={value}" for name, value in values.items())
            line = f"{environment} bash {self._folder}/pod.sh {shlex.join(flags)} > {self._folder}/{node}.out 2>&1"
            codes[node] = self._on(node, line, check=False)

        pods = [threading.Thread(target=pod, args=one) for one in enumerate(self.hosts.nodes)]
        for one in pods:
            one.start()
        for one in pods:
            one.join()
        return [codes[node] for node in self.hosts.nodes]

    def end(self, node: str) -> None:
        """As the kubelet does: SIGTERM to the pod's first process alone."""
        self._on(node, f"pkill -TERM -f '^bash {self._folder}/pod.sh'")

    def output(self, node: str) -> str:
        return (self._folder / f"{node}.out").read_text()

    def _on(self, node: str, line: str, check: bool = True) -> int:
        line = f"cd {CHECKOUT} && {line}"
        done = self.hosts.launch(["sh", "-c", line] if node == "node1" else ["ssh", node, line], timeout_s=400)
        assert done.returncode == 0 or not check, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.returncode


@pytest.fixture(scope="module")
def pods(job: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    if problems := missing_requirements():
        pytest.fail("two hosts cannot be made here. " + " ".join(problems), pytrace=False)
    folder = tmp_path_factory.mktemp("pods")
    with TwoHosts(CHECKOUT, folder / "hosts") as hosts:
        yield Pods(hosts, job, folder)


def until(condition: Callable[[], object], longest_s: float = 300) -> None:
    end_s = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_a_pod_that_is_told_to_end_saves_and_goes_on_when_started_again(pods: Pods, job: dict, tmp_path: Path) -> None:
    """Oracle: 75 from both pods, which the Job ignores; the same command then ends with 0, behind the saved step."""
    recipe = runs.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 20", "steps = 200"))
    run = pods.hosts.runs("node1") / "tiny"
    codes: list[int] = []
    flags = ("--data-root", f"{tmp_path}/data", "--set", "run.save_every_steps=1000")
    first = threading.Thread(target=lambda: codes.extend(pods.run(recipe, *flags)))
    first.start()
    until(lambda: (run / "metrics.jsonl").exists() and len(runs.records(run)) > 5)
    pods.end("node2")
    first.join()
    assert codes == [75, 75], pods.output("node1") + pods.output("node2")

    stopped_at = json.loads((run / "stopped.json").read_text())["step"]
    assert pods.run(recipe, *flags) == [0, 0]
    assert json.loads((run / "env.json").read_text())["begins_at_step"] == stopped_at
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert by_code == {2: "FailJob", 75: "Ignore"}


def test_a_mistake_ends_the_job(pods: Pods) -> None:
    """Oracle: the exit code that `podFailurePolicy` names, and the sentence in a pod's log."""
    assert pods.run("no-such") == [2, 2]
    assert "no-such" in pods.output("node1") + pods.output("node2")
