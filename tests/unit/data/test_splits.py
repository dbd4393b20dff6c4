"""Which files of a folder are read: those of the wanted split, as `datasets` takes them from a repository."""

import io
import json
import os
import random
from pathlib import Path, PurePath

import numpy as np
import pytest

from ds_slm.data.shards.prepared import open_prepared
from ds_slm.data.sources.documents import locate
from ds_slm.data.sources.splits import UnclearSplit, are_titles, choose
from ds_slm.errors import DataError, run_program
from ds_slm.recipe.data_sections import Source
from tests.support import data_recipes
from tests.support.data_recipes import texts, write_jsonl
from tests.support.source_files import files_source


def read(names: list[str], split: str = "train") -> list[str]:
    """The names, without suffixes, that are read."""
    return [names[place] for place in choose([PurePath(name) for name in names], split).read]


HELD_OUT = [
    *("valid", "val", "validation", "dev", "eval", "evaluation", "test", "testing", "heldout", "held-out", "held_out"),
    *("holdout", "hold out", "VALID", "Test", "testset", "val_data", "test-00000-of-00010", "validation_0001", "dev2k"),
    *("wiki.test.tokens", "xy_dev", "c4-validation.00000-of-00008", "data.val", "my held out set", "a(test)", "1test2"),
    *(
        "validation/1",
        "data/test/a",
        "split=test/0",
        "TEST/x",
        "corpus-dev/deep/er/1",
        "val.d/x",
        "data/val-00000-of-1",
    ),
    *("testsplit", "validSplit", "evalData", "TestSet", "testA", "eng.testb", "DEVSET", "wikiTest", "en.val2014"),
    *("tests", "evals/x", "devel", "validations", "tst", "en-de.tst2013", "newstest2016", "newsdev2016", "val2"),
    *("validate", "validate_1", "development", "unseen", "blind", "evaluate/1", "x.test", "validation_matched"),
    *("train/valid", "train_dev", "dev.train", "test/story of training", "train/test/0", "train_test/1"),
]
OF_TRAIN = [
    *("train", "training", "TRAIN", "train-00000-of-00010", "wiki.train.tokens", "xy_train", "c4-train.00000-of-00008"),
    *("train/a", "data/train/1", "split=train/0", "training/b/c", "Train (2)", "trainset", "train_data", "dev/train"),
    *("train/how to test", "data/train-00001-of-00002", "training_0001"),
    *("trainsplit", "trainSplit", "TrainSet", "trn", "en.train2014", "trainData"),
]
TITLES = ["testimonials", "developer", "validated_books", "latest", "devotional", "attest/a", "pretrain", "evaluated"]
TITLES += [
    "contest",
    "contest2016",
    "valley",
    "DevOps",
    "protest-1999",
    "WikiText",
    "web-development",
    "validate-your-ideas",
]
TITLES += ["blind-people", "greatest", "interval", "trains", "deva", "unseen-worlds", "Testament"]


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_file_of_another_split_is_not_read(name: str) -> None:
    """Oracle: names of public data sets, sorted by hand: beside a training file, and beside files of no split."""
    assert read(["train", name]) == ["train"]
    assert read(["one", name, "two"]) == ["one", "two"]


@pytest.mark.parametrize("name", OF_TRAIN)
def test_a_file_of_the_training_split_is_read(name: str) -> None:
    """Oracle: names of public data sets, sorted by hand; files of no split are left out then, as the hub's are."""
    assert read(["validation", name, "readme"]) == [name]


@pytest.mark.parametrize("name", TITLES)
def test_a_word_that_only_begins_like_a_split_is_a_title(name: str) -> None:
    """Oracle: English."""
    assert read([name, "valid"]) == [name]
    assert read(["train", "test", name]) == ["train"]


SFT_SHARDS = ["data/train_sft-00000-of-00002", "data/test_sft-00000-of-00001"]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a", "b/c"], "train", ["a", "b/c"]),
        (["a", "b/c"], "validation", ["a", "b/c"]),
        (["train", "valid", "extra"], "all", ["train", "valid", "extra"]),
        (["train", "valid"], "validation", ["valid"]),
        (["train", "dev"], "val", ["dev"]),
        (["train", "held_out_1"], "heldout", ["held_out_1"]),
        (SFT_SHARDS, "train_sft", SFT_SHARDS[:1]),
        (["train", "test"], "train_sft", ["train"]),
        (["data/train-00000-of-00001", "original/train", "train"], "train", ["data/train-00000-of-00001"]),
        (["en", "fr", "train"], "en", ["en"]),
    ],
)
def test_the_split_that_is_wanted(names: list[str], split: str, expected: list[str]) -> None:
    """Oracle: by hand; where no file names a split, all are read."""
    assert read(names, split) == expected


