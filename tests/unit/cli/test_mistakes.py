"""Mistakes that `ds-slm train` and `ds-slm sft` tell before DeepSpeed starts anything."""

import json
import os
from pathlib import Path

import pytest

from ds_slm.cli import mistakes
from ds_slm.cluster import launch
from ds_slm.distributed import world
from ds_slm.errors import ConfigError
from tests.support.assistants import ds_slm


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Command lines that would have been run, in a folder with a few things that are wrong."""
    commands: list[list[str]] = []
    monkeypatch.setattr(launch, "run", lambda command, environ, hold_back: commands.append(command) or 0)
    monkeypatch.setattr(launch, "cuda_devices", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.chdir(tmp_path)

    Path("zero9.json").write_text(json.dumps({"zero_optimization": {"stage": 9}}))
    Path("a-file").write_text("text")
    Path("texts").mkdir()
    Path("mine.toml").write_text(
        'base = "demo"\n[card]\nname = "mine"\n[[data.source]]\nname = "text"\nkind = "files"\npath = "none.txt"\n'
    )
    return commands


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--ds-config", "zero9.json"], "stage"),
        (["--ds-config", "none.json"], "No such file"),
        (["--base", "runs/none"], "runs/none does not exist"),
        (["--base", "texts"], "texts is not a model"),
        (["--source", "txt=a-file"], "--source txt"),
        (["--source", "documentation=my/none"], "my/none does not exist"),
        (["--source", "documentation"], "expected NAME=PATH"),
        (["--data-root", "a-file"], "a-file is a file"),
        (["--resume", "must"], "holds no checkpoint"),
        (["--run-dir", "a-file"], "a-file is a file"),
        (["--run-dir", "/proc/x"], "/proc"),
        (["--devices", "9"], "may use 2 of its CPU cores"),
    ],
)
@pytest.mark.parametrize("verb", [["train", "demo"], ["train", "demo", "--restarts", "2"]])
def test_a_mistake_is_told_before_anything_starts(
    launched: list[list[str]],
    verb: list[str],
    typed: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2, the mistake in one paragraph, no command line; with a supervisor as well."""
    assert ds_slm(*verb, *typed, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert told in printed and printed.count("error: ") == 1
    assert not launched and not Path("runs").exists()


def test_what_is_wrong_with_files_is_told_at_once(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text that a recipe names is not there, nor is the base, and the run folder is a file."""
    typed = ["train", "mine.toml", "--base", "runs/none", "--run-dir", "a-file"]
    assert ds_slm(*typed, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "none.txt does not exist" in printed and "runs/none does not exist" in printed and "a-file is a" in printed


@pytest.mark.parametrize(
    ("typed", "way_out"),
    [
        (["train", "demo-instruct"], "`ds-slm sft demo-instruct --base MODEL`"),
        (["sft", "demo", "--base", "x"], "`ds-slm train demo`"),
    ],
)
def test_a_recipe_of_the_other_verb_names_that_verb(
    launched: list[list[str]],
    typed: list[str],
    way_out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the words that the user has to type next."""
    assert ds_slm(*typed, monkeypatch=monkeypatch) == 2
    assert way_out in capsys.readouterr().err and not launched


def test_more_ranks_than_cores_are_warned_of(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to four a core they may be meant, as a trial of another world size; oracle: the launch is still made."""
    ds_slm("train", "demo", "--devices", "3", monkeypatch=monkeypatch)
    assert "2 CPU cores are shared" in capsys.readouterr().err and len(launched) == 1
    ds_slm("train", "demo", "--devices", "2", monkeypatch=monkeypatch)
    assert "warning" not in capsys.readouterr().err and len(launched) == 2


def test_more_devices_than_gpus_are_refused() -> None:
    """By hand, on a machine of two."""
    assert mistakes.refuse_devices(2, cuda_devices=2) is None
    with pytest.raises(ConfigError, match="shows 2 CUDA devices"):
        mistakes.refuse_devices(3, cuda_devices=2)


def test_two_launches_on_a_machine_meet_at_two_ports(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: ports that were free, in the order in which they were given out; one that was typed stays."""
    ports = iter((40001, 40002))
    monkeypatch.setattr(world, "free_port", lambda: next(ports))
    for more in ([], [], ["--master_port", "40003"]):
        ds_slm("train", "demo", *more, monkeypatch=monkeypatch)
    ports_of = [[word for word in command if word.startswith("4000")] for command in launched]
    assert ports_of == [["40001"], ["40002"], ["40003"]]
