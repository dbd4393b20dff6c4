"""A host's code and libraries, compared over all hosts before they train together.

Hosts with different code or library versions would train something that none of them would train alone. The code is
compared by a hash of the source files that run. So two different edits of one commit differ, while two commits that
differ only in other files do not; a note says that the commits differ. Imports no library that it describes.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES, ENDS = ("ds_slm", "sft"), (".py", ".cpp")
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "bitsandbytes", "numpy", "safetensors")
UNKNOWN = "unknown"
"""Stands for the commit of a tree that is not a git checkout."""
COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang")}
"""The variable that names a compiler, and the names to look for: C++ for a CPU, C for Triton on a GPU."""


@cache
def describe() -> dict[str, Any]:
    """Commit, hash of the sources, and versions on this host; read once, for env.json too."""
    return {
        "commit": _commit(ROOT),
        "sources_sha256": sources_sha256(ROOT),
        "script_sha256": script_sha256(Path(sys.argv[0])),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch_cuda(),
    }


def torch_cuda() -> str:
    """The version of CUDA or ROCm that torch was built for; 'none' for a build without, or if torch is missing."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return "none"
    # Importing torch takes seconds.
    version = runpy.run_path(str(Path(found.submodule_search_locations[0]) / "version.py"))
    return version.get("cuda") or version.get("hip") or "none"


def find_compiler(device_type: str) -> str | None:
    """Path of the compiler that torch.compile calls; None if it is missing."""
    variable, *names = COMPILERS[device_type]
    candidates = [os.environ.get(variable), *names]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def size_and_mtime(path: Path) -> list[int] | None:
    """Of a file: both change where another one takes its path; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def sources_sha256(root: Path) -> str:
    """One hash of the packages' source files and their paths, without caches and all other files."""
    found = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for end in ENDS for path in (root / folder).rglob(f"*{end}")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def script_sha256(script: Path) -> str:
    """Hash of the script that was launched, which may be a user's own; 'unknown' if the file does not exist."""
    try:
        return hashlib.sha256(script.read_bytes()).hexdigest()
    except OSError:
        return UNKNOWN


def differences(hosts: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between hosts and may change results: a sentence for each, which names every host.

    Args:
        hosts: the name of each rank's host.
        found: what `describe` says there.
    """
    code = {
        "the source files of ds_slm": [one["sources_sha256"][:16] for one in found],
        "the launched script": [one.get("script_sha256", UNKNOWN)[:16] for one in found],
    }

    facts = {
        **code,
        **({} if _are_alike(code.values()) else _commits(found)),  # what may have made the difference
        "Python": [one["python"] for one in found],
        **{name: [_public(one["versions"].get(name)) for one in found] for name in PACKAGES},
    }

    return [
        f"the hosts differ in {what} ({_by_value(hosts, values)})."
        for what, values in facts.items()
        if not _are_alike([values])
    ]


def _commits(found: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    return {"the commit of ds_slm": [one["commit"] for one in found]}


def _are_alike(facts: Iterable[Sequence[str]]) -> bool:
    """Whether each fact is the same on all hosts that know it."""
    return all(len(set(values) - {UNKNOWN}) <= 1 for values in facts)


def notes(hosts: Sequence[str], found: Sequence[dict[str, Any]], devices: Sequence[str]) -> list[str]:
    """What differs between hosts but trains the same: the commit of equal sources; and builds of torch and kinds of
    devices, which only round differently.
    """
    builds = [f"{one['versions'].get('torch')}, CUDA {one['torch_cuda']}" for one in found]
    public = [_public(one["versions"].get("torch")) for one in found]
    facts = {"their kind of device": list(devices)}
    if len(set(public)) == 1:  # else it is a difference
        facts["their build of torch"] = builds

    rounded = [
        f"the hosts differ in {what} ({_by_value(hosts, values)}): results are rounded differently."
        for what, values in facts.items()
        if len(set(values)) > 1
    ]

    equal_sources = len({one["sources_sha256"] for one in found}) == 1  # else it is named beside that difference
    return rounded + [
        f"the hosts differ in {what} ({_by_value(hosts, values)}), not in the source files that run."
        for what, values in _commits(found).items()
        if equal_sources and not _are_alike([values])
    ]


def _by_value(hosts: Sequence[str], values: Sequence[str]) -> str:
    """'2.12 on node2; 2.13 on node1, node3'."""
    groups: dict[str, dict[str, None]] = {}
    for host, value in zip(hosts, values, strict=True):
        groups.setdefault(value, {})[host] = None
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in sorted(groups.items()))


def _public(version: str | None) -> str:
    """A version without its build: 2.13.0+cpu and 2.13.0+cu128 are the same."""
    return (version or "not installed").partition("+")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str:
    """The commit of a checkout, with '-dirty' if a tracked file was changed; 'unknown' outside of git."""
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