@pytest.mark.parametrize(
    ("names", "split", "reason"),
    [
        (["test_a", "test_b"], "train", "named for test, and none for 'train'"),
        (["test/a", "validation/b"], "train", "named for test, validation, and none for 'train'"),
        (["train", "other"], "validation", "named for train, and none for 'validation'"),
        (SFT_SHARDS, "train", "named for test_sft, train_sft, and none for 'train'"),
        (["strength-training", *(f"title-{letter * 3}" for letter in "abcdefghijk")], "train", "nobody can tell"),
    ],
)
def test_what_the_names_do_not_tell_is_refused(names: list[str], split: str, reason: str) -> None:
    """Oracle: never nothing, never everything: an error that says what the names are."""
    with pytest.raises(UnclearSplit, match=reason):
        read(names, split)


def tree(folder: Path, seed: int) -> list[str]:
    """Files with made-up names, some of them named for splits; returns their paths below the folder."""
    rng = random.Random(seed)
    words = [
        "train",
        "training",
        "valid",
        "validation",
        "val",
        "dev",
        "test",
        "testing",
        "eval",
        "wiki",
        "latest",
        "en",
    ]
    within = rng.choice(["", "data", "deep/er"])
    names = {
        f"{rng.choice(['', 'c4-', 'my.', 'x_', '7'])}{rng.choice(words)}{rng.choice(['', '_1', '.tokens', ' 2'])}.jsonl"
        for _ in range(4)
    }
    if rng.random() < 0.4:
        names = {f"{rng.choice(words)}{rng.choice(['', '-set'])}/{name}" for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    paths = sorted(str(PurePath(within, name)) for name in names)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"text": "a"}\n')
    return paths


def test_a_folder_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    """Oracle: `datasets`: the files of its training split, in each of many folders that have one."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    compared = 0
    for seed in range(16):
        folder = tmp_path / f"dev {seed}"
        paths = tree(folder, seed)
        patterns = get_data_patterns(str(folder)).get("train", [])
        if patterns in ([], ["**"]):
            continue
        theirs: set[str] = set()
        for pattern in patterns:
            try:
                theirs |= {str(Path(path).relative_to(folder)) for path in resolve_pattern(pattern, str(folder))}
            except FileNotFoundError:
                continue
        ours = {str(path.relative_to(folder)) for path in locate(files_source(folder)).files}
        assert ours == theirs, paths
        compared += 1
    assert compared > 5


def test_every_kind_of_file_is_chosen_by_its_name(tmp_path: Path) -> None:
    """Oracle: text of two kinds and token ids; what the folder itself is called, and the folders above it, say nothing;
    one file that is named itself is read whatever its name.
    """
    for suffix in (".jsonl", ".jsonl.gz", ".JSONL.zst", ".txt", ".parquet", ".bin"):
        root = tmp_path / f"dev{suffix}" / "test"
        for name in ("train/0", "valid/0", "a.test"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}{suffix}").write_bytes(b"12")
        (root / "README.md").write_text("for training and test")
        place = locate(files_source(root))
        assert [path.relative_to(root).parts[0] for path in place.files] == ["train"]
        assert {path.name for path in place.ignored} == {f"0{suffix}", f"a.test{suffix}", "README.md"}
        alone = locate(files_source(root / f"a.test{suffix}"))
        assert [path.name for path in alone.files] == [f"a.test{suffix}"] and not alone.ignored


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    """Oracle: the hash of the training file's content alone; what is left out is told at every launch and kept."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts(300, seed=1))
    alone = data_recipes.prepare(data_recipes.recipe(data_recipes.source("made", path=folder)), tmp_path / "alone")
    write_jsonl(folder / "valid.jsonl", texts(100, seed=2))
    told: list[str] = []
    recipe = data_recipes.recipe(data_recipes.source("made", path=folder))
    both = data_recipes.prepare(recipe, tmp_path / "both", report=told.append)
    assert both.sha256 == alone.sha256
    left_out = "left out: 1 of another split: valid.jsonl"
    assert f"made: reads train.jsonl (1 of 2 files), those of split 'train'; {left_out}" in told
    assert both.manifests["made"]["left_out"] == {"another split": ["valid.jsonl"], "no split": []}
    told.clear()
    data_recipes.prepare(recipe, tmp_path / "both", report=told.append)
    assert told == ["made: left out when it was prepared: 1 of another split: valid.jsonl"]


