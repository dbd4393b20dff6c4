"""The programs that make hosts in namespaces (hosts.py): their paths, and which of them this machine lacks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Program -> its Debian package.
_PACKAGES = {
    "pdsh": "pdsh",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}


# Whatever happens to this process, the host's first process ends with it, and so do all processes of the host.
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare"]
UNSHARE += ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def missing_requirements() -> list[str]:
    """What this machine lacks to make hosts, each with its way out; empty if hosts can be made."""
    problems = []
    if os.geteuid() != 0:
        problems.append("Hosts need root: run as root, or with sudo.")
    absent = sorted({package for program, package in _PACKAGES.items() if which(program) is None})
    if absent:
        problems.append(f"Programs are missing: apt-get update && apt-get install -y {' '.join(absent)}")
    if not problems and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0:
        problems.append("This machine refuses new namespaces: in a container, start it with `docker run --privileged`.")
    return problems


def which(program: str) -> str | None:
    """The path at which a host finds a program; None if it is missing."""
    return shutil.which(program, path=search_path())


def search_path() -> str:
    """The PATH of a host: the Python environment running this, then the system's folders."""
    return f"{Path(sys.executable).parent}:{_SYSTEM_PATH}"


def run(*argv: str) -> None:
    """Run a program as a host finds it. Raises RuntimeError with its output if it fails."""
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={"PATH": search_path()}, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(argv)}` failed with {done.returncode}: {done.stderr.strip()}")
