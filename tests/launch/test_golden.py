"""What earlier code has written is read, resumed and exported by this code as if nothing had changed.

Oracle of every test: the artefacts in tests/golden/made, and the hashes and records that were written down when that
earlier code made them (tests/golden/make.py).
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.cli import main
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepare import prepare
from ds_slm.data.shards.prepared import Prepared, verify
from ds_slm.errors import DataError
from ds_slm.publish.models import open_model
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.schema import Recipe
from ds_slm.run import ledger
from sft.prepare import prepare_conversations
from sft.rows import ConversationRows
from tests.golden import facts
from tests.support import runs, tolerances

EXPECTED = json.loads((facts.MADE / facts.EXPECTED).read_text())
RECIPES = (facts.PRETRAINING, facts.FINE_TUNING)
KINDS = ("embedded", "builtin")
"""Every word by which recipes have named the text of the machine's installation, the first one first."""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artefacts, and the folder that a user's commands run in."""
    folder = shutil.copytree(facts.MADE, tmp_path / "made")
    monkeypatch.chdir(folder)
    return folder


def ds_slm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["ds-slm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert not ended.value.code


def open_data(name: str, recipe: Recipe, said: list[str]) -> Prepared:
    """What a launch does with the data of a recipe, which are there already."""
    if name == facts.FINE_TUNING:
        return prepare_conversations(recipe, Path(facts.DATA) / name, Path(facts.RUN, "tokenizer"), report=said.append)
    return prepare(recipe, Path(facts.DATA) / name, report=said.append)


def states_of_files(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Inode, time of change and content of every file that is not hidden: equal where none was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_the_artefacts_are_as_they_were_made() -> None:
    """A change of the code that edits them, or a checkout that does, proves nothing."""
    found = facts.file_hashes(facts.MADE)
    assert found.pop(facts.EXPECTED)
    assert found == EXPECTED["files"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_hash_it_had(workspace: Path, name: str, kind: str) -> None:
    """Under whichever word the kind of its source is named."""
    text = (workspace / f"{name}.toml").read_text()
    assert text.count(f'kind = "{KINDS[0]}"') == 1
    recipe = loading.parse(text.replace(f'kind = "{KINDS[0]}"', f'kind = "{kind}"'))
    assert recipe.identity_sha256() == EXPECTED["recipes"][name]


def test_a_run_may_go_on_with_its_recipe(workspace: Path) -> None:
    """What the run has recorded is the recipe it was launched with: no field differs."""
    recorded, recipe = loading.load_recorded(workspace / facts.RUN), loading.load(f"{facts.PRETRAINING}.toml")
    assert recorded.identity_sha256() == EXPECTED["recipes"][facts.PRETRAINING]
    assert resume_rules.changes(recorded, recipe) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_prepared_data_are_used_as_they_are(workspace: Path, name: str, kind: str) -> None:
    """No file is written, every shard is whole, and the same rows are drawn in the same order and hold the same."""
    text = (workspace / f"{name}.toml").read_text()
    recipe = loading.parse(text.replace(f'kind = "{KINDS[0]}"', f'kind = "{kind}"'))
    before, said = states_of_files(workspace / facts.DATA), []
    prepared = open_data(name, recipe, said)
    assert states_of_files(workspace / facts.DATA) == before, said
    verify(prepared)
    rows = ConversationRows(recipe, prepared) if recipe.sft else PretrainRows(recipe, prepared)
    assert facts.of_data(prepared, rows) == EXPECTED["data"][name]


@pytest.mark.parametrize("name", RECIPES)
def test_prepared_data_of_another_recipe_are_refused(workspace: Path, name: str) -> None:
    """So that using them as they are does not come from comparing nothing."""
    recipe = loading.load(f"{name}.toml", ["data.split_seed=1"])
    with pytest.raises(DataError, match=r"belongs to another recipe \(data.split_seed was 0, is 1\)"):
        open_data(name, recipe, [])


def test_checkpoints_verify(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ds-slm verify` as a user runs it."""
    ds_slm(monkeypatch, "verify", facts.RUN)
    assert capsys.readouterr().out.splitlines() == [f"step-{step:08d}: whole" for step in facts.SAVED_STEPS]


@pytest.mark.parametrize("step", facts.SAVED_STEPS)
def test_tensors_are_read_as_they_were_saved(workspace: Path, step: int) -> None:
    """Names, shapes and every bit of weights and moments."""
    assert facts.of_checkpoint(workspace / facts.RUN, step) == EXPECTED["checkpoints"][str(step)]


