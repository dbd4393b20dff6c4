"""Checks of every host before a run: what would break it, and how to mend that.

    hostfile --> a probe on every host at once (probing.py) --questions--> answers --judges--> findings, as they come
                                                                        (*findings.py)

A host that does not answer, or cannot answer one question, is named, and the others are checked without it. Nothing is
changed on any host.

Known gaps: GPUs are counted, not used, and NCCL is not tried; the conversations of a fine-tuning recipe are not
checked. Findings are true only at the moment.
"""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_slm.cluster import content_findings, findings, link_findings
from ds_slm.cluster.content_findings import Needs
from ds_slm.cluster.findings import Finding
from ds_slm.cluster.hostfile import Host, is_this_machine
from ds_slm.cluster.link_findings import MASTER_PORT
from ds_slm.cluster.probing import Forward, Session, close_all
from ds_slm.cluster.runner_flags import PROGRAMS
from ds_slm.recipe import ds_config, loading, plan
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.times import Topology
from ds_slm.run import software

CONNECT_PATIENCE_S = 3
DATA_PATIENCE_S = 6
ALL_REDUCE_S = 10
"""Limit from the beginning on: torch takes long to start on a loaded host, and the doctor does not wait for it."""
MOST_AT_ONCE = 64
CHECKPOINT_BYTES = 12
"""Bytes of a checkpoint for each parameter: fp32 weights and two moments."""
Details = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The launch that is planned."""

    hosts: Sequence[Host]
    """The hosts in the hostfile's order; empty for this machine alone, with all its devices."""
    run_dir: Path
    data_root: Path
    recipe: str | None = None
    """The recipe's name or path."""
    folder: Path = field(default_factory=Path.cwd)
    """The folder in which the launch is typed."""

    @property
    def places(self) -> Sequence[Host]:
        """The hosts, or this machine."""
        return self.hosts or [Host("localhost", 1)]

    @property
    def over_ssh(self) -> bool:
        """Whether the hosts are reached over ssh, as DeepSpeed does if there are several."""
        return len(self.hosts) > 1 or any(not is_this_machine(host.name) for host in self.hosts)

    def needs(self) -> Needs:
        """What the recipe needs on disks and in memory."""
        if self.recipe is None:
            return Needs()

        recipe, name = loading.load(self.recipe, run=self.run_dir), loading.recipe_path(self.recipe).stem
        zero1 = ds_config.read(software.ROOT / "ds_configs" / "zero1.json")
        world_size = sum(host.slots for host in self.places)
        memory = plan.plan(recipe, name, zero1, Topology(world_size, len(self.places))).cpu_memory

        token_bytes = 2 if recipe.model.vocab_size <= 1 << 16 else 4
        return Needs(
            name=name,
            checkpoint_bytes=parameters(recipe.model) * CHECKPOINT_BYTES,
            checkpoints=recipe.run.keep_last + recipe.run.keep_best + 1,
            keepers=recipe.run.checkpoint_copies,
            data_bytes=recipe.train.steps * recipe.train.global_batch_tokens * token_bytes,
            rank_bytes=memory.device_bytes - memory.program_bytes,
        )


def examine(launch: Plan) -> Iterator[Finding]:
    """Check every host; yields findings as soon as they are known.

    Raises:
        RecipeError: this machine cannot read the recipe.
    """
    needs = launch.needs()
    if launch.over_ssh:
        here = findings.of_programs({name: shutil.which(name) for name in PROGRAMS}, PROGRAMS)
        yield from here
        yield from _environment_files(launch.folder)
        if shutil.which("ssh") is None:
            return
    if launch.over_ssh and len(launch.hosts) == 1:
        yield findings.alone(launch.hosts[0].name)

    examination = _Examination(launch, needs)
    try:
        yield from examination.connect()
        if examination.sessions:
            yield from examination.hosts()
            if launch.over_ssh:
                yield from examination.links()
            yield from examination.contents()
            yield from examination.all_reduce()
    finally:
        close_all(list(examination.sessions.values()))


