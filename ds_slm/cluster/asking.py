"""One question to all hosts at once, over ssh without a password; the problems of all hosts are reported together.

hosts --ssh HOST QUESTION--> not reached: ssh's message | reached: a judge's message on the answer --> one error
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
"""ssh's exit code if it did not reach the host, or lost it."""
WAY_OUT = "`ssh HOST true` must work from here without a password; --no_ssh_check skips this check."


@dataclass(frozen=True)
class Answer:
    """The answer of a host that was reached."""

    code: int
    """The exit code."""
    output: str
    last_words: str
    """The last line of its error output, without the full stop."""
    asked_s: float
    answered_s: float
    """When it was asked and when it had answered, by this machine's clock."""


Judge = Callable[[Host, Answer], str | None]


def port_option(ssh_port: int | None) -> list[str]:
    """ssh's option for a port; None for its default port."""
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
        hosts: the hosts to ask, all at once.
        ssh: ssh's command, up to the host.
        question: a command for the shell of a host.
        judge: says what is wrong with an answer; None: a host whose exit code is not 0 counts as not reached.
        patience_s: how long an answer may take.
        environ: ssh's environment.
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

        # Either the host was reached, or it was not.
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
