"""Where a step's time goes: parts that exclude each other, and the real program with --profile."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.cli import flags
from ds_slm.engine.profile import PARTS, Watch, _wrapped, table
from ds_slm.errors import ConfigError
from tests.support import runs


def test_a_part_counts_its_own_time_alone() -> None:
    """Oracle: by hand: a collective of 2 s within a backward pass of 5 s within a step of 10 s."""
    now_s = 0.0
    watch = Watch(lambda: None, clock=lambda: now_s)
    with watch.part("other"):
        now_s = 4.0
        with watch.part("backward"):
            now_s = 5.0
            with watch.part("reduce"):
                now_s = 7.0
            now_s = 9.0
        now_s = 10.0
    assert watch.seconds == dict.fromkeys(PARTS, 0.0) | {"other": 5.0, "backward": 3.0, "reduce": 2.0}
    assert next(table(watch.seconds, 2)) == "a step of 5.000 s, under the profiler, mean of 2:"


def test_what_is_wrapped_keeps_its_result_and_its_error() -> None:
    """Oracle: the function itself; an error leaves no part open."""
    now_s = 0.0
    watch = Watch(lambda: None, clock=lambda: now_s)
    assert watch.wrap("data", max)(3, 5) == 5
    with pytest.raises(ZeroDivisionError):
        watch.wrap("loss", lambda: 1 // 0)()
    now_s = 8.0
    with watch.part("other"):
        now_s = 9.0
    assert watch.seconds["loss"] == 0.0 and watch.seconds["other"] == 1.0


def test_every_wait_for_rows_counts_as_data() -> None:
    """A reader whose rows take 2 s where a step begins, and 3 s where it announces the next one. Oracle: the sum."""
    now_s = 0.0

    def waits(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    reader: Any = SimpleNamespace(of_step=lambda: waits(2.0), following=lambda: waits(3.0))
    names = ("forward", "backward", "allreduce_gradients", "step")
    engine: Any = SimpleNamespace(deepspeed=SimpleNamespace(**dict.fromkeys(names)))
    watch = Watch(lambda: None, clock=lambda: now_s)
    with _wrapped(watch, engine, reader), watch.part("other"):
        reader.of_step()
        reader.following()
    assert watch.seconds == dict.fromkeys(PARTS, 0.0) | {"data": 5.0}


@pytest.mark.parametrize("text", ["3", "0:2", "5:4", "a:b", "2:"])
def test_steps_that_are_no_range(text: str) -> None:
    """Oracle: the form that is expected."""
    with pytest.raises(ConfigError, match="expected A:B"):
        flags.of_pretraining().parse_args(["--profile", text])


@pytest.mark.parametrize("stage", [1, 2])
def test_profile_of_a_real_run(tmp_path: Path, stage: int) -> None:
    """Oracle: the parts, each with some time, add up to the step; the losses are those of a run without; a trace."""
    recipe = runs.write_recipe(tmp_path)
    config = runs.ROOT / "ds_configs" / f"zero{stage}.json"
    found = {}
    for name, profile in (("with", ["--profile", "2:3"]), ("without", [])):
        arguments = ["--recipe", recipe, "--run-dir", name, "--ds-config", config, "--max-steps", 4, *profile]
        done = runs.run(runs.deepspeed_command(2, *arguments), tmp_path)
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout
    losses = [[record["loss"] for record in runs.records(tmp_path / name)] for name in found]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert "profiler" not in found["without"]
    [total] = re.findall(r"a step of ([\d.]+) s, under the profiler, mean of 2", found["with"])
    parts = {name: float(seconds) for name, seconds in re.findall(r"^  (\w+) +([\d.]+) s", found["with"], re.MULTILINE)}
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(float(total), abs=0.004)
    assert all(parts[name] > 0 for name in ("forward", "loss", "backward", "reduce", "optimiser")), parts
    for rank in range(2):
        [trace] = (tmp_path / "with" / "profile").glob(f"steps-2-3-rank-{rank:05d}.trace.json")
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert {f"ds_slm.{name}" for name in PARTS} <= names
