"""Limits of a supervised run, from the flags of `ds-slm train` to torchrun's settings; and names that both ends use."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ds_slm.errors import ConfigError

NAME = "ds-slm"
"""The name of our rendezvous, as `torchrun --rdzv-backend` takes it."""
END = "ds_slm/end"
"""The store's key for the exit code with which all agents end."""
HEARTBEAT_S = 2


@dataclass(frozen=True)
class Limits:
    """Limits of a supervised run; times are whole seconds, as torchrun takes them."""

    restarts: int = 0
    """Restarts that are allowed in a row without a new step; 0: the run is not supervised."""
    lease: int = 15
    """The longest silence of the store."""
    hang: int = 300
    """The longest time of a rank without a sign of life."""
    grace: int = 5
    """The time that ranks get to end if other ranks are lost, so that they cannot save together."""
    save: int = 30
    """The time that ranks get to save and end if all are there."""
    gather: int = 60
    """The longest time that the first round waits for all hosts."""

    @property
    def missed_heartbeats(self) -> int:
        """A host that misses this number is lost: by then a host that is cut off has ended its ranks."""
        return math.ceil((self.lease + self.grace) / HEARTBEAT_S)

    @property
    def conf(self) -> str:
        """The limits as torchrun's `--rdzv-conf` takes them."""
        return ",".join(f"{name}={number}" for name, number in asdict(self).items())

    @classmethod
    def of_conf(cls, conf: Mapping[str, object]) -> "Limits":
        """The limits among torchrun's settings."""
        return cls(**{name: int(str(conf[name])) for name in cls.__annotations__ if name in conf})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a supervised run; the first one asks for supervision."""
    group = parser.add_argument_group("a run that outlives its hosts")
    group.add_argument(
        "--restarts",
        type=_whole,
        default=0,
        metavar="K",
        help="supervise the run: ranks and hosts that die, hang or return start it again from its newest checkpoint, "
        "at most K times without a new step (default 0: a plain launch)",
    )
    group.add_argument("--hang-timeout", type=positive, metavar="S", help="a rank hangs after S seconds (default 300)")
    group.add_argument("--lease", type=positive, metavar="S", help="a host is cut off after S seconds (default 15)")
    group.add_argument("--min-hosts", type=positive, metavar="N", help="train on no fewer hosts (default 1)")


def of_flags(args: argparse.Namespace) -> Limits:
    """The limits that a command line asks for.

    Raises:
        ConfigError: flags have no effect without --restarts.
    """
    given = {"--hang-timeout": args.hang_timeout, "--lease": args.lease, "--min-hosts": args.min_hosts}
    idle = [name for name, value in given.items() if value is not None]
    if idle and not args.restarts:
        raise ConfigError(f"{', '.join(idle)}: no effect without --restarts K, which supervises the run.")

    chosen = {"lease": args.lease, "hang": args.hang_timeout}
    save = math.ceil(args.grace) + Limits.grace
    return Limits(args.restarts, save=save, **{name: value for name, value in chosen.items() if value is not None})


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
