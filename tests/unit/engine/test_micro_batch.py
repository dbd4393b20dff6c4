"""--micro-batch auto: the fastest that fits, measured once and kept."""

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.engine import micro_batch
from ds_slm.engine.result_cache import ResultCache
from ds_slm.model import loss
from ds_slm.model.decoder import Decoder
from ds_slm.recipe import ds_config, loading
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure
from tests.support import runs

ZERO = {"stage": 1}


class TwoRanks:
    """Two ranks on this host; the other one is twice as slow."""

    rank, world_size, ranks_on_host = 0, 2, 2

    def gather(self, message: Any) -> list[Any]:
        return [message, 2 * message if isinstance(message, float) else message]

    def broadcast(self, message: Any, source: int) -> Any:
        return message

    def barrier(self) -> None: ...


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return loading.load(str(runs.write_recipe(tmp_path)), ["train.global_batch_tokens=512"])


def make_trial(recipe: Recipe, zero: dict[str, Any] = ZERO, **changes: Any) -> micro_batch.Trial:
    """On a CPU in fp32; `changes` are to the engine_config configuration."""
    engine_config = replace(ds_config.join(recipe, {"zero_optimization": zero}, 2, "cpu", 1), **changes)
    return micro_batch.Trial(recipe, engine_config, torch.device("cpu"), torch.float32)


def choose(trial: micro_batch.Trial) -> tuple[int, list[str]]:
    """The choice, and the lines that are printed."""
    printed: list[str] = []
    control: Any = TwoRanks()
    return micro_batch.choose(trial, control, printed.append), printed


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({1: 1.0, 2: 2.0, 4: 1.5}, 2),
        ({1: 1.0, 2: 1.01, 4: 1.015}, 1),
        ({1: 1.0, 2: 1.01, 4: 1.5}, 4),
        ({1: 1.0, 2: 0.9, 4: 1.1}, 4),
        ({}, 1),
    ],
)
def test_twice_the_rows_must_pay(speeds: dict[int, float], chosen: int) -> None:
    """Oracle: by hand: the fastest; of two that are alike the smaller; one row where nothing else was measured."""
    assert micro_batch.fastest(speeds) == chosen


def test_the_slowest_rank_counts_and_slow_sizes_end_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: made-up durations: 2 rows are fastest, 4 and 8 slower, 16 never tried (8 rows a rank)."""
    seconds, tried = {1: 1.0, 2: 1.0, 4: 3.0, 8: 7.0}, []

    def made_up(trial: Any, control: Any, rows: int) -> float:
        tried.append(rows)
        return seconds[rows]

    monkeypatch.setattr(micro_batch, "_duration_s", made_up)
    chosen, printed = choose(make_trial(recipe))
    assert (chosen, tried) == (2, [1, 2, 4, 8])
    assert printed == [
        "micro-batch 2, by rows a second and device (1: 0.5, 2: 1, 4: 0.667, 8: 0.571); kept in "
        f"{ResultCache('micro_batch').path}"
    ]


def test_a_size_that_does_not_fit_ends_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: free memory for one row and not for two; and for none, where one row is chosen and not kept."""
    real = micro_batch._free_bytes
    plans = [micro_batch.budget.memory(recipe, ZERO, 2, rows, "cpu") for rows in (1, 2)]
    need = [one.device_bytes - one.program_bytes for one in plans]
    assert need[0] < need[1] < real()
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: int(2 * (need[0] + 1) / micro_batch.FREE_SHARE))
    _, printed = choose(make_trial(recipe))
    assert "(1: " in printed[0] and "2: MemoryError: it needs " in printed[0]

    monkeypatch.setattr(micro_batch, "_free_bytes", lambda: 0)
    kept = ResultCache("micro_batch")._read()
    chosen, printed = choose(make_trial(recipe, deterministic=True))
    assert chosen == 1 and printed[0].startswith("warning: micro-batch 1, the smallest, although its trial failed (1: ")
    assert ResultCache("micro_batch")._read() == kept


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were tried; each lasts a second."""
    sizes: list[int] = []

    def made_up(trial: Any, control: Any, rows: int) -> float:
        sizes.append(rows)
        return 1.0

    monkeypatch.setattr(micro_batch, "_duration_s", made_up)
    monkeypatch.setattr(micro_batch, "_release", lambda trial: None)  # nothing was allocated
    return sizes


def test_a_choice_is_kept(recipe: Recipe, tried: list[int]) -> None:
    """Oracle: nothing is measured a second time, and the file is named."""
    chosen, _ = choose(make_trial(recipe))
    tried.clear()
    line = f"micro-batch {chosen}, as measured before ({ResultCache('micro_batch').path})"
    assert choose(make_trial(recipe)) == (chosen, [line])
    assert tried == []


def with_value(section: str, field: str, value: Any) -> Callable[[micro_batch.Trial], micro_batch.Trial]:
    """From a trial to one with another value in its recipe."""

    def change(trial: micro_batch.Trial) -> micro_batch.Trial:
        changed = getattr(trial.recipe, section).model_copy(update={field: value})
        return replace(trial, recipe=trial.recipe.model_copy(update={section: changed}))

    return change


CHANGES: dict[str, Callable[[micro_batch.Trial], micro_batch.Trial]] = {
    "model": with_value("model", "intermediate_size", 8),
    "seq_len": with_value("data", "seq_len", 16),
    "z_loss": with_value("train", "z_loss", 0.0),
    "gradient checkpointing": with_value("train", "gradient_checkpointing", True),
    "optimizer": with_value("optimizer", "name", "adamw8bit"),
    "dtype": lambda trial: replace(trial, dtype=torch.bfloat16),
    "compiled": lambda trial: make_trial(trial.recipe, compiled=True),
    "deterministic": lambda trial: make_trial(trial.recipe, deterministic=True),
    "ZeRO stage": lambda trial: make_trial(trial.recipe, {"stage": 2}),
    "buckets": lambda trial: make_trial(trial.recipe, {"stage": 1, "reduce_bucket_size": 1000}),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_a_speed_depends_on_is_measured_again(recipe: Recipe, tried: list[int], changed: str) -> None:
    """Oracle: with one thing changed the sizes are tried again; with nothing changed they are not."""
    choose(make_trial(recipe))
    tried.clear()
    choose(make_trial(recipe))
    assert not tried
    choose(CHANGES[changed](make_trial(recipe)))
    assert tried


@pytest.mark.parametrize("changed", ["torch", "deepspeed", "own device", "other rank's device", "packed", "products"])
def test_another_library_device_or_packing_is_measured_again(
    recipe: Recipe, tried: list[int], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Oracle: as above, for what the launch's configuration does not hold."""
    choose(make_trial(recipe))
    tried.clear()
    if changed == "own device":
        monkeypatch.setattr(measure, "hardware", lambda device: ["a card", 10**9, 9, 0])
    elif changed == "other rank's device":
        own = TwoRanks.gather
        slower = ["a slower CPU", 10**9, "AVX2", 64]
        monkeypatch.setattr(TwoRanks, "gather", lambda self, m: [m, slower] if isinstance(m, list) else own(self, m))
    elif changed == "packed":
        monkeypatch.setattr(micro_batch.Trial, "packed", True)
    elif changed == "products":
        monkeypatch.setenv("DS_SLM_HALF_PRODUCTS", "upcast")
    else:
        version = micro_batch._version
        monkeypatch.setattr(micro_batch, "_version", lambda name: "another" if name == changed else version(name))
    choose(make_trial(recipe))
    assert tried


