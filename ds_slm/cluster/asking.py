"""One question to all hosts at once, over an ssh that asks for no password; what is wrong is told of all together.

hosts --ssh HOST QUESTION--> not reached: what ssh says | reached: what a judge says of the answer --> one error
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ds_slm.cluster.hostfile import Host
from ds_slm.errors import HostfileError

CONNECT_S = 10
SSH = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
SSH_FAILED = 255
"""Its exit code where it did not reach the host, or lost it."""
WAY_OUT = "`ssh HOST true` must work from here without a password; --no_ssh_check skips this check."


@dataclass(frozen=True)
class Answer:
    """What became of the question on a host that was reached."""

    code: int
    """The exit code."""
    output: str
    last_words: str
    """What was said last of what went wrong, without its full stop."""
    asked_s: float
    answered_s: float
    """By this machine's clock: what the host printed was printed in between."""


Judge = Callable[[Host, Answer], str | None]


def port_option(ssh_port: int | None) -> list[str]:
    """For ssh; None for the port that it takes itself."""
    return ["-p", str(ssh_port)] if ssh_port else []


def refuse_hosts(
    hosts: Sequence[Host],
    ssh: Sequence[str],
    question: str,
    judge: Judge | None = None,
    patience_s: float = 3 * CONNECT_S,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raise HostfileError for every host that ssh does not reach, or whose answer is wrong.

    Args:
        hosts: to be asked, all at once.
        ssh: its command, up to the host.
        question: a command for the shell of a host.
        judge: says what is wrong with an answer; None: a host whose exit code is not 0 counts as not reached.
        patience_s: how long an answer may take.
        environ: what ssh finds.
    """
    unreached: list[Host] = []

    def problem_of(host: Host) -> str | None:
        asked_s = time.time()
        try:
            done = subprocess.run(
                [*ssh, host.name, question], capture_output=True, text=True, errors="replace", timeout=patience_s,
                stdin=subprocess.DEVNULL, check=False, env=dict(environ),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            unreached.append(host)
            return f"host {host.name} does not answer over ssh within {patience_s:.0f} s."

        # Reached, or not.
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].strip().rstrip(".")
        if judge and done.returncode != SSH_FAILED:
            return judge(host, Answer(done.returncode, done.stdout, said, asked_s, time.time()))
        if done.returncode == 0:
            return None
        unreached.append(host)
        return f"host {host.name} does not answer over ssh: {said}."

    with ThreadPoolExecutor(max_workers=32) as pool:
        problems = [problem for problem in pool.map(problem_of, hosts) if problem]
    if problems:
        raise HostfileError([*problems, *([WAY_OUT] if unreached else [])])
