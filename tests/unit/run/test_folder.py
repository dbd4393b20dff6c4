"""A run folder left in any state by a kill, a bad disk or a hand: the same command goes on, or says why not."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_slm import files
from ds_slm.cluster import prove_resume
from ds_slm.data.shards.prepared import Prepared
from ds_slm.distributed.ranks import Control
from ds_slm.errors import CheckpointError, RecipeError
from ds_slm.recipe import loading
from ds_slm.run import folder as run_folder
from ds_slm.run import launches
from ds_slm.run.launches import Launch
from ds_slm.run.records import Records
from ds_slm.run.report import Report
from tests.support.data_recipes import prepare, source, texts, write_jsonl
from tests.support.data_recipes import recipe as data_recipe
from tests.support.runs import TINY

RECIPE = loading.parse(TINY)
FACTS = {"generation": 3, "skip_rows": [[0, 7]], "recipe_sha256": RECIPE.identity_sha256()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    made = data_recipe(source("first", path=write_jsonl(folder / "one.jsonl", texts(100))))
    return prepare(made, folder / "data")


class Killed(BaseException):
    """The process ends here."""


def begin(run: Path, prepared: Prepared) -> None:
    """What a launch writes before its first step, in its order."""
    alone: Any = type("Alone", (Control,), {"__init__": lambda self: None})()
    alone.rank, alone.leaders, alone.world_size, alone.hosts = 0, [0], 1, ["here"]
    alone.gather = lambda message: [message]
    alone.broadcast = lambda message, source: message
    alone.barrier = lambda: None
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "logs" / "rank-00000.log").touch()
    alone.writers(run)
    run_folder.describe(run, RECIPE, {}, FACTS, prepared.tokenizer_folder)


CHANGES = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "sendfile")


def test_every_beginning_of_a_first_launch_is_accepted(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each change on disk. Oracle: refuse_foreign accepts, and the next launch leaves what one without a
    kill leaves.
    """
    work = {name: getattr(os, name) for name in CHANGES}

    def contents(run: Path) -> dict[str, bytes]:
        found = (path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0][0] != ".")
        return {str(path.relative_to(run)): path.read_bytes() for path in found}

    begin(tmp_path / "whole", prepared)
    whole = contents(tmp_path / "whole")
    kill_at = 0
    while True:
        run, left = tmp_path / str(kill_at), kill_at

        def counted(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                reads = name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not reads:
                    if left == 0:
                        raise Killed
                    left -= 1
                return work[name](*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in CHANGES:
                patched.setattr(os, name, counted(name))
            try:
                begin(run, prepared)
            except Killed:
                pass
            else:
                break
        run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)
        begin(run, prepared)
        kept = contents(run)
        changes = kept.pop("changes.jsonl").splitlines()
        assert {*changes} == {*whole["changes.jsonl"].splitlines()}
        assert kept == {name: content for name, content in whole.items() if name != "changes.jsonl"}
        kill_at += 1
    assert kill_at > 15


def test_what_an_older_version_left_is_accepted(tmp_path: Path, prepared: Prepared) -> None:
    """It wrote the tokenizer before recipe.toml. Oracle: accepted; a folder with anything else is still refused."""
    run = tmp_path / "run"
    for name in ("logs", ".tokenizer.tmp", "tokenizer", ".host-0"):
        (run / name).mkdir(parents=True)
        run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)
    (run / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no recipe.toml"):
        run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)


