"""The doctor's findings on the way from host to host: names, ports, speed, clocks, and the way back over ssh."""

import ipaddress
import statistics
from collections.abc import Mapping

from ds_slm.cluster.findings import Answers, Finding, failure, healthy, listed, warning

MOST_CLOCK_DIFFERENCE_S = 5.0
"""The largest allowed difference: supervised launches compare stamps of other hosts' heartbeats with their clock."""
SLOW_SHARE = 0.25
"""A link is named if it has less than this share of the median link's speed."""
SUPERVISED = "a launch with --restarts"
GLOO_S = 3
"""Seconds for gloo: once torch has started everywhere, it connects the hosts in less than a second."""
ALL_REDUCE_MEND = "does `import torch` work there? else name another interface with GLOO_SOCKET_IFNAME"
MASTER_PORT = 29500
"""DeepSpeed's default --master_port."""


def of_names(answers: Answers, addresses: Mapping[str, list[str]]) -> list[Finding]:
    """What each host's name means on the others.

    Args:
        answers: host -> name -> addresses, as the host finds them.
        addresses: each host's own addresses.
    """
    found, traps = [], []
    for host, answer in answers.items():
        for name, meant in answer.items():
            own = addresses.get(name, [])
            entry = f"write `{own[0] if own else 'ADDRESS'} {name.rpartition('@')[2]}` in /etc/hosts of {host}"
            loopback = [address for address in meant if _is_loopback(address)]
            if name == host:
                traps += [f"{host} ({listed(loopback)})"] if loopback else []
            elif not meant:
                needed = f"{SUPERVISED} needs it"
                found.append(failure("names", f"on {host} the name {name} means nothing, and {needed}", entry))
            elif loopback:
                found.append(
                    failure("names", f"on {host} the name {name} means {host} itself ({listed(loopback)})", entry)
                )
            elif own and not set(meant) & set(own):
                said = f"on {host} the name {name} means {listed(meant)}, and {name} has {listed(own)}"
                found.append(failure("names", said, f"{entry}, in place of what is there"))

    if traps:
        said = f"its own name means loopback on {listed(traps)}: ranks take the interface to rank 0 instead"
        return [*found, healthy("names", said)]
    return found or [healthy("names", f"{listed(list(answers))} mean the same on every host")]


def of_ports(host: str, ports: list[int | None], asked: list[int]) -> list[Finding]:
    """Ports of rank 0's host that another program uses. 0 was asked for if any port will do."""
    return [
        failure(
            "ports",
            f"port {number} of {host}, where the ranks meet, is taken",
            "end what has it, or name another with --master_port",
        )
        for number, port in zip(asked, ports, strict=True)
        if number and port is None
    ]


def without_address(host: str) -> Finding:
    """The finding if rank 0's host has no address at which the others can meet it."""
    return failure(
        "interface", f"{host} has no address but loopback (`hostname -I`)", "connect it to the others' network"
    )


def of_routes(answers: Answers) -> list[Finding]:
    """The interface that gloo takes on each host: the one that leads to rank 0's host."""
    found = [
        failure("interface", f"{host} has no route to rank 0's host", "connect it to the network of the others")
        for host, answer in answers.items()
        if answer["address"] is None
    ]
    said = [
        f"{host} {answer['interface']} ({answer['address']})" for host, answer in answers.items() if answer["address"]
    ]
    return [*found, healthy("interface", f"gloo takes {listed(said)}")] if said else found


def of_links(answers: Answers, first: str) -> list[Finding]:
    """Connections between all pairs of hosts: whether they work and how fast they are. `first`: rank 0's host."""
    found, speeds, latencies = [], {}, {}
    for host, answer in answers.items():
        for other, link in answer["links"].items():
            if link["closed"]:
                reasons = listed([f"port {port}: {reason}" for port, reason in link["closed"]])
                mend = f"open all ports of {other} to the other hosts: ranks meet at {MASTER_PORT}, and talk at any"
                mend += "; or name another address of it with --master_addr" if other == first else ""
                found.append(failure("network", f"{host} cannot connect to {other} ({reasons})", mend))
            if "latency_s" in link:
                latencies[host, other], speeds[host, other] = link["latency_s"], link["bytes_per_s"]

    if speeds:
        middle = statistics.median(speeds.values())
        slow = {pair: speed for pair, speed in speeds.items() if speed < middle * SLOW_SHARE}
        for (host, other), speed in slow.items():
            said = f"{host} to {other}: {_speed(speed)}, the others about {_speed(middle)}; every step waits for it"
            found.append(warning("network", said, "look at its cable, its switch and what else uses them"))
        said = f"latency up to {max(latencies.values()) * 1e3:.2f} ms, at least {_speed(min(speeds.values()))}"
        found.append(healthy("network", f"{len(speeds)} connections between hosts: {said}"))
    return found


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2f} Gbit/s"


def of_all_reduce(answers: Answers, within_s: float) -> list[Finding]:
    """One all-reduce among all hosts over gloo, in which the ranks 0, 1, ... add 1, 2, ..."""
    expected = len(answers) * (len(answers) + 1) // 2
    found = []
    for host, answer in answers.items():
        if "reason" in answer:
            found.append(failure("all-reduce", f"{host}: {answer['reason'].rstrip('.')}", ALL_REDUCE_MEND))
        elif answer.get("sum", expected) != expected:
            found.append(failure("all-reduce", f"{host} has {answer['sum']}, expected {expected}", ALL_REDUCE_MEND))
    if found:
        return found

    # If it is unfinished, either torch has just started, or it waits for hosts that it does not reach.
    waited_s = {host: answer["waited_s"] for host, answer in answers.items() if "waited_s" in answer}
    if waited_s and all((seconds or 0) > GLOO_S for seconds in waited_s.values()):
        said = f"gloo does not connect {listed(list(waited_s))} within {min(filter(None, waited_s.values())):.0f} s"
        return [failure("all-reduce", said, ALL_REDUCE_MEND)]
    if waited_s:
        said = f"not tried to its end: torch took longer than {within_s:.0f} s to start on {listed(list(waited_s))}"
        return [healthy("all-reduce", said)]
    return [healthy("all-reduce", f"gloo adds up over {listed(list(answers))}")]


def of_clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Differences of the hosts' clocks. `offsets`: each host's offset from this machine, and its uncertainty, in s."""
    if len(offsets) < 2:
        return []
    first, last = (choose(offsets, key=lambda host: offsets[host][0]) for choose in (min, max))
    difference = offsets[last][0] - offsets[first][0]
    error = offsets[last][1] + offsets[first][1]
    said = f"{last} is {difference:.3f} s ahead of {first} (±{error:.3f} s)"
    if difference <= MOST_CLOCK_DIFFERENCE_S:
        return [healthy("clocks", said)]
    said += f", expected at most {MOST_CLOCK_DIFFERENCE_S:g} s: {SUPERVISED} takes healthy hosts for lost ones"
    return [failure("clocks", said, "`timedatectl set-ntp true` on every host, or chrony")]


def of_forwarding(answers: Answers) -> list[Finding]:
    """Whether a port of each host leads back here over ssh."""
    found = [
        failure("forwarding", f"{host}: ssh -R does not lead back here ({answer['reason']}); {SUPERVISED} needs it",
                f"`AllowTcpForwarding yes` in /etc/ssh/sshd_config of {host}, and `systemctl reload ssh`")
        for host, answer in answers.items()
        if not answer["works"]
    ]  # fmt: skip
    return found or [healthy("forwarding", f"ssh -R leads back here from {listed(list(answers))}")] if answers else []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
