"""`ds-slm init`: a recipe for one's own text."""

import json
from pathlib import Path

import pytest

from ds_slm.cli.flags import token_count
from ds_slm.errors import ConfigError
from ds_slm.recipe import schema
from tests.unit.cli.test_main import refused
from tests.unit.data.test_survey import words


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three files; the command runs beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(words(30_000, number), encoding="utf-8")
    return folder


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, in this process."""
    from ds_slm.cli import main

    monkeypatch.setattr("sys.argv", ["ds-slm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 0


def test_writes_a_recipe_and_says_what_follows(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe is read as any other; its three commands are in the output."""
    run(["init", "mine", "--text", "texts"], monkeypatch)
    recipe = schema.load("mine.toml")
    printed = capsys.readouterr().out

    assert (recipe.card.name, recipe.data.source[0].path) == ("mine", "texts")
    assert "ds-slm train mine.toml" in printed
    assert f"{recipe.train.steps:,} steps" in printed
    assert "3 documents" in Path("mine.toml").read_text(encoding="utf-8")


def test_json_says_the_same(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stdout."""
    run(["init", "mine", "--text", "texts", "--tokens", "500k", "--json"], monkeypatch)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["documents"], printed["tokens"]) == (3, 500_000)
    assert printed["steps"] == schema.load("mine.toml").train.steps


def test_refuses_what_cannot_be_all_at_once(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is none, a base that fine-tunes, a folder that is not there; nothing is written."""
    said = refused(["init", "My Model", "--from", "demo-instruct", "--text", "nowhere"], monkeypatch, capsys)
    assert "'My Model'" in said
    assert "demo-instruct fine-tunes" in said
    assert "nowhere does not exist" in said

    said = refused(["init", "slm-10m", "--text", "texts"], monkeypatch, capsys)
    assert "is a recipe of the library" in said
    assert list(texts.parent.glob("*.toml")) == []


def test_a_name_that_is_not_utf_8_is_refused(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any text is read."""
    assert "not UTF-8" in refused(["init", "mine", "--text", "texts", "--column", "\udcff"], monkeypatch, capsys)


def test_a_base_is_quoted(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may hold what TOML would read as the end of its string."""
    Path('q"b.toml').write_text('base = "demo"\n[card]\nname = "b"\n', encoding="utf-8")
    run(["init", "mine", "--text", "texts", "--from", 'q"b.toml'], monkeypatch)
    assert schema.load("mine.toml").model == schema.load("demo").model


def test_never_replaces_a_file(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that was edited is somebody's work."""
    Path("mine.toml").write_text("mine", encoding="utf-8")
    assert "exists already" in refused(["init", "mine", "--text", "texts"], monkeypatch, capsys)
    assert Path("mine.toml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("typed", "count"), [("300M", 300_000_000), ("1.5B", 1_500_000_000), ("500k", 500_000), ("12_000", 12_000)]
)
def test_reads_numbers_of_tokens(typed: str, count: int) -> None:
    """As people write them."""
    assert token_count(typed) == count


@pytest.mark.parametrize("typed", ["", "many", "-3M", "0", "3T", "1e6", "9" * 400 + "B", "9999999999B"])
def test_refuses_what_is_no_number_of_tokens(typed: str) -> None:
    """With an example."""
    with pytest.raises(ConfigError, match="300M"):
        token_count(typed)


def write_run(folder: Path, text: str) -> Path:
    """What `init` reads of a run: its recipe."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return folder


def test_a_run_is_continued_in_its_own_tokenizer(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run's shape, its tokenizer's folder in place of one that is trained, and the flag of the launch."""
    demo = schema.load("demo")
    write_run(Path("runs/demo"), schema.to_toml(demo))
    run(["init", "mine", "--from", "runs/demo", "--text", "texts"], monkeypatch)
    recipe, printed = schema.load("mine.toml"), capsys.readouterr().out

    assert recipe.model == demo.model
    assert (recipe.tokenizer.kind, recipe.tokenizer.path) == ("hf", "runs/demo/tokenizer")
    assert (recipe.tokenizer.vocab_size, recipe.tokenizer.eos_token) == (demo.tokenizer.vocab_size, "<|endoftext|>")
    assert "ds-slm train mine.toml --devices N --base runs/demo" in printed
    assert "tokens a parameter are usual" not in printed


def test_a_run_is_not_continued_into_itself(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new recipe's run folder would be the one whose weights it begins with; nothing is written."""
    write_run(Path("runs/mine"), schema.to_toml(schema.load("demo")))
    assert "choose another" in refused(["init", "mine", "--from", "runs/mine", "--text", "texts"], monkeypatch, capsys)
    assert not Path("mine.toml").exists()