@pytest.mark.parametrize("parent", [False, True])
def test_a_run_folder_that_is_a_link(tmp_path: Path, prepared: Prepared, parent: bool) -> None:
    """Oracle: a link to nothing is refused with the way out, the folder's own or one above it; to a folder works."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    run = link / "run" if parent else link
    with pytest.raises(CheckpointError, match=r"--run-dir .*link is a link to nothing: mend or remove it"):
        run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)
    (tmp_path / "target").mkdir()
    run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)
    begin(run, prepared)
    run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """Oracle: a sentence; also where a folder above it is one."""
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="file is a file, expected a folder"):
            run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "no UTF-8": lambda content: b"\xff\xfe\x00" + content,
    "a list": lambda content: b"[1]",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_env_does_not_turn_the_launches_back(tmp_path: Path, prepared: Prepared, damage: str) -> None:
    """Oracle: the generation of changes.jsonl or of stopped.json, whichever is the greatest."""
    run = tmp_path / "run"
    begin(run, prepared)
    assert run_folder.generation(run) == 3
    (run / "env.json").write_bytes(DAMAGE[damage]((run / "env.json").read_bytes()))
    assert run_folder.generation(run) == 3
    files.write_json(run / "stopped.json", {"generation": 7})
    assert run_folder.generation(run) == 7
    (run / "stopped.json").write_bytes(b"{")
    assert run_folder.generation(run) == 3


@pytest.mark.parametrize(
    ("content", "holder"),
    [
        ("", Launch()),
        ("{}", Launch()),
        ("[1]", Launch()),
        ('{"generation": "4"}', Launch()),
        ('{"generation": 4}', Launch(4)),
        ('{"generation": 4, "launch": [1]}', Launch(4)),
        ('{"generation": 4, "launch": {"id": 5, "host": "node1", "pid": "x"}}', Launch(4, host="node1")),
        ('{"generation": 4, "launch": {"id": "a", "unknown": 1}}', Launch(4, "a")),
    ],
)
def test_the_holder_of_a_damaged_env_is_what_can_be_read(tmp_path: Path, content: str, holder: Launch) -> None:
    """Oracle: by hand; what is of another kind than this program writes counts as not there."""
    (tmp_path / "env.json").write_text(content)
    assert launches.holder(tmp_path) == holder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_done_counts_as_none(tmp_path: Path, damage: str) -> None:
    """Oracle: nothing, as where the run's end was never reached; a whole one is read."""
    files.write_json(tmp_path / "done.json", {"step": 20, "val_loss": 1.0})
    assert run_folder.finished(tmp_path)["step"] == 20
    (tmp_path / "done.json").write_bytes(DAMAGE[damage]((tmp_path / "done.json").read_bytes()))
    assert run_folder.finished(tmp_path) == {}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_recipe_is_written_anew_by_the_same_one(tmp_path: Path, prepared: Prepared, damage: str) -> None:
    """Oracle: the hash in a checkpoint or env.json: the same recipe goes on and mends it, another is refused."""
    run = tmp_path / "run"
    begin(run, prepared)
    path = run / "recipe.toml"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    other = loading.parse(TINY, ["train.seed=9"])
    with pytest.raises(CheckpointError, match=r"This launch has the recipe .*, the run was trained with"):
        run_folder.refuse_foreign(run, other, "auto", allow_change=False)
    with pytest.raises(RecipeError, match="launch its training once more"):
        loading.load_recorded(run)
    run_folder.refuse_foreign(run, RECIPE, "auto", allow_change=False)
    notes = run_folder.describe(run, RECIPE, {}, FACTS, prepared.tokenizer_folder)
    assert ["recipe.toml was damaged" in note for note in notes] == [True]
    assert loading.load_recorded(run) == RECIPE


@pytest.mark.parametrize("damage", DAMAGE)
def test_changes_after_a_damaged_line_are_whole(tmp_path: Path, damage: str) -> None:
    """Oracle: every line that is recorded afterwards is read back, and what was there is not lost."""
    run_folder.record_change(tmp_path, {"generation": 1, "begins_at_step": 10}, {"changes": {"train.steps": [20, 30]}})
    path = tmp_path / "changes.jsonl"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = path.read_bytes()
    run_folder.record_change(tmp_path, {"generation": 2, "begins_at_step": 10}, {"skipped_rows": [[0, 7]]})
    assert run_folder.read_changes(tmp_path)[-1] == {"generation": 2, "step": 10, "skipped_rows": [[0, 7]]}
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize(
    "line", [b'{"kind": "tr', b"\xff\xfe\n", b"[1]\n", b'{"step": "7"}\n', b'{"step": null}\n', b"\0\0\0\n"]
)
def test_damaged_records_are_dropped(tmp_path: Path, line: bytes) -> None:
    """Oracle: the records before it, and those written afterwards."""
    whole = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(whole).encode() + b"\n" + line)
    with (tmp_path / "terminal.txt").open("w") as terminal:
        report = Report(terminal, Records(tmp_path, print, 2), total_steps=3, first_step=2)
        report.record("train", 3, {"loss": 2.0, "tokens_per_s": 1.0, "step_s": 1.0})
        report.close()
    found = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [1, 2, 3]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["env.json", "ds_config.json"])
