"""Numbers and names that a user mistypes at a verb: what was got, what was expected, and the way out."""

import pytest

from ds_slm.cli.flags import link_speed
from ds_slm.errors import ConfigError
from tests.unit.cli.test_main import refused


@pytest.mark.parametrize(
    ("flag", "given", "told"),
    [
        ("--devices", "two", "error: --devices 'two': expected a whole number; "),
        ("--devices", "1.5", "error: --devices '1.5': expected a whole number; "),
        ("--nodes", "0", "error: --nodes '0': expected 1 or more; "),
        ("--host-memory", "64GB", "error: --host-memory '64GB': expected a number (GB); "),
        ("--network", "fast", "error: --network 'fast': not the speed of a link: expected Gbit/s, such as 10 or"),
    ],
)
def test_a_value_that_is_no_number(
    flag: str, given: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: the flag, its value and what it takes, in a sentence; none of the library's own words."""
    said = refused(["plan", "demo", flag, given], monkeypatch, capsys)
    assert said.startswith(told) and "Input should" not in said and "unable to parse" not in said


@pytest.mark.parametrize("text", ["10", "10G", "10Gbit", "10Gbit/s", "10 Gbit/s", "10Gbps", "10Gb/s", "10GBit/s"])
def test_speeds_of_a_link_as_people_write_them(text: str) -> None:
    """Oracle: 10 Gbit/s, whatever the spelling."""
    assert link_speed(text) == 10


def test_other_units_of_a_speed() -> None:
    """Oracle: by hand: a thousand Mbit/s are one Gbit/s."""
    assert (link_speed("400Mbit/s"), link_speed("2.5"), link_speed("1.6Tbps")) == (0.4, 2.5, 1600)


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", "1GB/s", "10 Gigabit", "1e3", "nan", "inf", "9" * 400])
def test_speeds_that_are_none(text: str) -> None:
    """Bytes per second are none either: they would be eight times too slow."""
    with pytest.raises(ConfigError, match="expected Gbit/s"):
        link_speed(text)
