"""The flags of a supervised run, and what torchrun's agent reads of them."""

import argparse

import pytest

from ds_slm.cluster import limits
from ds_slm.cluster.limits import Limits
from ds_slm.errors import ConfigError


def flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--grace", type=float, default=25.0)
    limits.add_flags(parser)
    return parser.parse_args(arguments)


def test_what_is_typed_reaches_the_agent() -> None:
    """Oracle: the flags themselves, through torchrun's `key=value,key=value`."""
    endured = limits.of_flags(flags("--restarts", "4", "--lease", "9", "--hang-timeout", "60", "--grace", "12.5"))
    assert (endured.restarts, endured.lease, endured.hang) == (4, 9, 60)
    assert endured.save >= 12.5
    conf = dict(pair.split("=") for pair in endured.conf.split(","))
    assert Limits.of_conf({**conf, "is_host": "0"}) == endured


def test_without_restarts_nothing_is_supervised() -> None:
    """Oracle: by hand: 0 restarts where the flag is left out, and where it says 0."""
    assert not limits.of_flags(flags()).restarts
    assert not limits.of_flags(flags("--restarts", "0")).restarts


@pytest.mark.parametrize("flag", ["--lease", "--hang-timeout", "--min-hosts"])
def test_a_flag_without_effect_is_refused(flag: str) -> None:
    """Oracle: the flag itself, which the error names."""
    with pytest.raises(ConfigError, match=rf"{flag}: no effect without --restarts"):
        limits.of_flags(flags(flag, "3"))


@pytest.mark.parametrize("arguments", [["--restarts", "-1"], ["--restarts", "many"], ["--lease", "0"]])
def test_what_is_not_a_number_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: argparse's exit code for a bad command line, 2; the flag and its value are told."""
    with pytest.raises(SystemExit) as refused:
        flags(*arguments)
    flag, value = arguments
    assert refused.value.code == 2
    assert f"argument {flag}: {value!r} is not a " in capsys.readouterr().err