@pytest.mark.parametrize("name", [facts.RUN, facts.EXPORT])
def test_a_model_has_the_hash_it_had(workspace: Path, name: str) -> None:
    """A fine-tuning remembers its base by it."""
    assert open_model(workspace / name).sha256 == EXPECTED["models"][name]


def test_an_export_has_the_same_bytes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of it but the model card, which came later: none names a version of ds_slm or of a library."""
    ds_slm(monkeypatch, "export", facts.RUN, "--out", "again")
    found, expected = workspace / "again", workspace / facts.EXPORT
    card = {path.name for path in found.iterdir() if path.suffix in (".md", ".png")}
    assert {path.name for path in found.iterdir()} - card == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_exports_have_the_same_bytes(workspace: Path) -> None:
    """In bf16, and with the chat template of an assistant."""
    chat_tokenizer = workspace / facts.DATA / facts.FINE_TUNING / "tokenizer"
    recipe = loading.load_recorded(workspace / facts.RUN)
    assert facts.of_exports(workspace / facts.RUN, recipe, chat_tokenizer, workspace) == EXPECTED["exports"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, resumed to its end by the real launcher on as many ranks."""
    folder = shutil.copytree(facts.MADE, tmp_path_factory.mktemp("golden") / "made")
    arguments = ("--recipe", f"{facts.PRETRAINING}.toml", "--run-dir", facts.RUN, "--resume", "must")
    done = runs.run(runs.deepspeed_command(facts.RANKS, *arguments, "--micro-batch", 2), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed at step {facts.SAVED_STEPS[-1]}" in done.stdout
    return folder / facts.RUN


def test_a_resumed_run_goes_on_as_if_never_stopped(resumed: Path) -> None:
    """The same rows at every step, and the same losses and norms but for what another CPU rounds otherwise."""
    found, expected = runs.records(resumed), EXPECTED["undisturbed"]["train"]
    assert [[one[key] for key in ("step", "tokens", "ledger")] for one in found] == [
        [one[key] for key in ("step", "tokens", "ledger")] for one in expected
    ]
    assert [one["lr"] for one in found] == pytest.approx([one["lr"] for one in expected], rel=1e-12)
    assert tolerances.excess(found, expected, "fp32") < 1
    for kind in ("val", "eval"):
        losses = [one["loss"] for one in EXPECTED["undisturbed"][kind]]
        bound = tolerances.TOPOLOGIES["fp32"].loss
        assert [one["loss"] for one in runs.records(resumed, kind)] == pytest.approx(losses, rel=bound)


def test_a_resumed_run_keeps_what_it_had(resumed: Path) -> None:
    """Its recipe, its earlier records byte for byte, the ledger they hold, and the rows that were to be left out."""
    before = facts.MADE / facts.RUN
    assert resume_rules.changes(loading.load_recorded(before), loading.load_recorded(resumed)) == {}
    assert (resumed / "metrics.jsonl").read_bytes().startswith((before / "metrics.jsonl").read_bytes())
    compared = ledger.compare(ledger.read(resumed), ledger.read(before))
    assert (compared.same_until_step, compared.differ_at_step) == (facts.SAVED_STEPS[-1], None)
    assert (resumed / "changes.jsonl").read_bytes() == (before / "changes.jsonl").read_bytes()
    for path in (before / "tokenizer").iterdir():
        assert (resumed / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    found, old = (json.loads((folder / "env.json").read_text()) for folder in (resumed, before))
    assert found.keys() >= old.keys()
    assert found["generation"] == old["generation"] + 1
    kept = ("recipe_sha256", "data_sha256", "tokenizer_sha256", "skipped_rows", "world_size", "zero_stage", "precision")
    assert {key: found[key] for key in kept} == {key: old[key] for key in kept}


def test_a_resumed_run_ends_with_the_same_files(resumed: Path) -> None:
    """What done.json and the last checkpoint say, but for losses; and the configuration that DeepSpeed got."""
    state = checkpoint_files.read_state(checkpoint_files.folder_of_step(resumed, facts.STEPS))
    done = json.loads((resumed / "done.json").read_text())
    for found, expected in ((state, EXPECTED["undisturbed"]["state"]), (done, EXPECTED["undisturbed"]["done"])):
        assert found.keys() >= expected.keys()
        of_this_machine = {"held_by", "checkpoint_sha256"}  # its name, and its rounding
        exact = [key for key, value in expected.items() if not isinstance(value, float) and key not in of_this_machine]
        assert {"recipe_sha256", "data_sha256", "tokenizer_sha256", "step"} <= set(exact)
        assert {key: found[key] for key in exact} == {key: expected[key] for key in exact}
    assert (resumed / "ds_config.json").read_bytes() == (facts.MADE / facts.RUN / "ds_config.json").read_bytes()