def _environment_files(folder: Path) -> Iterator[Finding]:
    """The files of variables that DeepSpeed's launcher reads on the machine where it is typed."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in dict.fromkeys((Path.home() / name, folder / name)):
        if path.is_file():
            yield from findings.of_environment_file(str(path), path.read_text(encoding="utf-8", errors="replace"))


class _Examination:
    """The hosts that answer, and their answers so far."""

    def __init__(self, launch: Plan, needs: Needs) -> None:
        self.launch = launch
        self.needs = needs
        self.sessions: dict[str, Session] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self.forward = Forward(secrets.token_hex(16)) if launch.over_ssh else None
        self._began = time.monotonic()
        self._adding: list[str] = []
        self._uninstalled: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        """Hosts, each with the package or the error that a finding has named."""
        self._pool = ThreadPoolExecutor(min(len(launch.places), MOST_AT_ONCE))

    def connect(self) -> Iterator[Finding]:
        """Start a probe on every host."""
        over_ssh, folder = self.launch.over_ssh, self.launch.folder
        names = [host.name for host in self.launch.places]
        started = [Session(name if over_ssh else None, folder, self.forward) for name in names]

        for name, session, said in zip(names, started, self._pool.map(Session.connect, started), strict=True):
            if said is None:
                self.sessions[name] = session
            else:
                yield findings.of_ssh(name, said)

        if self.sessions and over_ssh:
            slowest_s = max(session.connected_s for session in self.sessions.values())
            said = f"{findings.listed(list(self.sessions))} let this machine in without a password ({slowest_s:.1f} s)"
            yield findings.healthy("ssh", said)

    def hosts(self) -> Iterator[Finding]:
        """Findings on each host and its software."""
        checkout, folder = str(software.ROOT), str(self.launch.folder)
        written = {"run": str(self.launch.run_dir), "data": str(self.launch.data_root), "home": "~"}
        self.described = yield from self._ask("describe", checkout=checkout, folder=folder, folders=written)
        if not self.described:
            return
        yield from findings.of_machines(self.described)
        yield from findings.of_installation(self.described, sys.executable, checkout, folder)
        self._uninstalled = {
            host
            for host, answer in self.described.items()
            if not answer["checkout"] or answer["python"]["executable"] != sys.executable
        }

        installed = yield from self._ask("software", about="versions")
        if installed:
            yield from findings.of_software(installed)
        there = {host: self.described[host] for host in installed}
        cuda = {host: answer["torch_cuda"] for host, answer in installed.items()}
        if self.launch.hosts:
            yield from findings.of_slots(self.launch.hosts, there, cuda)
        if there:
            yield from findings.of_compilers(there, installed, cuda)

    def links(self) -> Iterator[Finding]:
        """Findings on clocks, names, ports and speed, and on the way back to this machine."""
        offsets = dict(zip(self.sessions, self._pool.map(Session.clock_offset, self.sessions.values()), strict=True))
        yield from link_findings.of_clocks({host: offset for host, offset in offsets.items() if offset})

        bare = {name: name.rpartition("@")[2] for name in self.sessions}
        meant = yield from self._ask("resolve", about="names", names=list(bare.values()))
        by_host = {host: {name: answer[address] for name, address in bare.items()} for host, answer in meant.items()}
        addresses = {host: answer["addresses"] for host, answer in self.described.items()}
        yield from link_findings.of_names(by_host, addresses)
        if len(self.sessions) > 1:
            yield from self._network(addresses)

        ports = {host: session.forwarded_port() for host, session in self.sessions.items()}
        asked = {host: {"port": port} for host, port in ports.items() if port}
        refused = {host: {"works": False, "reason": "the server refuses it"} for host in ports if host not in asked}
        answers = yield from self._ask("forwarded", each=asked, word=self.forward.word if self.forward else "")
        yield from link_findings.of_forwarding({**answers, **refused})

    def _network(self, addresses: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
        """Every host listens, and every other connects as ranks do: at the address on the way to rank 0's host."""
        first = next(iter(self.sessions))
        if not addresses.get(first):
            yield link_findings.without_address(first)
            return
        routes = yield from self._ask("route", about="interface", towards=addresses[first][0], port=MASTER_PORT)
        yield from link_findings.of_routes(routes)
        reachable = {host: answer["address"] for host, answer in routes.items() if answer["address"]}

        # Rank 0's host listens where the ranks will meet, too.
        ports = {host: {"ports": [0, MASTER_PORT] if host == first else [0]} for host in reachable}
        listening = yield from self._ask("listen", about="network", each=ports)
        if first in listening:
            yield from link_findings.of_ports(first, listening[first]["ports"], ports[first]["ports"])

        # In round k each host connects to the k-th one after it, so that no link is measured twice at the same time.
        answers: dict[str, dict[str, Any]] = {}
        circle = list(listening)
        for step in range(1, len(circle)):
            targets = {host: circle[(place + step) % len(circle)] for place, host in enumerate(circle)}
            each = {
                host: {"targets": {other: [reachable[other], [port for port in listening[other]["ports"] if port]]}}
                for host, other in targets.items()
            }
            said = yield from self._ask("connect", about="network", each=each, within_s=CONNECT_PATIENCE_S)
            for host, answer in said.items():
                answers.setdefault(host, {"links": {}})["links"].update(answer["links"])
        found = link_findings.of_links(answers, first)
        yield from found
        if all(finding.level != "failure" for finding in found) and len(listening) > 1:
            yield from self._begin_all_reduce({host: routes[host] for host in listening})

    def _begin_all_reduce(self, routes: Details) -> Iterator[Finding]:
        """Let torch start on every host while other questions are asked."""
        first = next(iter(routes))
        port = yield from self._ask("free_port", about="all-reduce", each={first: {}})
        if not port:
            return
        meeting = {"world": len(routes), "address": routes[first]["address"], "port": port[first]["port"]}
        each = {host: {"rank": rank, "interface": routes[host]["interface"]} for rank, host in enumerate(routes)}
        begun = yield from self._ask("begin_all_reduce", about="all-reduce", each=each, **meeting)
        self._adding = list(begun)

    def all_reduce(self) -> Iterator[Finding]:
        """Findings on the all-reduce, if there is time left to wait for it."""
        if not self._adding:
            return
        left_s = max(self._began + ALL_REDUCE_S - time.monotonic(), 0.1)
        each = {host: {"within_s": left_s} for host in self._adding}
        answers = yield from self._ask("end_all_reduce", about="all-reduce", each=each)
        if answers:
            yield from link_findings.of_all_reduce(answers, ALL_REDUCE_S)

    def contents(self) -> Iterator[Finding]:
        """Findings on the run folder, the recipe, prepared data, and the space for them."""
        unprepared: list[str] = []
        alive = yield from self._ask("launches", run=str(self.launch.run_dir))
        if alive:
            yield from content_findings.of_launches(alive, str(self.launch.run_dir))

        if self.launch.recipe is not None:
            read = yield from self._ask("recipe", name=self.launch.recipe, run=str(self.launch.run_dir))
            if read:
                yield from content_findings.of_recipes(read, self.launch.recipe)
            readable = [host for host, answer in read.items() if "sha256" in answer]
            read_now = {
                host: {"name": self.launch.recipe, "data_root": str(self.launch.data_root)} for host in readable
            }
            answers = yield from self._ask("data", each=read_now, within_s=DATA_PATIENCE_S)
            yield from content_findings.of_data(answers, self.needs.name)
            unprepared = [host for host, answer in answers.items() if answer.get("absent")]
        yield from content_findings.of_folders(self.launch.places, self.described, self.needs, unprepared)

    def _ask(
        self, question: str, about: str = "", each: Details | None = None, **details: Any
    ) -> Generator[Finding, None, dict[str, dict[str, Any]]]:
        """Ask hosts at the same time; returns their answers, after findings about hosts that do not answer.

        Args:
            question: the question to the probe.
            about: the subject of the findings, if it is not the question.
            each: the details for each host that is asked; if left out, all hosts are asked.
            **details: details for every host.
        """
        asked = {host: (each or {}).get(host, {}) for host in self.sessions if each is None or host in each}

        def ask(host: str) -> dict[str, Any]:
            return self.sessions[host].ask(question, **details, **asked[host])

        answers = dict(zip(asked, self._pool.map(ask, asked), strict=True))
        wrong = {host: answer for host, answer in answers.items() if "error" in answer}
        yield from findings.of_errors(about or question, self._not_told_yet(wrong))
        for host in wrong:
            if self.sessions[host].is_over:
                self.sessions.pop(host).close()
        return {host: answer for host, answer in answers.items() if host not in wrong}

    def _not_told_yet(self, wrong: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Errors of hosts that have the project, each once; a package that cannot be imported is one error."""
        causes = {host: (host, answer.get("package") or answer["error"]) for host, answer in wrong.items()}
        new = {
            host: answer
            for host, answer in wrong.items()
            if host not in self._uninstalled and causes[host] not in self._told
        }
        self._told |= {causes[host] for host in new}
        return new
