"""Problems of any rank, raised on all ranks: a rank that ended alone would leave the others inside a collective.

each rank's own --gather--> every problem once, with its host if not all hosts have it --> raised on every rank
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ds_slm.errors import UserError


class Ranks(Protocol):
    """All ranks, as ds_slm.distributed.ranks.Control knows them."""

    hosts: list[str]
    """Host name of each rank."""

    def gather(self, message: Any) -> list[Any]:
        """Every rank's message, in the order of ranks, on every rank. Collective."""
        ...


def raise_on_all(control: Ranks, problems: Sequence[str], error: type[UserError] = UserError) -> None:
    """If any rank has a problem, raise an error with all ranks' problems on all ranks. Collective."""
    if everyones := merged(control.hosts, control.gather(list(problems))):
        raise error(everyones)


def merged(hosts: Sequence[str], problems: Sequence[Iterable[str]]) -> list[str]:
    """Every problem once; with its host if not all of these hosts have it.

    Args:
        hosts: the host of each rank; at least one.
        problems: the problems of each rank.
    """
    by_host: dict[str, dict[str, None]] = {}
    for host, theirs in zip(hosts, problems, strict=True):
        by_host.setdefault(host, {}).update(dict.fromkeys(theirs))

    first, *others = by_host.values()
    everywhere = [problem for problem in first if all(problem in theirs for theirs in others)]
    elsewhere = [f"{host}: {one}" for host, theirs in by_host.items() for one in theirs if one not in everywhere]
    return [*everywhere, *elsewhere]