def test_token_files_of_another_split_are_not_trained_on(tmp_path: Path) -> None:
    """Oracle: ids of the training file alone."""
    folder = tmp_path / "ids"
    folder.mkdir()
    (np.arange(5_000) % 90 + 10).astype("<u2").tofile(folder / "train.bin")
    np.full(5_000, 7, "<u2").tofile(folder / "val.bin")
    letters = data_recipes.character_folder(tmp_path / "letters", "".join(map(chr, range(33, 143))))
    tokenizer = f'kind = "hf"\nvocab_size = 110\npath = "{letters}"\neos_token = "!"\npad_token = "!"'
    recipe = data_recipes.recipe(data_recipes.source("ids", kind="tokens", path=folder), tokenizer=tokenizer)
    prepared = data_recipes.prepare(recipe, tmp_path / "data")
    assert 7 not in prepared.tokens("train")[0][:] and 7 not in prepared.tokens("val")[0][:]


def test_a_name_as_of_held_out_data_is_not_hidden_behind_others(tmp_path: Path) -> None:
    """Oracle: the line that says what is read: names that nobody can tell come first, all of them are counted."""
    for name in [f"part-{number}" for number in range(9)] + ["wikival"]:
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    told = {locate(files_source(tmp_path)).tell(split) or "" for split in ("train", "all")}
    assert [line[:33] for line in told] == ["reads wikival.jsonl, part-0.jsonl"]
    for number in range(7):
        (tmp_path / f"interval-{number}.jsonl").write_text('{"text": "a"}\n')
    assert "and 12 more, 8 with names as of held-out data" in (locate(files_source(tmp_path)).tell("train") or "")


def test_data_of_a_version_that_knew_fewer_names_can_be_used(tmp_path: Path) -> None:
    """Oracle: a warning with the name at every launch, and the same shards; a file of another size is refused."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = [write_jsonl(folder / f"{name}.jsonl", texts(50, seed=seed)) for seed, name in enumerate(("a", "newstest"))]
    recipe = data_recipes.recipe(data_recipes.source("made", path=folder))
    prepared = data_recipes.prepare(recipe, tmp_path / "data")
    path = prepared.folder / "made" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = [[file.name, file.stat().st_size] for file in files]
    path.write_text(json.dumps(manifest | {"left_out": {}}))
    told: list[str] = []
    assert data_recipes.prepare(recipe, tmp_path / "data", report=told.append).sha256 == prepared.sha256
    assert len(told) == 1 and "'train' as well: newstest.jsonl;" in told[0]
    write_jsonl(folder / "newstest.jsonl", texts(51, seed=1))
    with pytest.raises(DataError, match="other local files"):
        data_recipes.prepare(recipe, tmp_path / "data")


def as_older_version(folder: Path, source: Source, split_files: list[Path]) -> None:
    """Let a source's manifest be one of a version that read these files."""
    path = folder / source.name / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["left_out"]
    manifest["files"] = [[file.name, file.stat().st_size] for file in split_files]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("text_is_there", [True, False])
