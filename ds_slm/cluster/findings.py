"""The doctor's findings on the hosts' answers: pure functions from facts to findings, each with the way out.

Every judge takes the answers, by the host's name in the hostfile, of hosts that gave one. If a run lacks something that
it needs, that is a failure. If something only makes it slower, or may end it later, that is a warning. Findings on the
way from host to host are in link_findings.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ds_slm.cluster.hostfile import Host
from ds_slm.run import software

Answers = Mapping[str, Mapping[str, Any]]
COMPILED = "blocks are not compiled, and training is slower"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUOTED = re.compile(r"""'[^']*'|"[^"$`]*"|\\.""")
_SHELL = re.compile(r"[\s;&|<>()#`]")
"""Characters that a shell does not take literally; `$` may be intended."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    level: Literal["ok", "warning", "failure"]
    about: str
    """Its subject: a word that is the same whatever was found."""
    said: str
    """What was found, where, and what was expected."""
    mend: str = ""
    """The way out."""


def healthy(about: str, said: str) -> Finding:
    """A finding that needs no action."""
    return Finding("ok", about, said)


def failure(about: str, said: str, mend: str = "") -> Finding:
    """A finding that would break a run."""
    return Finding("failure", about, said, mend)


def warning(about: str, said: str, mend: str = "") -> Finding:
    """A finding with which a run can live."""
    return Finding("warning", about, said, mend)


def listed(names: Sequence[str]) -> str:
    """'node1, node2'."""
    return ", ".join(names)


def of_ssh(host: str, said: str) -> Finding:
    """Why a host does not answer, from ssh's message."""
    name = host.rpartition("@")[2]
    causes = (
        (
            "IDENTIFICATION HAS CHANGED",
            "it shows another key than it used to",
            f"if it was installed anew: `ssh-keygen -R {name}`, then `ssh {host}` once",
        ),
        (
            "Host key verification failed",
            "its key is not known here",
            f"`ssh {host}` once and accept the key, or `ssh-keyscan {name} >> ~/.ssh/known_hosts`",
        ),
        (
            "Permission denied",
            "it asks for a password",
            f"`ssh-copy-id {host}`, after `ssh-keygen` where there is no key",
        ),
        (
            "Could not resolve hostname",
            "there is no host of that name",
            "correct the hostfile, or add its address to /etc/hosts or Host and HostName to ~/.ssh/config",
        ),
        (
            "Connection refused",
            "it is there, and its sshd does not listen",
            "start it there (`systemctl start ssh`), or name its port in ~/.ssh/config",
        ),
        (
            "timed out",
            "it does not answer",
            f"is it on, in this network, and not behind a firewall? `ping {name}`",
        ),
        ("No route to host", "there is no way to it", f"is it on, and in this network? `ping {name}`"),
        ("Network is unreachable", "there is no way to it", "connect this machine to its network"),
    )

    for sign, what, mend in causes:
        if sign.lower() in said.lower():
            return failure("ssh", f"{host}: {what}", mend)
    last = (said.strip().splitlines() or ["it ended without a word"])[-1].strip().rstrip(".")
    return failure("ssh", f"{host}: {last}", f"`ssh {host} true` must work from here without a password")


def alone(host: str) -> Finding:
    """The finding if the hostfile's only host is not the machine where the command was typed."""
    said = f"{host} alone is not this machine: `ds-slm train` goes there, `deepspeed` by itself starts the ranks here"
    return warning("hosts", said, "add --force_multi to `deepspeed`")


def of_programs(found: Mapping[str, str | None], packages: Mapping[str, str]) -> list[Finding]:
    """Findings on this machine's programs that start the hosts: name -> path, name -> Debian package."""
    missing = [name for name in packages if found.get(name) is None]
    if not missing:
        return [healthy("programs", f"{listed(list(packages))} are installed here")]
    install = f"`apt-get install {' '.join(packages[name] for name in missing)}`"
    return [
        failure("programs", f"{listed(missing)} not installed here, and a launch starts the hosts with it", install)
    ]


