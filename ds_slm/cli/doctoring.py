"""The output of `ds-slm doctor`: a line for each finding, as it comes, or one JSON object."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from ds_slm.cli.output import print_json
from ds_slm.cluster import doctor
from ds_slm.cluster.findings import Finding
from ds_slm.cluster.hostfile import parse_hostfile
from ds_slm.errors import EXIT_USER_ERROR
from ds_slm.recipe import loading

MARKS = {"ok": "ok", "warning": "warning", "failure": "FAILURE"}


def run(hostfile: Path | None, recipe: str | None, data_root: Path, run_dir: Path | None, as_json: bool) -> None:
    """Check every host before a run. Ends with exit code 2 if anything would break it.

    Raises:
        HostfileError: the hostfile is missing or malformed.
        RecipeError: this machine cannot read the recipe.
    """
    began = time.monotonic()
    name = loading.recipe_path(recipe).stem if recipe else "demo"
    hosts = parse_hostfile(hostfile) if hostfile else []
    launch = doctor.Plan(hosts, run_dir or Path("runs") / name, data_root, recipe)

    found = []
    for finding in doctor.examine(launch):
        found.append(finding)
        if not as_json:
            print(_line(finding), flush=True)

    failures = sum(finding.level == "failure" for finding in found)
    seconds = time.monotonic() - began
    if as_json:
        print_json({"fit": not failures, "seconds": round(seconds, 2), "findings": [asdict(one) for one in found]})
    else:
        print(_verdict(len(launch.places), found, seconds))
    if failures:
        raise typer.Exit(EXIT_USER_ERROR)


def _line(finding: Finding) -> str:
    said = f"{finding.said}: {finding.mend}" if finding.mend else finding.said
    return f"{MARKS[finding.level]:8} {finding.about:10} {said}"


def _verdict(hosts: int, found: Sequence[Finding], seconds: float) -> str:
    counts = {level: sum(finding.level == level for finding in found) for level in ("failure", "warning")}
    counted = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    machines = f"{hosts} hosts" if hosts > 1 else "1 host"
    return f"{machines} in {seconds:.1f} s: {', '.join(counted) or 'nothing is in the way of a run'}"
