"""Launches that write into one run folder: one holds it, and a living one is told of before it is replaced."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_slm import files
from ds_slm.errors import ReplacedByNewerLaunch
from ds_slm.run import launches
from ds_slm.run.launches import Launch
from tests.support import ranks, runs


def claim(run: Path, launch: Launch) -> bool:
    """Whether it gets the folder, by what env.json says."""
    try:
        with launches.claiming(run, launch):
            files.write_json(run / "env.json", launch.facts())
    except ReplacedByNewerLaunch:
        return False
    return True


def test_all_ranks_agree_on_a_launch(tmp_path: Path) -> None:
    """Oracle: one more than the greatest generation of two hosts' folders; another id each time."""
    for host, generation in (("a", 3), ("b", 7)):
        (tmp_path / host).mkdir()
        (tmp_path / host / "env.json").write_text(json.dumps({"generation": generation}))  # of an older version

    def begin(control: Any) -> Launch:
        return launches.begin(control, tmp_path / control.hosts[control.rank])

    first, second = ranks.run(["a", "b"], begin), ranks.run(["a", "b"], begin)
    assert first[0] == first[1] and first[0].generation == second[0].generation == 8
    assert first[0].id != second[0].id


@pytest.mark.parametrize("order", ["first-a", "first-b", "crossed"])
def test_of_two_at_the_same_moment_one_holds_every_host(tmp_path: Path, order: str) -> None:
    """Oracle: the same number, ids a and b, two hosts: whoever comes first on which, b holds both and a none."""
    a, b = Launch(4, "a"), Launch(4, "b")
    turns = {"first-a": [(a, b), (a, b)], "first-b": [(b, a), (b, a)], "crossed": [(a, b), (b, a)]}[order]
    for host, turn in zip(("host0", "host1"), turns, strict=True):
        for launch in turn:
            claim(tmp_path / host, launch)
    for host in ("host0", "host1"):
        assert launches.is_replaced(tmp_path / host, a) and not launches.is_replaced(tmp_path / host, b)
        with pytest.raises(ReplacedByNewerLaunch):
            launches.refuse_replaced(tmp_path / host, a)
    assert not claim(tmp_path / "host0", a) and claim(tmp_path / "host0", replace(a, generation=5))


def test_a_folder_that_cannot_be_read_belongs_to_nobody_else(tmp_path: Path) -> None:
    """Oracle: no env.json, an empty one, a halved one, one that holds a list, keys of a later version."""
    launch = Launch(2, "x", "here", 1, "now")
    assert launches.holder(tmp_path) == Launch() and not launches.is_replaced(tmp_path, launch)
    for text in ("", '{"generation": 2', "[]", '{"generation": "x"}', '{"launch": 3}'):
        (tmp_path / "env.json").write_text(text)
        assert not launches.is_replaced(tmp_path, launch)
    facts = launch.facts()
    (tmp_path / "env.json").write_text(json.dumps({**facts, "launch": {**facts["launch"], "later": 1}}))
    assert launches.holder(tmp_path) == launch


def test_a_folder_that_did_not_change_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of what is read: once, again for another launch's file, each time where reading fails."""
    reads: list[Path] = []
    working, refuses = files.read_json, False

    def read(path: Path) -> dict[str, Any] | None:
        reads.append(path)
        return None if refuses else working(path)

    monkeypatch.setattr(launches, "read_json", read)
    first, second = Launch(1, "a"), Launch(2, "b")

    claim(tmp_path, first)
    assert [launches.holder(tmp_path) for _ in range(3)] == [first] * 3
    begun = len(reads)
    assert not launches.is_replaced(tmp_path, first) and len(reads) == begun

    files.write_json(tmp_path / "env.json", second.facts())
    refuses = True
    assert not any(launches.is_replaced(tmp_path, first) for _ in range(2)) and len(reads) == begun + 2
    refuses = False
    assert all(launches.is_replaced(tmp_path, first) for _ in range(2)) and len(reads) == begun + 3


LIVES = """
import sys
from pathlib import Path
from ds_slm.run import launches
with launches.living(Path(sys.argv[1]), launches.Launch(1, sys.argv[2], "node7", 4711, "noon")):
    print("lives", flush=True)
    input()
"""


def test_a_launch_that_lives_is_told_of(tmp_path: Path) -> None:
    """Oracle: host, process and beginning of one that lives; nothing of one that was killed or has ended."""
    own = Launch(2, "own")
    command = [sys.executable, "-c", LIVES, str(tmp_path)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT
                )
            )
            for name in ("stays", "killed", "ends")
        ]
        for process in processes:
            assert process.stdout and process.stdout.readline() == "lives\n"
        stack.enter_context(launches.living(tmp_path, own))
        assert launches.others_alive(tmp_path, own) == ["node7, process 4711, since noon"] * 3
        stays, killed, ends = processes
        killed.kill()
        killed.wait()
        ends.communicate("\n")

        def told(control: Any) -> list[str]:
            with ExitStack() as held:
                return launches.take_over(control, tmp_path, Launch(3, f"third-{control.rank}"), [0], held)

        first, second = ranks.run(["a", "b"], told)
        assert any("written by another launch (node7, process 4711, since noon)" in line for line in first)
        assert second == []
        stays.communicate("\n")
        assert launches.others_alive(tmp_path, own) == []
    assert not list((tmp_path / "logs").glob(".launch-*"))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Oracle: a lock's name that is a link to somebody's file: refused, the file as it was."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "mine").write_text("x")
    (tmp_path / "logs" / ".claim.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        claim(tmp_path, Launch(1, "a"))
    assert (tmp_path / "mine").read_text() == "x"