def of_environment_file(path: str, text: str) -> list[Finding]:
    """Traps in the file of variables that DeepSpeed's launcher takes to every host, as `export LINE`."""
    numbered = enumerate(text.splitlines(), start=1)
    traps = {number: trap for number, line in numbered if (trap := _trap_in(line))}
    found = [failure("variables", f"{path}, line {number} {said}", mend) for number, (said, mend) in traps.items()]
    return found or [healthy("variables", f"{path} goes to every host")]


def _trap_in(line: str) -> tuple[str, str] | None:
    """What is wrong with a line of that file, and the way out."""
    name, equals, value = line.partition("=")
    mend = "keep NAME=VALUE lines only"
    if not line.strip():
        return "is blank, at which DeepSpeed's launcher ends with a traceback", mend
    if not equals:
        return f"is `{line}`, at which DeepSpeed's launcher ends with a traceback", mend
    if line.lstrip().startswith("#"):
        return "is a comment with `=`, which comments out the whole launch: nothing is trained, without an error", mend
    if not _NAME.fullmatch(name):
        return f"names `{name}`, expected a name without spaces or `export`", mend
    if _SHELL.search(_QUOTED.sub("", value)):
        return f"has the value `{value}`, which the hosts' shells take apart", f"write {name}='...'"
    return None


def of_machines(answers: Answers) -> list[Finding]:
    """Machines that are in the hostfile under two names."""
    names: dict[str, list[str]] = {}
    for host, answer in answers.items():
        names.setdefault(answer["identity"], []).append(host)
    return [
        failure("hosts", f"{listed(same)} are one machine", "keep one of the names, with the sum of the slots")
        for same in names.values()
        if len(same) > 1
    ]


def of_installation(answers: Answers, python: str, checkout: str, folder: str) -> list[Finding]:
    """The interpreter, the checkout and the working folder of a launch, at the same paths on every host."""
    found = []
    for host, answer in answers.items():
        if not answer["checkout"]:
            copied = f"copy this one there, to the same path: `rsync -a {checkout}/ {host}:{checkout}/`"
            found.append(failure("checkout", f"{host} has no {checkout}", copied))
        if answer["python"]["executable"] != python:
            theirs = f"there is {answer['python']['executable']}, Python {answer['python']['version']}"
            made = f"`make setup` in {checkout} there; a launch starts the same path on every host"
            found.append(failure("python", f"{host} has no {python} ({theirs})", made))
        if not answer["folder"]:
            made = f"`mkdir -p {folder}` there: a launch goes to the folder where it was typed"
            found.append(failure("folder", f"{host} has no {folder}", made))

    if found:
        return found
    version = listed(sorted({answer["python"]["version"] for answer in answers.values()}))
    return [healthy("python", f"{python}, Python {version}, and {checkout} on {everywhere(answers)}")]


def of_software(answers: Answers) -> list[Finding]:
    """Code and libraries, compared as a launch compares them."""
    missing = [
        failure("versions", f"{host} lacks {listed(packages)}", "`make setup` there")
        for host, answer in answers.items()
        if (packages := [name for name, version in answer["versions"].items() if version is None])
    ]

    # Hosts that lack a package are named once.
    whole = {host: dict(answer) for host, answer in answers.items() if None not in answer["versions"].values()}
    hosts, described = list(whole), list(whole.values())
    mend = "bring all hosts to one commit (`git pull`) and its versions (`make setup`)"
    found = [
        *missing,
        *(failure("versions", text.rstrip("."), mend) for text in software.differences(hosts, described)),
        *(warning("versions", text.rstrip(".")) for text in software.notes(hosts, described, [""] * len(hosts))),
    ]

    if any(one.level == "failure" for one in found):
        return found
    first = described[0]
    versions = listed([f"{name} {first['versions'][name]}" for name in ("torch", "deepspeed", "transformers")])
    return [*found, healthy("versions", f"{versions}; ds_slm {first['commit'][:10]} on {everywhere(answers)}")]


