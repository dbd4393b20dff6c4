"""`ds-slm init`: a recipe for one's own text."""

import json
import re
from pathlib import Path

import pytest

from ds_slm.cli.flags import token_count
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepare import prepare
from ds_slm.data.sources.documents import locate
from ds_slm.errors import ConfigError
from ds_slm.recipe import effects, loading
from ds_slm.train import unused_flags
from ds_slm.train.task import Options
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
    recipe = loading.load("mine.toml")
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
    assert printed["steps"] == loading.load("mine.toml").train.steps


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
    assert loading.load("mine.toml").model == loading.load("demo").model


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
    demo = loading.load("demo")
    write_run(Path("runs/demo"), loading.to_toml(demo))
    run(["init", "mine", "--from", "runs/demo", "--text", "texts"], monkeypatch)
    recipe, printed = loading.load("mine.toml"), capsys.readouterr().out

    assert recipe.model == demo.model
    assert (recipe.tokenizer.kind, recipe.tokenizer.path) == ("hf", "runs/demo/tokenizer")
    assert (recipe.tokenizer.vocab_size, recipe.tokenizer.eos_token) == (demo.tokenizer.vocab_size, "<|endoftext|>")
    assert "ds-slm train mine.toml --devices N --base runs/demo" in printed
    assert "tokens a parameter are usual" not in printed


def test_a_run_is_not_continued_into_itself(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new recipe's run folder would be the one whose weights it begins with; nothing is written."""
    write_run(Path("runs/mine"), loading.to_toml(loading.load("demo")))
    assert "choose another" in refused(["init", "mine", "--from", "runs/mine", "--text", "texts"], monkeypatch, capsys)
    assert not Path("mine.toml").exists()


def refused_late(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a text that was read first: stdout has a line of progress by then."""
    from ds_slm.cli import main

    monkeypatch.setattr("sys.argv", ["ds-slm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_text_in_the_wrong_place_names_the_flags_of_init(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each way out is a flag that `ds-slm init --help` lists, never one of `train` or `prepare`."""
    Path("empty").mkdir()
    Path("rows.jsonl").write_text('{"body": "some text"}\n', encoding="utf-8")
    no_file = refused_late(["init", "mine", "--text", "empty"], monkeypatch, capsys)
    no_column = refused_late(["init", "mine", "--text", "rows.jsonl"], monkeypatch, capsys)

    assert "no file of a known kind" in no_file and "with --text" in no_file
    assert "'body'; name one of them with --column" in no_column
    assert "--source" not in no_file + no_column and "--set" not in no_file + no_column


def test_what_is_left_out_of_a_folder_is_said(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As preparing says it."""
    (texts / "notes.pdf").write_text("not read", encoding="utf-8")
    run(["init", "mine", "--text", "texts"], monkeypatch)
    assert "1 of no known kind: notes.pdf" in capsys.readouterr().out


def test_a_title_that_sounds_like_a_split_leaves_no_text_out(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: all four documents are surveyed, and read again when they are prepared; it is said which."""
    (texts / "training.txt").write_text(words(30_000, 9), encoding="utf-8")
    run(["init", "mine", "--text", "texts"], monkeypatch)
    printed = capsys.readouterr().out
    assert "texts: reads 0.txt, 1.txt, 2.txt, training.txt\n" in printed and "texts: 4 documents" in printed
    (source,) = loading.load("mine.toml").data.source
    assert [path.name for path in locate(source).files] == ["0.txt", "1.txt", "2.txt", "training.txt"]


def test_files_of_a_split_are_still_told_apart(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: by hand: where a file is named for held-out text, it is not trained on; what is left out is said."""
    (texts / "training.txt").write_text(words(100_000, 9), encoding="utf-8")
    (texts / "test.txt").write_text(words(30_000, 8), encoding="utf-8")
    run(["init", "mine", "--text", "texts"], monkeypatch)
    printed = capsys.readouterr().out
    assert "warning: 3 files are named for no split, and left out" in printed
    assert "reads training.txt (1 of 5 files)" in printed and "1 of another split: test.txt" in printed
    assert loading.load("mine.toml").data.source[0].split == "train"


@pytest.mark.parametrize("refused_base", ["slm-10m", "gpt-s-1.4m"])
def test_text_that_is_too_little_for_a_base_names_one_that_takes_it(
    texts: Path, refused_base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same command with the recipe that is named writes the recipe."""
    said = refused_late(["init", "mine", "--from", refused_base, "--text", "texts"], monkeypatch, capsys)
    named = re.search(r"--from (\S+) takes it: ([\d,]+) steps", said)
    assert named and named[1] != refused_base
    run(["init", "mine", "--from", named[1], "--text", "texts"], monkeypatch)
    assert f"{loading.load('mine.toml').train.steps:,}" == named[2]


def test_hardly_any_text_names_no_recipe(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None would take it."""
    Path("note.txt").write_text(words(300), encoding="utf-8")
    said = refused_late(["init", "mine", "--text", "note.txt"], monkeypatch, capsys)
    assert "takes so little: add text" in said and "--from" not in said


def test_how_much_is_held_out_is_said(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole documents, a third of the text where there are three, is worth a warning; one document is cut."""
    run(["init", "mine", "--text", "texts"], monkeypatch)
    assert "warning: held out: 1 of 3 documents, 33." in capsys.readouterr().out
    Path("single.txt").write_text(words(100_000), encoding="utf-8")
    run(["init", "single", "--text", "single.txt"], monkeypatch)
    assert "held out: the last 2.0% of the only document" in capsys.readouterr().out


def test_a_name_may_be_typed_with_its_suffix(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`init mine.toml` writes mine.toml; `mine` alone is not a recipe, and the file beside it is named."""
    run(["init", "mine.toml", "--text", "texts"], monkeypatch)
    capsys.readouterr()
    assert Path("mine.toml").is_file() and loading.load("mine.toml").card.name == "mine"
    assert "a file mine.toml: name that one" in refused(["plan", "mine"], monkeypatch, capsys)


@pytest.mark.parametrize("again", [False, True])
def test_the_recipe_trains_without_a_warning(texts: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: none of the lines that a launch on one host prints as warnings; from the library, and from its run."""
    for number in range(12):  # so that one of them is a small share, of fewer rows than the demo evaluates
        (texts / f"{number}.txt").write_text(words(8_000, number), encoding="utf-8")
    run(["init", "mine", "--text", "texts"], monkeypatch)
    if again:  # what a run records holds every key
        recipe = loading.load("mine.toml")
        write_run(Path("runs/mine"), loading.to_toml(recipe))
        prepare(recipe, Path("data"), report=lambda line: None).tokenizer_folder.rename("runs/mine/tokenizer")
        run(["init", "more", "--from", "runs/mine", "--text", "texts"], monkeypatch)

    recipe = loading.load("more.toml" if again else "mine.toml")
    rows = PretrainRows(recipe, prepare(recipe, Path("fresh"), report=lambda line: None))
    held_out = len(rows.val_row_ids(None))
    assert held_out < loading.load("demo").run.eval_rows
    options = Options(run_dir=Path("runs/more"), ds_config=Path("zero1.json"))
    assert effects.warnings(recipe) == []
    assert list(unused_flags.warnings(recipe, options, 1, keeping_hosts=1, held_out_rows=held_out)) == []
    assert rows.warnings() == [] and "runs out" in rows.notes()[0]
