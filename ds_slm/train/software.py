"""What a host computes with: its code and its libraries, compared over all hosts before they train together.

Two hosts with other code or library versions train something that neither would train alone. The code is compared by
commit, where both are git checkouts, and by a hash of the sources always: two changed trees of one commit differ.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("ds_slm", "sft")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "bitsandbytes", "numpy", "safetensors")
UNKNOWN = "unknown"
"""The commit of a tree that is not a git checkout."""


@cache
def describe() -> dict[str, Any]:
    """Commit, hash of the sources, and versions on this host; read once, for env.json too."""
    return {
        "commit": _commit(ROOT),
        "sources_sha256": sources_sha256(ROOT),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda or torch.version.hip or "none",
    }


def sources_sha256(root: Path) -> str:
    """One hash of every Python file of the packages, with its place; caches and everything else are left out."""
    found = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def differences(hosts: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """What is not the same on all hosts and may change results; one sentence for each, which names every host.

    Args:
        hosts: the name of each rank's host.
        found: what `describe` says there.
    """
    facts = {
        "the commit of ds_slm": [one["commit"] for one in found],
        "the source files of ds_slm": [one["sources_sha256"][:16] for one in found],
        "Python": [one["python"] for one in found],
        **{name: [_public(one["versions"].get(name)) for one in found] for name in PACKAGES},
    }
    return [
        f"the hosts differ in {what} ({_by_value(hosts, values)})."
        for what, values in facts.items()
        if len(set(values) - {UNKNOWN}) > 1
    ]


def notes(hosts: Sequence[str], found: Sequence[dict[str, Any]], devices: Sequence[str]) -> list[str]:
    """What is not the same on all hosts and only rounds differently: builds of torch, kinds of devices."""
    builds = [f"{one['versions'].get('torch')}, CUDA {one['torch_cuda']}" for one in found]
    public = [_public(one["versions"].get("torch")) for one in found]
    facts = {"their kind of device": list(devices)}
    if len(set(public)) == 1:  # else it is a difference
        facts["their build of torch"] = builds
    return [
        f"the hosts differ in {what} ({_by_value(hosts, values)}): results are rounded differently."
        for what, values in facts.items()
        if len(set(values)) > 1
    ]


def _by_value(hosts: Sequence[str], values: Sequence[str]) -> str:
    """'2.12 on node2; 2.13 on node1, node3'."""
    groups: dict[str, dict[str, None]] = {}
    for host, value in zip(hosts, values, strict=True):
        groups.setdefault(value, {})[host] = None
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in sorted(groups.items()))


def _public(version: str | None) -> str:
    """A version without its build: 2.13.0+cpu and 2.13.0+cu128 are one."""
    return (version or "not installed").partition("+")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str:
    """The commit of a checkout, '-dirty' where a tracked file was changed; 'unknown' outside of git."""
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root:
            return UNKNOWN  # a copy within somebody else's repository
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return UNKNOWN


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
