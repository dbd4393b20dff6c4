"""The packages that a GPU machine without a network lacks, as wheels, gathered where the package index is reachable.

    setup.py's requirements, and theirs, in the versions installed here --> minus what that machine has --> .whl/*.whl

python benchmarks/wheels.py --python 3.12 [--has NAME... | --has-file FILE] [--out .whl]

`torch` and what only torch needs are assumed to be there. On that machine, `make bench-gpu` installs what it finds in
.whl/ (benchmarks/bare_gpu.sh). DeepSpeed has no wheel on the index, so it is built: it is pure Python until an op is
compiled.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_slm.errors import DataError, run_program

PROJECT = "ds-slm"
THERE = ("torch", "setuptools")
BUILT = ("deepspeed",)
"""Packages that are published only as source."""
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17)
"""Minor versions of glibc 2 in the names of manylinux wheels; pip needs each of them named."""


def needed(project: str, has: frozenset[str]) -> list[str]:
    """Sorted names of all packages that a project needs, directly or not, without those that are there.

    Args:
        project: an installed package.
        has: canonical names of packages that are there; what only they need is left out, too.
    """
    found: set[str] = set()
    waiting = [project]
    while waiting:
        for name in _requirements(waiting.pop()):
            if name not in found and name not in has:
                found.add(name)
                waiting.append(name)
    return sorted(found)


def _requirements(name: str) -> Iterator[str]:
    """Canonical names of the packages that a package needs, without extras, on this platform."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def gather(name: str, python: str, out: Path) -> None:
    """Fetch one package in the version that is installed here. Raises DataError if it has no wheel."""
    pinned = f"{name}=={metadata.version(name)}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if name in BUILT:
        command = [*pip, "wheel", "--no-deps", "--wheel-dir", str(out), pinned]
    else:
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "any"]
        places = [word for one in platforms for word in ("--platform", one)]
        kind = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *places]
        command = [*pip, "download", "--no-deps", *kind, "--dest", str(out), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{pinned}: {done.stderr.strip().splitlines()[-1]}")


def main() -> int:
    """Gather all packages; names every package that cannot be fetched."""
    parser = argparse.ArgumentParser(description="What a GPU machine without a network lacks, as wheels.")
    parser.add_argument("--python", default="3.12", help="that machine's version of Python")
    parser.add_argument("--has", nargs="*", default=[], help="packages that are there")
    parser.add_argument("--has-file", type=Path, help="a text that names them, as `pip list` prints it")
    parser.add_argument("--out", type=Path, default=Path(".whl"))
    args = parser.parse_args()

    listed = re.findall(r"[A-Za-z][\w.-]*", args.has_file.read_text()) if args.has_file else []
    has = frozenset(canonicalize_name(name) for name in (*THERE, *args.has, *listed))
    args.out.mkdir(exist_ok=True)

    problems = []
    for name in needed(PROJECT, has):
        try:
            gather(name, args.python, args.out)
        except DataError as error:
            problems += error.problems
        else:
            print(name, flush=True)
    if problems:
        raise DataError(problems)

    size_mb = sum(one.stat().st_size for one in args.out.glob("*.whl")) / 1e6
    print(f"{args.out}: {size_mb:.0f} MB. Bring it along with the checkout; there: make bench-gpu")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