@pytest.mark.parametrize("content", ["[1", "[]", "\x00", *(json.dumps(one) for one in (True, 0, -1, 10**6, "2", [2]))])
def test_a_damaged_or_odd_file_is_measured_again(recipe: Recipe, tried: list[int], content: str) -> None:
    """Oracle: a file that is not JSON, or another kind of it, or holds what is not a number of rows of this rank."""
    chosen, _ = choose(make_trial(recipe))
    path = ResultCache("micro_batch").path
    assert path
    [key] = json.loads(path.read_text())
    for text in (content, f'{{"{key}": {content}}}'):
        path.write_text(text)
        tried.clear()
        assert choose(make_trial(recipe))[0] == chosen and tried


class OutOfResources(Exception):
    """As Triton raises it: not a RuntimeError."""


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error: unhandled cuda error"),
    OutOfResources("out of resource: shared memory, Required: 263168, Hardware limit: 232448"),
    MemoryError(),
]


class Thread:
    """One of two ranks that are threads: a gather waits for both, as between processes."""

    world_size, ranks_on_host = 2, 2

    def __init__(self, rank: int, messages: list[str], meeting: threading.Barrier) -> None:
        self.rank, self._messages, self._meeting = rank, messages, meeting

    def barrier(self) -> None:
        self._meeting.wait(timeout=60)

    def gather(self, message: Any) -> list[Any]:
        self._messages[self.rank] = json.dumps(message)
        self.barrier()
        everyone = [json.loads(one) for one in self._messages]
        self.barrier()
        return everyone

    def broadcast(self, message: Any, source: int) -> Any:
        return self.gather(message)[source]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_error_on_one_rank_ends_the_trials_on_all(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception, failing_rank: int
) -> None:
    """Oracle: the sizes before it count on both ranks, neither waits for the other, and each frees every trial."""
    released: list[Any] = []
    monkeypatch.setattr(micro_batch, "_release", released.append)

    def failing(trial: Any, control: Any, rows: int) -> float:
        if rows == 4 and control.rank == failing_rank:
            raise error
        return 1.0

    monkeypatch.setattr(micro_batch, "_duration_s", failing)
    messages, meeting = ["", ""], threading.Barrier(2)
    printed: list[list[str]] = [[], []]
    chosen: list[int] = [0, 0]

    def rank(number: int) -> None:
        control: Any = Thread(number, messages, meeting)
        chosen[number] = micro_batch.choose(make_trial(recipe), control, printed[number].append)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert chosen == [2, 2]
    assert all(f"(1: 1, 2: 2; 4: {type(error).__name__}: " in lines[0] for lines in printed)
    assert len(released) == 6
    assert list(ResultCache("micro_batch")._read().values()) == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_frees_its_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Oracle: Python's own list of objects: a model that is no longer there, also after a failure in its last pass."""
    released: list[Any] = []
    monkeypatch.setattr(measure, "release_memory", released.append)
    if fails:
        clock = iter([0.0])
        monkeypatch.setattr(micro_batch, "_now_s", lambda device: next(clock))  # raises after the first pass
    control: Any = TwoRanks()
    before = count_models()
    outcome = micro_batch._run_trial(make_trial(recipe), control, 2)
    assert isinstance(outcome, str) if fails else isinstance(outcome, float) and outcome > 0
    assert count_models() == before
    assert released == [torch.device("cpu")]