def device_type(answer: Mapping[str, Any], cuda: str) -> str:
    """The type of device on which a host's ranks compute; `cuda`: the version torch was built for, or 'none'."""
    return "cuda" if answer["gpus"] and cuda != "none" else "cpu"


def of_slots(hosts: Sequence[Host], answers: Answers, cuda: Mapping[str, str]) -> list[Finding]:
    """Slots compared with devices: GPUs, or the cores of a CPU. `cuda`: the version each host's torch was built for."""
    found, kinds = [], {host: device_type(answer, cuda.get(host, "none")) for host, answer in answers.items()}

    for host in (host for host in hosts if host.name in answers):
        answer, kind = answers[host.name], kinds[host.name]
        if kind == "cpu" and answer["gpus"]:
            mend = "install the build of torch for CUDA there, or the ranks train on its CPU"
            found.append(warning("slots", f"{host.name} has {answer['gpus']} GPUs and a torch without CUDA", mend))
        devices = answer["gpus"] if kind == "cuda" else answer["cores"]
        said = f"{host.name} has {devices} {'GPUs' if kind == 'cuda' else 'cores'} and slots={host.slots}"
        if host.slots > devices:
            mend = f"write `{host.name} slots={devices}` in the hostfile, or free its devices (CUDA_VISIBLE_DEVICES)"
            found.append((failure if kind == "cuda" else warning)("slots", said, mend))
        elif kind == "cuda" and host.slots < devices:
            found.append(warning("slots", said, "the others are not used"))

    if len(set(kinds.values())) > 1:
        said = "; ".join(f"{host}: {kind}" for host, kind in kinds.items())
        mend = "train on hosts with GPUs, or on hosts without: is the driver of one missing?"
        found.append(failure("slots", f"the hosts differ in their devices ({said})", mend))

    said = [
        f"{host.name} {host.slots} of {_devices(answers[host.name], kinds)}" for host in hosts if host.name in kinds
    ]
    return found or [healthy("slots", listed(said))]


def _devices(answer: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    return f"{answer['gpus']} GPUs" if "cuda" in kinds.values() else f"{answer['cores']} cores"


def of_compilers(answers: Answers, described: Answers, cuda: Mapping[str, str]) -> list[Finding]:
    """What torch.compile needs: if any host lacks it, no host compiles its blocks.

    Args:
        answers: the hosts' descriptions of themselves.
        described: their software.
        cuda: the version each host's torch was built for.
    """
    found = []
    for host, answer in answers.items():
        kind = device_type(answer, cuda[host])
        missing = [] if described[host]["compilers"][kind] else [software.COMPILERS[kind][1]]
        missing += [] if answer["python_header"] else ["python3-dev"]

        if missing:
            install = f"`apt-get install {' '.join(missing)}` there"
            found.append(warning("compiler", f"{host} lacks {listed(missing)}: {COMPILED} on all hosts", install))
        if not answer["ninja"]:
            said = f"{host} lacks ninja, with which DeepSpeed compiles what offload needs"
            found.append(warning("compiler", said, "`make setup` there"))

    return found or [healthy("compiler", f"a compiler, Python's headers and ninja on {everywhere(answers)}")]


def of_errors(about: str, answers: Answers) -> list[Finding]:
    """Hosts that could not answer a question."""
    found = []
    for host, answer in answers.items():
        missing = re.search(r"No module named '([\w.]+)'", answer["error"])
        said = f"{host} lacks the package {missing[1]}" if missing else f"{host} cannot say: {answer['error']}"
        mend = (
            "`make setup` there"
            if "ImportError" in answer["error"] or missing
            else f"bring {host} to this commit, or look there"
        )
        found.append(failure(about, said, mend))
    return found


def size(number: float) -> str:
    """'1.2 GB'."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def everywhere(answers: Answers) -> str:
    """The hosts that gave an answer."""
    return listed(list(answers))