def test_what_an_older_version_prepared_does_not_pass_in_silence(text_is_there: bool, tmp_path: Path) -> None:
    """Oracle: a warning with the names at every launch; other files are refused as ever."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = [
        write_jsonl(folder / f"{name}.jsonl", texts(50, seed=seed)) for seed, name in enumerate(("train", "valid"))
    ]
    recipe = data_recipes.recipe(data_recipes.source("made", path=folder))
    prepared = data_recipes.prepare(recipe, tmp_path / "data")
    as_older_version(prepared.folder, recipe.data.source[0], files)
    if not text_is_there:
        folder.rename(tmp_path / "away")
    told: list[str] = []
    again = data_recipes.prepare(recipe, tmp_path / "data", report=told.append)
    assert again.sha256 == prepared.sha256
    (warning,) = told
    assert "older version" in warning and "'train' as well: valid.jsonl;" in warning
    if text_is_there:
        write_jsonl(folder / "valid.jsonl", texts(51, seed=1))
        with pytest.raises(DataError, match="other local files"):
            data_recipes.prepare(recipe, tmp_path / "data")


def test_pointers_that_an_older_version_prepared_do_not_pass_in_silence(tmp_path: Path) -> None:
    """Oracle: a warning that names the file, at every launch: its size is what it was when it was taken for text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = [folder / name for name in ("a.jsonl", "b.txt")]
    write_jsonl(files[0], texts(100))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 4211\n"
    files[1].write_text("x" * len(pointer))
    recipe = data_recipes.recipe(data_recipes.source("made", path=folder))
    prepared = data_recipes.prepare(recipe, tmp_path / "data")
    as_older_version(prepared.folder, recipe.data.source[0], files)
    times = files[1].stat()
    files[1].write_text(pointer)
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    told: list[str] = []
    data_recipes.prepare(recipe, tmp_path / "data", report=told.append)
    (warning,) = told
    assert f"took for text what is none: {files[1]} cannot be read" in warning and "git lfs pull" in warning


def test_hundreds_of_files_are_told_in_one_short_line(tmp_path: Path) -> None:
    """Oracle: the line's length, and the count; every name is in the manifest."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number, text in enumerate(texts(300)):
        (folder / f"a-long-name-of-a-file-{number:05}.txt").write_text(text)
    recipe = data_recipes.recipe(data_recipes.source("made", path="nowhere"))
    for _ in range(2):
        told: list[str] = []
        prepared = data_recipes.prepare(recipe, tmp_path / "data", sources={"made": folder}, report=told.append)
        (line,) = [line for line in told if "and 295 more" in line]
        assert len(line) < 300
    assert len(prepared.manifests["made"]["files"]) == 300


def test_file_names_of_any_bytes_are_told(tmp_path: Path) -> None:
    """Oracle: lines that can be printed: neither half a character nor an escape sequence is in them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate([b"caf\xe9.jsonl", b"red\x1b[31m\n.jsonl", b"\xff-test.jsonl"]):
        write_jsonl(Path(str(folder) + "/" + name.decode("utf-8", "surrogateescape")), texts(50, seed=number))
    recipe = data_recipes.recipe(data_recipes.source("made", path="nowhere"))
    for _ in range(2):
        told: list[str] = []
        data_recipes.prepare(recipe, tmp_path / "data", sources={"made": folder}, report=told.append)
        assert all(line.encode().isascii() and line.isprintable() for line in told)
        assert any(r"caf\xe9.jsonl" in line and r"red\x1b[31m\n.jsonl" in line for line in told)
        assert any(r"1 of another split: \xff-test.jsonl" in line for line in told)
    assert open_prepared(recipe, tmp_path / "data" / "made").train_tokens


def test_any_name_can_be_printed_whatever_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a program whose output is ASCII prints every letter it has not as its number, and does not fail."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert run_program(lambda: print("caf\udce9 é 日")) == 0
    assert written.getvalue() == rb"caf\udce9 \xe9 \u65e5" + b"\n"


def test_one_problem_for_each_of_many_files_is_told_in_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the count of lines; a program that asks for them still gets all."""
    problems = [f"{number}.jsonl is damaged" for number in range(2_000)]

    def fail() -> None:
        raise DataError(problems)

    assert run_program(fail) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1].strip() == "and 1,980 more"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cooking.txt", "training.txt"], True),
        (["poems/a.txt", "strength-training.txt"], True),
        (["cooking.txt", "training.txt", "testing.txt"], False),
        (["train-00000.txt", "LICENSE.txt"], False),
        (["training.txt", "wikival.txt"], False),
        (["a.txt", "b.txt"], False),
        (["train/a.txt", "notes.txt"], False),
        (["train.jsonl", "metadata.jsonl"], False),
    ],
)
def test_titles_that_sound_like_the_training_split(names: list[str], expected: bool) -> None:
    """Oracle: by hand: text files of which none is held out; a split's folder and files of rows are no titles."""
    assert are_titles([PurePath(name) for name in names]) is expected
