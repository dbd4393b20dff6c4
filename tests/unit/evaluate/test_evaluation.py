"""Tasks by name, and what is asked of them."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset

from ds_slm import evaluate as package
from ds_slm.data.sources import hub
from ds_slm.errors import DataError
from ds_slm.evaluate import evaluation
from ds_slm.evaluate.benchmarks import BENCHMARKS, MMLU, find_rows
from ds_slm.recipe import loading
from tests.support.benchmark_files import ROWS


def test_card_is_what_the_recipe_publishes() -> None:
    """Oracle: the tasks of Ant-10M's card, in its order, ArithMark's parts once; else what all cards score."""
    names = evaluation.chosen_tasks(["card"], loading.load("ant-10m"))
    expected = "arc_challenge arc_easy piqa winogrande mmlu sciq boolq hellaswag wikitext arithmark2"
    assert names == expected.split()
    assert evaluation.chosen_tasks(["card"], None) == list(evaluation.ALL_TASKS)
    assert evaluation.chosen_tasks(["leaderboard", "piqa", "x"], None) == [*evaluation.LEADERBOARD, "x"]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    """Oracle: three tasks that cannot be scored, three sentences."""
    with pytest.raises(DataError) as raised:
        evaluation.prepare(["piqa", "arithmark2", "hella"], tmp_path, lambda line: None)
    told = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 3 and "piqa: " in told and "arithmark2: " in told and "hellaswag?" in told


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A hub at a port where nobody listens; gives the waits of its libraries between tries, which are not slept."""
    waits_s: list[float] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits_s.append)
    hub.unreachable.cache_clear()
    yield waits_s
    hub.unreachable.cache_clear()


def test_a_hub_out_of_reach_is_told_at_once(no_hub: list[float]) -> None:
    """Oracle: one request is tried again, for all tasks; a sentence names the host, tasks, datasets and the way out."""
    with pytest.raises(DataError) as raised:
        evaluation.prepare(["sciq", "mmlu", "hella", "boolq"], None, lambda line: None)
    assert no_hub == [1.0]
    named, told = raised.value.problems
    assert "hellaswag?" in named
    for part in ("sciq, mmlu_abstract_algebra, boolq: ", "allenai/sciq, ", "http://127.0.0.1:", "--bench-dir DIR"):
        assert part in told
    assert "cannot be reached" in told and not huggingface_hub.constants.is_offline_mode()