def count_models() -> int:
    return sum(type(one) is Decoder for one in gc.get_objects())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trial_computes_as_the_run_does(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, packed: bool, compiled: bool
) -> None:
    """Oracle: the trial's model and what it is given: compiled parts, dtype, checkpointing, z-loss, document ids."""
    calls: list[tuple[Any, ...]] = []
    forward = Decoder.forward

    def spy(model: Any, inputs: Any, targets: Any, *, sight: Any, z_scale: float) -> Any:
        calls.append((model.compiled, model.model.gradient_checkpointing, inputs.shape, sight, z_scale))
        assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        return forward(model, inputs, targets, sight=sight, z_scale=z_scale)

    monkeypatch.setattr(Decoder, "forward", spy)
    monkeypatch.setattr(Decoder, "compile_parts", lambda model: setattr(model, "compiled", True))
    monkeypatch.setattr(loss, "_compiled", lambda: loss._from_logits)
    monkeypatch.setattr(micro_batch.Trial, "packed", packed)
    trial = with_value("train", "gradient_checkpointing", True)(make_trial(recipe, compiled=compiled))
    control: Any = TwoRanks()
    assert isinstance(micro_batch._run_trial(replace(trial, dtype=torch.bfloat16), control, 2), float)
    assert len(calls) == micro_batch.REPEATS
    for is_compiled, checkpointing, shape, documents, z_scale in calls:
        assert (is_compiled, checkpointing, tuple(shape), z_scale) == (compiled, True, (2, 32), recipe.train.z_loss)
        assert (documents is not None) is packed
        assert documents is None or (documents.ids_BT.tolist(), documents.count) == ([[0] * 16 + [1] * 16] * 2, 4)


def test_the_peak_starts_again_after_the_trials() -> None:
    """Oracle: the kernel's own figure, after 512 MB that were written to and given back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process start its peak again")
    cpu, size = torch.device("cpu"), 2**29
    before = measure.peak_memory_bytes(cpu)
    block = torch.ones(size, dtype=torch.uint8)
    assert measure.peak_memory_bytes(cpu) > before + 0.9 * size
    del block
    measure.release_memory(cpu)
    assert measure.peak_memory_bytes(cpu) < before + 0.5 * size


@pytest.mark.parametrize("broken", [False, True])
def test_a_gpu_gives_back_its_cache_and_starts_its_peak_again(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Oracle: torch's two calls; a GPU that refuses every call raises nothing here, for the run raises it."""
    calls: list[Any] = []

    def empty_cache() -> None:
        calls.append("empty")
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    gpu = torch.device("cuda", 0)
    measure.release_memory(gpu)
    assert calls == (["empty"] if broken else ["empty", gpu])


@pytest.mark.slow
def test_auto_in_a_real_run(tmp_path: Path) -> None:
    """Oracle: what is said is what the run records and what a second run remembers; the rows drawn are the same."""
    recipe = runs.write_recipe(tmp_path)
    ledgers, lines = [], []
    for name in ("first", "second"):
        arguments = ["--recipe", recipe, "--run-dir", name, "--max-steps", 2, "--micro-batch", "auto"]
        done = runs.run(runs.deepspeed_command(2, *arguments), tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        lines.append(next(line for line in done.stdout.splitlines() if line.startswith("micro-batch")))
        ledgers.append([record["ledger"] for record in runs.records(tmp_path / name)])
    [remembered] = json.loads((tmp_path / "cache" / "ds_slm" / "micro_batch.json").read_text()).values()
    assert lines[0].startswith(f"micro-batch {remembered}, by rows a second")
    assert lines[1].startswith(f"micro-batch {remembered}, as measured before")
    cuts = [json.loads((tmp_path / name / "env.json").read_text())["micro_batch_rows"] for name in ("first", "second")]
    assert cuts[0] == cuts[1] <= remembered
    assert ledgers[0] == ledgers[1]
