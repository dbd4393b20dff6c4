"""The doctor's findings on what a run reads and writes: folders and their space, memory, the recipe, prepared data."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_slm.cluster.findings import Answers, Finding, everywhere, failure, healthy, listed, size, warning
from ds_slm.cluster.hostfile import Host

SMALLEST_FREE_BYTES = 100e6
"""With less free space than this a disk counts as full, whatever is trained."""
RANK_BYTES = 1e9
"""Memory of a rank before it has a model: Python, torch and DeepSpeed."""


@dataclass(frozen=True)
class Needs:
    """What a recipe needs, if one was named."""

    name: str = ""
    checkpoint_bytes: float = 0.0
    checkpoints: int = 1
    """Checkpoints that are kept at a time, including the one that is being written."""
    keepers: int = 1
    """Number of the first hosts, which keep every checkpoint."""
    data_bytes: float = 0.0
    """Bytes of prepared data with all tokens that the run draws."""
    rank_bytes: float = 0.0
    """The memory of one rank at its peak, as `ds-slm plan` estimates it."""


def of_folders(hosts: Sequence[Host], answers: Answers, needs: Needs, unprepared: Container[str]) -> list[Finding]:
    """Folders into which a run writes, and memory. `unprepared`: the hosts whose data are not prepared yet."""
    found = []
    keepers = [host.name for host in hosts][: needs.keepers]
    for host, answer in answers.items():
        found += _of_home(host, answer["folders"]["home"])
        found += _of_folder(host, answer["folders"]["run"], "--run-dir")
        found += _of_folder(host, answer["folders"]["data"], "--data-root")
        if host in keepers:
            found += _of_checkpoints(host, answer["folders"]["run"], needs)
        if host in unprepared:
            found += _of_data_to_come(host, answer["folders"]["data"], needs)

    free = {host: min(one["free_bytes"] or 0 for one in answer["folders"].values()) for host, answer in answers.items()}
    said = listed([f"{host} {size(free_bytes)}" for host, free_bytes in free.items()])
    fine = healthy("disk", f"free: {said}; run, data and home folders can be written to")
    return [*(found or [fine]), *_of_memory(hosts, answers, needs)]


def _of_home(host: str, folder: Mapping[str, Any]) -> list[Finding]:
    if not folder["problem"]:
        return []
    said = f"{host}: its home {folder['path']} cannot be written to ({folder['problem']}), and caches are kept there"
    return [failure("disk", said, f"make space or make it writable there, or set HOME for {host}'s logins")]


def _of_folder(host: str, folder: Mapping[str, Any], flag: str) -> list[Finding]:
    """A folder that cannot be written to, or is almost full."""
    if folder["problem"]:
        said = f"{host}: nothing can be written to {folder['path']} ({folder['place']}: {folder['problem']})"
        return [failure("disk", said, f"make space or make it writable there, or name another {flag}")]
    if folder["free_bytes"] < SMALLEST_FREE_BYTES:
        said = f"{host}: {folder['path']} has {size(folder['free_bytes'])} free"
        return [failure("disk", said, f"make space there, or name another {flag}")]
    return []


def _of_checkpoints(host: str, folder: Mapping[str, Any], needs: Needs) -> list[Finding]:
    free = folder["free_bytes"]
    if folder["problem"] or free >= needs.checkpoint_bytes * needs.checkpoints:
        return []
    taken = size(needs.checkpoint_bytes)
    said = f"{host}: {folder['path']} has {size(free)} free, a checkpoint of {needs.name} takes {taken}"
    if free < needs.checkpoint_bytes:
        return [failure("disk", said, "make space there, or name another --run-dir")]
    return [
        warning(
            "disk", f"{said}, and up to {needs.checkpoints} are there at a time", "make space, or lower run.keep_last"
        )
    ]


def _of_data_to_come(host: str, folder: Mapping[str, Any], needs: Needs) -> list[Finding]:
    if folder["problem"] or folder["free_bytes"] >= needs.data_bytes:
        return []
    said = f"{host}: {folder['path']} has {size(folder['free_bytes'])} free, the data of {needs.name} take up to"
    return [warning("disk", f"{said} {size(needs.data_bytes)}", "make space there, or name another --data-root")]


def _of_memory(hosts: Sequence[Host], answers: Answers, needs: Needs) -> list[Finding]:
    found, known = [], []
    for host in hosts:
        free = answers.get(host.name, {}).get("memory_bytes")
        if free is None:
            continue
        known.append(f"{host.name} {size(free)}")
        on_gpu = bool(answers[host.name]["gpus"])
        expected = host.slots * (RANK_BYTES + (0 if on_gpu else needs.rank_bytes))
        if free < expected:
            said = f"{host.name} has {size(free)} of memory free; {host.slots} ranks take about {size(expected)}"
            found.append(warning("memory", said, "end what else runs there, or give it fewer slots"))
    return found or [healthy("memory", f"free: {listed(known)}")]


def of_launches(answers: Answers, run: str) -> list[Finding]:
    """Launches that write into the run folder now: a new one would take it over."""
    found = [
        failure("launches", f"{host}: {run} is being written by a launch ({other})",
                "let it end, stop it, or name another --run-dir: a new launch takes the folder over")
        for host, answer in answers.items()
        for other in answer["alive"]
    ]  # fmt: skip
    return found or [healthy("launches", f"nothing else writes into {run} on {everywhere(answers)}")]


def of_recipes(answers: Answers, name: str) -> list[Finding]:
    """One recipe on all hosts."""
    found = [
        failure("recipe", f"{host}: {problem.rstrip('.')}", "copy this machine's recipe there")
        for host, answer in answers.items()
        for problem in answer.get("problems", ())
    ]
    hashes = {host: answer["sha256"] for host, answer in answers.items() if "sha256" in answer}
    if len(set(hashes.values())) > 1:
        found.append(
            failure("recipe", f"the hosts differ in {name} ({_hashes(hashes)})", "copy the right one over the others")
        )
    return found or [healthy("recipe", f"{name} is the same on {everywhere(answers)}")]


def of_data(answers: Answers, name: str) -> list[Finding]:
    """Prepared data: the same on all hosts that have them, and not damaged."""
    found = [
        failure("data", f"{host}: {problem.rstrip('.')}")  # the problem names the way out
        for host, answer in answers.items()
        for problem in answer.get("problems", ())
    ]

    found += [
        warning(
            "data", f"{host}: not all shards could be read in time",
            f"`ds-slm prepare {name} --verify` there reads all of them; a launch does, too, where they changed",
        )
        for host, answer in answers.items()
        if not answer["is_read"]
    ]  # fmt: skip

    # If tokenizers differ, the shards differ, too.
    there = {host: answer for host, answer in answers.items() if "sha256" in answer}
    for what, key in (("tokenizer", "tokenizer_sha256"), ("prepared data", "sha256")):
        hashes = {host: answer[key] for host, answer in there.items()}
        if len(set(hashes.values())) > 1:
            mend = f"copy the right folder over the others, or remove the wrong ones and `ds-slm prepare {name}` there"
            found.append(failure("data", f"the hosts differ in the {what} of {name} ({_hashes(hashes)})", mend))
            break

    absent = {host: answer for host, answer in answers.items() if answer["absent"]}
    partly = [f"{host} lacks {listed(answer['absent'])}" for host, answer in absent.items() if answer["prepared"]]
    nowhere = [host for host, answer in absent.items() if not answer["prepared"]]
    missing = [f"not prepared on {listed(nowhere)}"] if nowhere else []
    if absent:
        done = "sends" if there else "prepares"
        found.append(healthy("data", f"{name}: {'; '.join([*missing, *partly])}: the launch {done} it there"))
    elif there and not found:
        found.append(
            healthy("data", f"{name}: the same {next(iter(there.values()))['sha256'][:10]} on {everywhere(there)}")
        )
    return found


def _hashes(hashes: Mapping[str, str]) -> str:
    return listed([f"{host}: {sha256[:10]}" for host, sha256 in hashes.items()])
