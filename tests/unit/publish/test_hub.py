"""An export and the hub: asked only where a user says so, and what it refuses in one paragraph."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.support.model_hub import ModelHub
from tests.support.told_runs import recipe_of, write_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub that the client library asks, with somebody's token."""
    with ModelHub().serving() as serving:
        monkeypatch.setattr(constants, "ENDPOINT", serving.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_somebody")
        yield serving


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", recipe_of())


def test_an_export_alone_asks_nobody(tmp_path: Path, run: Path, hub: ModelHub, ds_slm: Any) -> None:
    """Oracle: the requests that came: none."""
    assert ds_slm("export", run, "--out", tmp_path / "out").returncode == 0
    assert hub.requests == []


def test_the_hub_checks_the_card_before_anything_is_written(
    tmp_path: Path, run: Path, hub: ModelHub, ds_slm: Any
) -> None:
    """Oracle: the card that the hub got is the one that was written; with its refusal nothing is, not even a folder."""
    assert ds_slm("export", run, "--out", tmp_path / "out", "--validate").returncode == 0
    assert hub.validated == [(tmp_path / "out" / "README.md").read_text(encoding="utf-8")]

    hub.refuses["validate-yaml"] = (400, '"license" must be one of many')
    done = ds_slm("export", run, "--out", tmp_path / "other", "--validate")
    assert done.returncode == 2 and "must be one of many" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_folder_is_uploaded_whole_into_a_private_repository(
    tmp_path: Path, run: Path, hub: ModelHub, ds_slm: Any
) -> None:
    """Oracle: every file of the folder, byte by byte; the snippet loads the repository; the token is the user's."""
    done = ds_slm("export", run, "--out", tmp_path / "out", "--push", "org/name")
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories == {"org/name": files}
    assert hub.visibility == {"org/name": "private"} and hub.tokens - {None} == {"Bearer hf_somebody"}
    card = files["README.md"].decode()
    assert 'name = "org/name"' in card and "\n# name\n" in card
    assert f"{hub.url}/org/name" in done.stdout

    # A repository that is there is taken as it is, a public one among them.
    hub.repositories["org/old"], hub.visibility["org/old"] = {}, "public"
    assert ds_slm("export", run, "--out", tmp_path / "again", "--push", "org/old", "--json").returncode == 0
    assert hub.visibility["org/old"] == "public" and "model.safetensors" in hub.repositories["org/old"]


REFUSALS = {
    "nobody": ("repos/create", 401, "Invalid credentials", "log in"),
    "not allowed": ("repos/create", 403, "no right to create a model under org", "log in"),
    "conflict": ("commit/main", 409, "a commit has come in between", "hf upload org/name"),
    "too large": ("preupload", 413, "the quota is used up", "hf upload org/name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_told_and_the_folder_stays(
    tmp_path: Path, run: Path, hub: ModelHub, ds_slm: Any, case: str
) -> None:
    """Oracle: exit code 2, the hub's words, the way out, no traceback; a whole folder."""
    place, status, message, way_out = REFUSALS[case]
    hub.refuses[place] = (status, message)
    done = ds_slm("export", run, "--out", tmp_path / "out", "--push", "org/name")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(status) in done.stderr and message in done.stderr and way_out in done.stderr
    assert "\n" not in done.stderr.partition("error: ")[2].strip()
    assert {"README.md", "model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("flags", [("--validate",), ("--push", "org/name")])
def test_a_hub_that_is_not_reached_is_one_sentence(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, ds_slm: Any, flags: tuple[str, ...]
) -> None:
    """Oracle: exit code 2, and nothing written: the card is checked first. A port that nobody listens on; offline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        done = ds_slm("export", run, "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and "was not reached" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/na me", "https://huggingface.co/org/name"])
def test_an_id_that_is_none_is_refused_first(tmp_path: Path, run: Path, hub: ModelHub, ds_slm: Any, repo: str) -> None:
    """Oracle: exit code 2 beside the other mistakes of the command; nobody is asked, nothing is written."""
    done = ds_slm("export", run, "--out", tmp_path / "out", "--push", repo, "--set", "train.steps=2")
    assert done.returncode == 2 and "ORG/NAME" in done.stderr and "train.steps" in done.stderr
    assert hub.requests == [] and not (tmp_path / "out").exists()