def test_a_hub_out_of_reach_leaves_its_cache(no_hub: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rows that the hub's library has in its cache, for which it is asked offline."""

    def load_dataset(*_: str, split: str) -> list[dict]:
        assert huggingface_hub.constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
        return ROWS["sciq"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert find_rows(BENCHMARKS["sciq"], None).rows == ROWS["sciq"]
    assert not huggingface_hub.constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_a_damaged_cache_is_no_missing_cache(no_hub: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: which cache, the library's own reason, and that the hub was not reached."""

    def load_dataset(*_: str, split: str) -> list[dict]:
        raise OSError("Invalid flatbuffers message")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = r"cache of allenai/sciq cannot be read \(Invalid flatbuffers message\), .*http://127.0.0.1:.*--bench-dir"
    with pytest.raises(DataError, match=expected):
        find_rows(BENCHMARKS["sciq"], None)


def test_a_hub_that_points_elsewhere_is_there(monkeypatch: pytest.MonkeyPatch, no_hub: list[float]) -> None:
    """Oracle: a server whose root leads to a host below .invalid, where RFC 2606 says there is none."""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://login.invalid/")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.unreachable() is None


def test_a_hub_that_does_not_answer_in_time_is_asked_once(monkeypatch: pytest.MonkeyPatch, no_hub: list[float]) -> None:
    """Oracle: the only request there is: a second one would double the longest wait, as where packets are dropped."""
    requests = iter([TimeoutError("timed out")])

    def head(*_: object, **__: object) -> None:
        raise next(requests)

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    assert hub.unreachable() == "timed out" and no_hub == []


def test_a_hub_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch, no_hub: list[float]) -> None:
    """Oracle: by hand: a connection that breaks and one that holds; the answer is that the hub is there."""
    answers = iter([ConnectionError("broke"), None])

    def head(*_: object, **__: object) -> None:
        if error := next(answers):
            raise error

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    assert hub.unreachable() is None and list(answers) == []


def test_examples_of_a_task_come_from_their_own_split(tmp_path: Path) -> None:
    """Oracle: by hand. One of the harness's tasks puts five questions of `dev` before each; its metric is its own."""

    def rows(split: str, count: int) -> list[dict]:
        return [
            {"question": f"{split} {number}", "subject": "sums", "choices": ["a", "b", "c", "d"], "answer": number % 4}
            for number in range(count)
        ]

    for split, count in (("dev", 6), ("test", 3)):
        folder = tmp_path / "mmlu" / split
        Dataset.from_list(rows(split, count)).save_to_disk(str(folder))
    (task,) = evaluation.prepare(["mmlu_early_training"], tmp_path, lambda line: None)
    context, ending = task.questions[2].requests[1]
    assert context.count("Question: dev") == 5 and context.endswith("Question: test 2\nAnswer:") and ending == " b"
    assert json.dumps(task.questions[2].gold) == "2"


def test_mmlu_has_57_subjects() -> None:
    """Oracle: the published list; each has a YAML of the harness."""
    from ds_slm.evaluate import harness

    assert len(MMLU) == 57 and all((harness.TASKS / one.config).is_file() for one in MMLU)


def test_examples_are_the_same_each_time(tmp_path: Path) -> None:
    """Oracle: a second preparation; this task draws its three examples at random."""
    rows = [
        {"question": f"q{n}", "q_id": n, "label": n % 5, **{f"choice{c}": f"c{c}-{n}" for c in range(5)}}
        for n in range(12)
    ]
    for split in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(str(tmp_path / "jcommonsenseqa" / split))
    first, second = (
        evaluation.prepare(["ja_leaderboard_jcommonsenseqa"], tmp_path, lambda line: None)[0] for _ in range(2)
    )
    assert first.questions == second.questions
    from ds_slm.evaluate import harness

    assert harness.questions_of(first.of_harness) == first.questions


def test_a_subject_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    """Oracle: MMLU's 57 subjects, though one of them is asked for by itself as well."""
    for one in MMLU:
        (tmp_path / f"{one.folders[0]}_test.csv").write_text("which,a,b,c,d,B\n")
    tasks = evaluation.prepare(["mmlu", "mmlu_anatomy"], tmp_path, lambda line: None)
    assert len(tasks) == 57 == len({task.name for task in tasks})


def test_parquet_of_other_configurations_is_left_out(tmp_path: Path) -> None:
    """Oracle: the configuration that the harness reads; two folders that could be it are told."""
    texts = {"default": "an English text", "de": "ein deutscher Text"}
    for config, text in texts.items():
        folder = tmp_path / "lambada_openai" / config
        folder.mkdir(parents=True)
        Dataset.from_list([{"text": text}]).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    assert [row["text"] for row in find_rows(BENCHMARKS["lambada_openai"], tmp_path).rows] == [texts["default"]]
    (tmp_path / "lambada_openai" / "default").rename(tmp_path / "lambada_openai" / "en")
    with pytest.raises(DataError, match="several folders could hold it"):
        find_rows(BENCHMARKS["lambada_openai"], tmp_path)


def test_a_slip_in_a_built_in_task_is_told_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own tasks need no library: whoever misspells one must not be sent to install it."""
    monkeypatch.setitem(sys.modules, "ds_slm.evaluate.harness", None)
    monkeypatch.delattr(package, "harness", raising=False)
    with pytest.raises(DataError, match="'documentaton' is not built in; the nearest is 'documentation'"):
        evaluation.prepare(["documentaton"], None, print)
    with pytest.raises(DataError) as refused:
        evaluation.prepare(["piqa"], None, print)
    assert "is not built in" not in str(refused.value) and "not installed" in str(refused.value)
