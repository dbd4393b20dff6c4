"""The file of a ds_config: what is said where it is not there."""

from pathlib import Path

import pytest

from ds_slm.errors import ConfigError
from ds_slm.recipe import ds_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("given", "nearest"), [("zero2", "zero2"), ("zero3.jsn", "zero3"), ("nothing", None)])
def test_a_ds_config_that_is_not_there(given: str, nearest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files of the checkout, every one; the nearest as a path that can be typed."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as raised:
        ds_config.read(Path(given))
    said = str(raised.value)
    assert f"--ds-config {given}: No such file or directory" in said
    assert all(path.name in said for path in (ROOT / "ds_configs").glob("*.json"))
    assert (f"the nearest is ds_configs/{nearest}.json" in said) if nearest else ("the nearest" not in said)


def test_a_nearest_ds_config_can_be_typed_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file that the message names is there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        ds_config.read(Path("zero2"))
    named = str(raised.value).partition("the nearest is ")[2].partition(";")[0]
    assert Path(named).is_file() and Path(named).name == "zero2.json"
