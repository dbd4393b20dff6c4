"""Benchmarks scored while training: on all ranks, at every ZeRO stage, without a trace in what follows."""

import json
import random
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.evaluate.in_training import scored_tasks
from ds_slm.recipe import loading
from tests.support import runs
from tests.unit.cli.test_main import ds_slm

STEPS, EVERY = 6, 3
FLAGS = ("--set", 'eval.tasks=["arithmark2"]', "--set", f"eval.every_steps={EVERY}", "--set", "eval.bench_dir=bench")


def write_arithmark(folder: Path, items: int = 23) -> None:
    """Sums with four endings each, and brackets to make some longer than others."""
    rng = random.Random(5)
    folder.mkdir()
    with (folder / "arithmark_test.jsonl").open("w") as file:
        for number in range(items):
            terms = [rng.randrange(90) for _ in range(2 + number % 3)]
            label = rng.randrange(4)
            endings = [f" {sum(terms) + (index - label) * 3}" for index in range(4)]
            row = {"ctx": " + ".join(map(str, terms)) + " =", "endings": endings, "label": label}
            file.write(json.dumps({**row, "metadata": {"operator_count": len(terms) - 1}}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of six steps, its text, and a benchmark."""
    folder = tmp_path_factory.mktemp("scored")
    runs.write_corpus(folder / "corpus.jsonl")
    runs.write_recipe(folder, text=runs.TINY.replace("steps = 20", f"steps = {STEPS}"))
    write_arithmark(folder / "bench")
    return folder


def train(folder: Path, name: str, ranks: int, stage: int, *flags: str) -> Path:
    """One run; its folder."""
    config = folder / f"zero{stage}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    where = ("--run-dir", folder / name, "--data-root", folder / "data", "--ds-config", config, "--micro-batch", 2)
    done = runs.run(
        runs.deepspeed_command(ranks, "--recipe", folder / "tiny.toml", *where, *flags), cwd=folder, timeout_s=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


def figures(run: Path) -> dict[int, dict[str, float]]:
    """The benchmarks' figures of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line.pop("step"): line for line in lines if line.pop("kind") == "benchmarks"}
    return found


def tensors(run: Path) -> dict[str, str]:
    """File -> sha256 of the last checkpoint's tensors."""
    manifest = json.loads((checkpoint_files.folder_of_step(run, STEPS) / checkpoint_files.MANIFEST).read_text())
    return {name: one["sha256"] for name, one in manifest["files"].items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def scored(folder: Path) -> Path:
    """The run on two ranks under ZeRO-1, scored at steps 3 and 6."""
    return train(folder, "scored", 2, 1, *FLAGS)


def test_training_goes_on_as_if_nothing_had_been_scored(folder: Path, scored: Path) -> None:
    """Oracle: the same run without benchmarks: every record, and every tensor of the last checkpoint, bit for bit."""
    plain = train(folder, "plain", 2, 1)
    kept = ("step", "loss", "grad_norm", "ledger")
    ours, theirs = ([[one[key] for key in kept] for one in runs.records(run)] for run in (scored, plain))
    assert ours == theirs and tensors(scored) == tensors(plain)
    assert not figures(plain)


def test_a_step_that_was_scored_is_not_scored_again(folder: Path, scored: Path) -> None:
    """Oracle: the run in one go: one record at each step, also where the run was stopped and goes on."""
    for flags in (("--max-steps", str(EVERY)), ()):
        run = train(folder, "resumed", 2, 1, *FLAGS, *flags)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "benchmarks"] == [EVERY, STEPS]
    assert [line["begins_at_step"] for line in lines if line["kind"] == "launch"] == [0, EVERY]
    assert figures(run) == figures(scored) and tensors(run) == tensors(scored)


def test_figures_are_those_of_the_command(scored: Path, folder: Path) -> None:
    """Oracle: `ds-slm eval` on the checkpoint, in one process; the model is fp32, so are the log-probabilities."""
    assert sorted(figures(scored)) == [EVERY, STEPS]
    done = ds_slm("eval", str(scored), "--tasks", "arithmark2", "--bench-dir", str(folder / "bench"), "--json")
    assert done.returncode == 0, done.stderr
    tasks = json.loads(done.stdout)["tasks"]
    alone = {
        f"{name}/{metric}": one["value"] for name, task in tasks.items() for metric, one in task["figures"].items()
    }
    assert figures(scored)[STEPS] == pytest.approx(alone, rel=1e-6)
    assert len(alone) == 4 * 3 and figures(scored)[EVERY] != figures(scored)[STEPS]


def test_figures_are_in_tensorboard(scored: Path) -> None:
    """Oracle: metrics.jsonl: the same steps and values, under eval/TASK/METRIC."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(scored / "tb"))
    events.Reload()
    for name in figures(scored)[STEPS]:
        found = {event.step: event.value for event in events.Scalars(f"eval/{name}")}
        assert found == pytest.approx({step: values[name] for step, values in figures(scored).items()}, rel=1e-6)


def test_a_limit_scores_the_first_items(folder: Path) -> None:
    """Oracle: a benchmark of those items alone; without an interval the finished model alone is scored."""
    first = folder / "bench-first"
    write_arithmark(first)
    rows = (first / "arithmark_test.jsonl").read_text().splitlines(keepends=True)
    (first / "arithmark_test.jsonl").write_text("".join(rows[:9]))
    tasks, here = FLAGS[:2], ("--set", "eval.bench_dir=bench")
    limited = figures(train(folder, "limited", 2, 1, *tasks, *here, "--set", "eval.limit=9"))
    alone = figures(train(folder, "alone", 2, 1, *tasks, "--set", f"eval.bench_dir={first}"))
    assert limited == alone and list(limited) == [STEPS]


@pytest.mark.parametrize(
    ("ranks", "stage"), [(2, 3), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_figures_are_the_same_at_every_stage_and_world_size(folder: Path, scored: Path, ranks: int, stage: int) -> None:
    """Oracle: ZeRO-1 on two ranks. Weights differ by the order of sums, log-probabilities by as little."""
    other = figures(train(folder, f"ranks-{ranks}-stage-{stage}", ranks, stage, *FLAGS))
    for step, values in figures(scored).items():
        assert other[step] == pytest.approx(values, rel=1e-4), step


def test_a_task_that_is_not_there_ends_the_launch_before_training(folder: Path) -> None:
    """Oracle: exit code 2, one paragraph with the nearest name, and no record."""
    arguments = ("--recipe", folder / "tiny.toml", "--run-dir", folder / "none", "--data-root", folder / "data")
    done = runs.run(runs.deepspeed_command(2, *arguments, "--set", 'eval.tasks=["arithmark3"]'), cwd=folder)
    assert done.returncode != 0 and "did you mean arithmark2?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and not (folder / "none" / "metrics.jsonl").exists()


def test_a_task_that_fails_does_not_end_the_run(folder: Path) -> None:
    """Oracle: an ending without a token is found when it is encoded: a warning at both steps, and a finished run."""
    bench = folder / "bench-broken"
    write_arithmark(bench)
    rows = [json.loads(line) for line in (bench / "arithmark_test.jsonl").read_text().splitlines()]
    rows[4] = {**rows[4], "ctx": "", "endings": ["<|endoftext|>", *rows[4]["endings"][1:]]}
    (bench / "arithmark_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag.replace("bench_dir=bench", f"bench_dir={bench}") for flag in FLAGS]
    run = train(folder, "broken", 2, 1, *flags)
    assert (run / "done.json").is_file() and not figures(run)


def test_without_tasks_nothing_is_scored(tmp_path: Path) -> None:
    """Oracle: the demo recipe names none."""
    assert scored_tasks(loading.load("demo"), tmp_path, 0, print) is None