def test_proving_to_resume_names_a_damaged_file(tmp_path: Path, prepared: Prepared, name: str, damage: str) -> None:
    """Oracle: a sentence that names the file, before anything is launched."""
    run = tmp_path / "run"
    begin(run, prepared)
    files.write_json(run / "ds_config.json", {"zero_optimization": {"stage": 1}})
    (run / name).write_bytes(DAMAGE[damage]((run / name).read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{name} is missing or damaged"):
        prove_resume.prove(run, [], tmp_path / "scratch", lambda line: None)
    assert not (tmp_path / "scratch").exists()


def empty(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").write_bytes(b"")


def halve(tokenizer: Path) -> None:
    path = tokenizer / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_config(tokenizer: Path) -> None:
    (tokenizer / "tokenizer_config.json").unlink()


def remove(tokenizer: Path) -> None:
    tokenizer.rename(tokenizer.with_name("elsewhere"))


def edit(tokenizer: Path) -> None:
    path = tokenizer / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))


@pytest.mark.parametrize("damage", [empty, halve, remove_config, remove, edit])
def test_a_damaged_tokenizer_is_mended_from_the_data(
    tmp_path: Path, prepared: Prepared, damage: Callable[[Path], None]
) -> None:
    """Oracle: the prepared tokenizer's files, byte for byte; it is said where the run had checkpoints; a whole one is
    left alone.
    """
    run = tmp_path / "run"
    begin(run, prepared)
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert run_folder.mend_tokenizer(run, prepared.tokenizer_folder) == []
    damage(run / "tokenizer")
    [note] = run_folder.describe(run, RECIPE, {}, FACTS, prepared.tokenizer_folder)
    assert "copied anew from" in note
    for path in prepared.tokenizer_folder.iterdir():
        assert (run / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert run_folder.mend_tokenizer(run, prepared.tokenizer_folder) == []


def test_marks_of_killed_launches_do_not_hide_a_host(tmp_path: Path) -> None:
    """Two hosts with a folder each; on the second one's disk lies the mark of an older launch's rank 0.

    Oracle: both write.
    """
    meet = threading.Barrier(2)
    said: list[dict[int, Any]] = [{} for _ in range(8)]
    found: dict[int, list[int]] = {}

    def host(rank: int) -> None:
        place = iter(said)
        alone: Any = type("Host", (Control,), {"__init__": lambda self: None})()
        alone.rank, alone.leaders, alone.world_size = rank, [0, 1], 2
        alone.hosts = ["node1", "node2"]
        alone.barrier = meet.wait

        def gather(message: Any) -> list[Any]:
            here = next(place)
            here[rank] = message
            meet.wait()
            return [here[0], here[1]]

        alone.gather = gather
        alone.broadcast = lambda message, source: gather(message)[source]
        found[rank] = alone.writers(tmp_path / str(rank))

    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".host-0").touch()
    hosts = [threading.Thread(target=host, args=(rank,), daemon=True) for rank in (0, 1)]
    for one in hosts:
        one.start()
    for one in hosts:
        one.join(timeout=60)
    assert found == {0: [0, 1], 1: [0, 1]}


def test_a_link_in_place_of_a_temporary_is_not_followed(tmp_path: Path, prepared: Prepared) -> None:
    """Oracle: what the links lead to is untouched; the run folder is as without them."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    (tmp_path / "folder").mkdir()
    run.mkdir()
    for name in ("recipe.toml", "env.json", "ds_config.json", "changes.jsonl"):
        (run / f".{name}.tmp-{files.writer_name()}").symlink_to(victim)
    (run / ".tokenizer.tmp").symlink_to(tmp_path / "folder")
    begin(run, prepared)
    assert victim.read_text() == "precious" and not list((tmp_path / "folder").iterdir())


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path: Path) -> None:
    """Oracle: the place and the reason, for a folder that is yet to be made as well; nothing is left behind."""
    with pytest.raises(OSError, match=r"/proc"):
        files.refuse_unwritable(Path("/proc/run/x"))
    files.refuse_unwritable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_changes_of_a_resumed_recipe_are_recorded(tmp_path: Path) -> None:
    """What may change does, and is written down with the launch's number."""
    (tmp_path / "tokenizer").mkdir()
    run_folder.describe(tmp_path / "run", RECIPE, {}, {"generation": 1}, tmp_path / "tokenizer")
    longer = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"steps": 30})})
    run_folder.refuse_foreign(tmp_path / "run", longer, "auto", allow_change=False)
    run_folder.describe(tmp_path / "run", longer, {}, {"generation": 2}, tmp_path / "tokenizer")
    recorded = json.loads((tmp_path / "run" / "changes.jsonl").read_text())
    assert recorded == {"generation": 2, "step": 0, "changes": {"train.steps": [20, 30]}}
