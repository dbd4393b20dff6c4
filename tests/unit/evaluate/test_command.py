"""`ds-slm eval`: what it writes, and one paragraph and exit code 2 for each mistake."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.evaluate import record
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Target
from tests.support import benchmark_files, scored_models
from tests.support.benchmark_files import ROWS


@pytest.fixture(scope="module")
def fresh(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model as a run and as an export, and the files of two benchmarks."""
    folder = tmp_path_factory.mktemp("command")
    recipe = scored_models.recipe_of()
    assert recipe.model is not None
    state = scored_models.state_of(build(recipe.model, seed=1))
    export(state, recipe.model, tokenizer_folder, folder / "export")
    scored_models.write_run(folder / "run", recipe, state, tokenizer_folder)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("nan"))
    export(state, recipe.model, tokenizer_folder, folder / "nan")
    for name in ("piqa", "lambada_openai"):
        benchmark_files.write_published(folder / "files", name, ROWS[name])
    return folder


@pytest.mark.parametrize("place", ["export", "run"])
def test_what_is_written(place: str, fresh: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: eval.json beside the model holds what --json prints; the items are those of the limit."""
    flags = ("--bench-dir", fresh / "files", "--tasks", "piqa,lambada_openai", "--limit", 5)
    done = ds_slm("eval", fresh / place, *flags, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((fresh / place / "eval.json").read_text())["tasks"] == found["tasks"]
    assert {name: (task["items"], task["of_items"]) for name, task in found["tasks"].items()} == {
        "piqa": (5, 18), "lambada_openai": (5, 21)
    }  # fmt: skip
    done = ds_slm("eval", fresh / place, *flags)
    assert done.returncode == 0, done.stderr
    assert "first 5" in done.stdout


def _mistake(case: str, fresh: Path, tmp_path: Path) -> tuple[Path, list[object]]:
    """The model and the flags of a mistake."""
    flags: list[object] = ["--bench-dir", fresh / "files", "--tasks", "piqa"]
    if case == "nan":
        return fresh / "nan", flags
    if case == "no tokenizer":
        shutil.copytree(fresh / "export", tmp_path / "bare")
        for path in (tmp_path / "bare").glob("tokenizer*"):
            path.unlink()
        return tmp_path / "bare", flags
    if case == "damaged":
        shutil.copytree(fresh / "run", tmp_path / "run")
        path = next((tmp_path / "run").rglob("model.safetensors"))
        path.write_bytes(path.read_bytes()[:-100])
        return tmp_path / "run", flags
    if case == "limit":
        return fresh / "export", [*flags, "--limit", 0]
    if case == "no model":
        return tmp_path / "nowhere", flags
    if case == "no files":
        return fresh / "export", ["--bench-dir", tmp_path, "--tasks", "piqa,sciq"]
    if case == "half a file":
        path = benchmark_files.write_published(tmp_path, "lambada_openai", ROWS["lambada_openai"])
        path.write_bytes(path.read_bytes()[:-9])
        return fresh / "export", ["--bench-dir", tmp_path, "--tasks", "lambada_openai"]
    assert case == "misspelt"
    return fresh / "export", ["--bench-dir", fresh / "files", "--tasks", "helaswag"]


MISTAKES = {
    "nan": "log-probabilities that are not finite", "no tokenizer": "tokenizer", "damaged": "checkpoint",
    "limit": "--limit", "no model": "does not exist", "no files": "sciq: ",
    "half a file": "lambada_test.jsonl, line 21",
    "misspelt": "did you mean hellaswag?",
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2, nothing on stdout with --json, one paragraph that says what is wrong, nothing written."""
    model, flags = _mistake(case, fresh, tmp_path)
    record = model / "eval.json"
    before = record.read_bytes() if record.exists() else None
    done = ds_slm("eval", model, *flags, "--json")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert (record.read_bytes() if record.exists() else None) == before
    assert MISTAKES[case] in done.stderr
    assert "Traceback" not in done.stderr
    assert case == "limit" or "\n\n" not in done.stderr.strip()  # that one is the command line's own usage


def test_tasks_that_are_not_scored(fresh: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: by hand, of the harness's index: exit code 2, one paragraph with every one of them and what to do."""
    told = {
        "blimp": "is a group of several: name those that you want (blimp_adjunct_island, ",
        "ai2_arc": "is a tag of several: name those that you want (arc_challenge, arc_easy)",
        "squadv2": "is a program of the harness's",
        "gsm8k": "is scored by what a model writes (generate_until)",
        "helaswag": "did you mean hellaswag?",
        "blimp_adjunct_islnd": "did you mean blimp_adjunct_island?",
        "qqqqqqqqqq": "`lm_eval ls tasks` lists them",
    }
    done = ds_slm(
        "eval", fresh / "export", "--tasks", ",".join(["piqa", *told]), "--bench-dir", fresh / "files", "--json"
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    lines = done.stderr.partition("error: ")[2].strip().split("\n")
    for line, (name, sentence) in zip(lines, told.items(), strict=True):
        assert f"task {name!r} " in line and sentence in line


def test_a_task_that_is_named_twice_is_scored_once(fresh: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the items of one."""
    flags = ("--tasks", "piqa, piqa,,lambada_openai,piqa", "--bench-dir", fresh / "files", "--limit", 3)
    done = ds_slm("eval", fresh / "export", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("piqa: 18 items") == 1
    items = record.read_items(fresh / "export")
    assert {name: len(items[name]) for name in ("piqa", "lambada_openai")} == {"piqa": 3, "lambada_openai": 3}


def _cut(path: Path) -> None:
    """Half of a file, the last line of it without its end."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].rstrip()[:-5])


def _rename(old: str, new: str) -> Callable[[Path], None]:
    def rename(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return rename


DAMAGED = {
    "piqa cut": ("piqa", _cut, ("valid.jsonl, line ", "get an intact copy")),
    "sciq cut": ("sciq", _cut, ("test.json", "get an intact copy")),
    "hellaswag cut": ("hellaswag", _cut, ("hellaswag_val.jsonl, line ",)),
    "mmlu cut": ("mmlu_anatomy", _cut, ("anatomy_test.csv, line ", "four choices and a letter")),
    "piqa renamed": ("piqa", _rename('"sol1"', '"solution1"'), ("row 1: piqa needs sol1, got ", "solution1")),
    "arc renamed": ("arc_easy", _rename('"answerKey"', '"answer"'), ("ARC-Easy-Test.jsonl: a row is not of arc_easy",)),
    "winogrande renamed": ("winogrande", _rename('"sentence"', '"text"'), ("row 1: winogrande needs sentence",)),
    "boolq renamed": ("boolq", _rename('"answer"', '"yes"'), ("row 1: boolq needs label",)),
    "lambada renamed": ("lambada_openai", _rename('"text"', '"content"'), ("row 1: lambada_openai needs text",)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2, and a sentence with the file, the place in it and what was expected; nothing is scored."""
    name, damage, parts = DAMAGED[case]
    damage(benchmark_files.write_published(tmp_path, name, ROWS[name]))
    done = ds_slm("eval", fresh / "export", "--tasks", name, "--bench-dir", tmp_path, "--json")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and "\n\n" not in done.stderr.strip()
    assert all(part in done.stderr for part in parts), done.stderr


def test_without_the_harness(fresh: Path, ds_slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the sentence that says how it is installed."""
    import ds_slm.evaluate as package

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ds_slm.evaluate.harness", raising=False)
    monkeypatch.delattr(package, "harness", raising=False)
    done = ds_slm("eval", fresh / "export", "--bench-dir", fresh / "files", "--tasks", "piqa")
    assert done.returncode == 2
    assert "pip install -e '.[eval]'" in done.stderr


def test_two_models_on_the_same_items(fresh: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the run and its export are one model: no item differs; and both keep their results."""
    flags = ("--tasks", "piqa", "--bench-dir", fresh / "files", "--against", fresh / "export", "--json")
    done = ds_slm("eval", fresh / "run", *flags)
    assert done.returncode == 0, done.stderr
    differences = {one["metric"]: one for one in json.loads(done.stdout)["against"]}
    assert differences.keys() == {"acc", "acc_norm", "answer_bits_per_byte"}
    assert all(one["difference"] == pytest.approx(0, abs=1e-6) for one in differences.values())
    assert (differences["acc"]["only_ours"], differences["acc"]["only_theirs"]) == (0, 0)
    assert all((fresh / place / "eval.json").is_file() for place in ("run", "export"))


def test_choices_are_ranked(fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the order of the sums, and of the means with --mean; a file gives what the command gives."""
    context, choices = "The bar", [" is red", " is", " of a red cave by the river"]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"context": context, "choices": choices}) + "\n\n")
    found = {}
    for flags in ((), ("--mean",)):
        done = ds_slm("rank", fresh / "run", context, *choices, *flags, "--json")
        assert done.returncode == 0, done.stderr
        from_file = ds_slm("rank", fresh / "run", "--file", tmp_path / "lines.jsonl", *flags, "--json")
        assert from_file.stdout == done.stdout
        (found[flags],) = json.loads(done.stdout)["ranked"]
    sums = [one["log_probability"] for one in found[()]["choices"]]
    means = [one["mean_log_probability"] for one in found[("--mean",)]["choices"]]
    assert sums == sorted(sums, reverse=True) and means == sorted(means, reverse=True)
    assert {one["choice"] for one in found[()]["choices"]} == set(choices)
    assert all(
        one["mean_log_probability"] * one["tokens"] == pytest.approx(one["log_probability"])
        for one in found[()]["choices"]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["The bar"], "at least two choices"),
        (["The bar", " red"], "at least two choices"),
        (["The bar", "", " red"], "has no token of its own"),
        (["a", "b", "--file", "lines.jsonl"], "leave them out"),
    ],
)
def test_mistakes_of_ranking(arguments: list[str], told: str, fresh: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the sentence, exit code 2, no traceback."""
    done = ds_slm("rank", fresh / "run", *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_every_line_of_a_file_that_is_not_one_is_told(fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: two lines of three are wrong."""
    file = tmp_path / "lines.jsonl"
    file.write_text(
        '{"context": "a", "choices": [" b", " c"]}\n{"context": "a"}\n{"context": 1, "choices": ["a", "b"]}\n'
    )
    done = ds_slm("rank", fresh / "run", "--file", file)
    assert done.returncode == 2 and "line 2" in done.stderr and "line 3" in done.stderr and "line 1" not in done.stderr


def test_a_file_of_choices_in_another_encoding(fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: a sentence, exit code 2."""
    file = tmp_path / "lines.jsonl"
    file.write_text('{"context": "caf\u00e9", "choices": [" b", " c"]}\n', encoding="latin-1")
    done = ds_slm("rank", fresh / "run", "--file", file)
    assert done.returncode == 2 and "is not UTF-8" in done.stderr


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000007", "checkpoints/best"])
def test_published_figures_stand_beside_those_of_every_checkpoint(
    place: str, fresh: Path, tmp_path: Path, ds_slm: Callable[..., Any]
) -> None:
    """Oracle: the figure that the run's own recipe names, whichever of its checkpoints is scored."""
    run = shutil.copytree(fresh / "run", tmp_path / "run")
    target = Target(metric="piqa/acc_norm", published=61.25, step=None, source="made up")
    recipe = loading.load_recorded(run).model_copy(update={"targets": [target]})
    (run / "recipe.toml").write_text(loading.to_toml(recipe))
    (run / "checkpoints" / "best").write_text("step-00000007")
    done = ds_slm("eval", run / place, "--tasks", "piqa", "--bench-dir", fresh / "files")
    assert done.returncode == 0, done.stderr
    assert "61.25" in done.stdout and "at step 7" in done.stdout
