"""Exports in other engines, as benchmarks/engines.py compares them."""

import copy
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines
from benchmarks.engine_answers import ANSWERS, Answers, Questions, llama_cpp_answers, mlx_answers, transformers_answers

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {engine.name: engine for engine in engines.ENGINES}
FAKE = engines.Engine("fake", "fake", tolerance=1e-3)


@dataclass(frozen=True)
class Asked:
    """A small export, and what transformers says of it in this process."""

    questions: Questions
    first: Answers

    def result(self, engine: engines.Engine, answers: Answers) -> engines.Result:
        """An engine's answers, compared."""
        return engines.compare("small", engine, self.questions, self.first, answers)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Asked]:
    """A small export by its name, made once."""

    @cache
    def made(name: str) -> Asked:
        questions = engines.questions_of(engines.make_export(name, tmp_path_factory.mktemp("exports")))
        return Asked(questions, transformers_answers(questions))

    return made


def test_every_engine_can_be_asked() -> None:
    """Oracle: the two lists; what others are compared with is the transformers that is installed."""
    assert {engine.kind for engine in engines.ENGINES} == set(ANSWERS)
    assert engines.ENGINES[0].requirements == () and all(engine.requirements for engine in engines.ENGINES[1:])
    assert len(BY_NAME) == len(engines.ENGINES)


@pytest.mark.parametrize("name", ["llama-untied", "qwen3-tied"])
def test_llama_cpp_agrees(name: str, asked: Callable[[str], Asked]) -> None:
    """Oracle: transformers on the same export."""
    pytest.importorskip("xllamacpp")
    one = asked(name)
    result = one.result(BY_NAME["llama.cpp"], llama_cpp_answers(one.questions))
    assert result.agrees, result
    assert result.texts == len(engines.TEXTS) + 1 and result.greedy_compared > 10 and result.largest_difference > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, changes in engines.EXPORTS.items() if len(changes) < 3])
def test_mlx_agrees(name: str, asked: Callable[[str], Asked]) -> None:
    """Oracle: transformers on the same export, for every architecture that MLX has."""
    pytest.importorskip("mlx_lm", reason="pip install -e '.[mlx]'")
    one = asked(name)
    result = one.result(BY_NAME["mlx"], mlx_answers(one.questions))
    assert result.agrees, result
    assert result.texts == len(engines.TEXTS) + 1 and result.greedy_compared > 30


def other_id(answers: Answers) -> None:
    answers["ids"][6][-1] += 1


def other_conversation(answers: Answers) -> None:
    answers["conversations"][0].pop()


def other_log_probability(answers: Answers) -> None:
    answers["log_probabilities"][5] -= 1.5 * FAKE.tolerance


def no_number(answers: Answers) -> None:
    answers["log_probabilities"][5] = float("nan")


def other_token(answers: Answers) -> None:
    answers["greedy"][2][1] += 1


def short_continuation(answers: Answers) -> None:
    answers["greedy"][1] = answers["greedy"][1][:3]


CHANGES = [other_id, other_conversation, other_log_probability, no_number, other_token, short_continuation]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_difference_shows(change: Callable[[Answers], None], asked: Callable[[str], Asked]) -> None:
    """Oracle: the same answers agree before the change."""
    one = asked("llama-untied")
    answers = copy.deepcopy(one.first)
    assert one.result(FAKE, answers).verdict == "agrees"
    change(answers)
    result = one.result(FAKE, answers)
    assert result.verdict == "DIFFERS" and engines.row(result)[-1] == "DIFFERS"


@pytest.mark.parametrize(
    ("found", "margins", "expected"),
    [
        ([7, 8, 9], [1.0, 1.0, 1.0], (3, 3)),
        ([7, 8], [1.0, 1.0, 1.0], (2, 2)),  # without the end
        ([7, 8, 9], [1.0, 0.1, 1.0], (1, 1)),  # behind a near tie
        ([7, 5, 9], [1.0, 0.1, 1.0], (1, 1)),
        ([7, 5, 9], [1.0, 1.0, 1.0], (1, 3)),
        ([7], [1.0, 1.0, 1.0], (1, 3)),
        ([], [1.0, 1.0, 1.0], (0, 3)),
    ],
)
def test_equal_tokens(found: list[int], margins: list[float], expected: tuple[int, int]) -> None:
    """Oracle: counted by hand, beside 7, 8 and the end of the answer."""
    assert engines.equal_tokens([7, 8, 9], margins, found, tie=0.2) == expected


def test_an_engine_without_exclusive_attention_is_not_run(tmp_path: Path) -> None:
    """Oracle: the reason; nothing is installed."""
    with pytest.raises(engines.NotRun, match="exclusive attention"):
        engines.answers_of(BY_NAME["mlx"], {"needs_shipped_code": True}, tmp_path)
    with pytest.raises(engines.NotRun, match="--gguf f16"):
        engines.answers_of(BY_NAME["llama.cpp"], {"needs_shipped_code": False, "gguf_file": None}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_cannot_be_installed_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pip's own reason; what was begun is removed, and tried again next time."""
    reason = "ERROR: No matching distribution found for fake"

    def run(python: Path, *arguments: Any, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", f"Looking in links\n{reason}\n\n")

    monkeypatch.setattr(engines, "run", run)
    monkeypatch.setattr(venv, "create", lambda folder, **options: folder.mkdir())
    with pytest.raises(engines.NotRun, match=reason):
        engines.installed(engines.Engine("fake", "fake", ("fake",)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_stops_says_why(tmp_path: Path) -> None:
    """Oracle: the error of a process of its own, which knows no such engine."""
    with pytest.raises(engines.Failed, match="KeyError: 'fake'"):
        engines.answers_of(FAKE, {"needs_shipped_code": False}, tmp_path)


def test_a_problem_stands_in_the_table(
    asked: Callable[[str], Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the row; a failure is told from what was not run."""
    one = asked("llama-untied")

    def answers_of(engine: engines.Engine, questions: Questions, cache: Path) -> Answers:
        if engine.name == "fake":
            raise engines.Failed("out of memory")
        if engine.name == "mlx":
            raise engines.NotRun("no wheel")
        return one.first

    monkeypatch.setattr(engines, "answers_of", answers_of)
    asked_engines = [engines.ENGINES[0], FAKE, BY_NAME["mlx"]]
    results = engines.ask_all([Path(one.questions["folder"])], asked_engines, tmp_path)
    assert [result.verdict for result in results] == ["agrees", "failed: out of memory", "not run: no wheel"]
    assert engines.row(results[1]) == ["llama-untied", "fake", "", "", "", "", "failed: out of memory"]
