"""Whether torch.compile works: shown by compiling, kept on the host, the same answer on all ranks."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ds_slm.engine import compile_probe
from ds_slm.engine.result_cache import ResultCache
from ds_slm.model import cpu_attention
from ds_slm.recipe import ds_config
from ds_slm.train import choices, launch
from tests.support import runs

CPU = torch.device("cpu")
FAILS = "torch.compile does not work: "
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="this machine lacks a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ds_slm" / "compile_probe.json"


def fake_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that CXX names."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", None),
        (
            "print('g++ -c x.cpp\\nx.cpp:1:10: fatal error: Python.h: No such file or directory\\n    1 | #include\\n"
            "torch._inductor.exc.InductorError: CppCompileError: C++ compile error', file=sys.stderr); sys.exit(1)",
            FAILS + "x.cpp:1:10: fatal error: Python.h: No such file or directory",
        ),
        (
            "sys.exit('/usr/bin/ld: cannot find -lgomp\\ncollect2: error: ld returned 1 exit status')",
            FAILS + "/usr/bin/ld: cannot find -lgomp",
        ),
        (
            "raise RuntimeError('Python 3.99 is not supported')",
            FAILS + "RuntimeError: Python 3.99 is not supported",
        ),
        ("sys.exit('switched off')", FAILS + "switched off"),
        ("sys.exit(3)", FAILS + "exit code 3"),
        ("os.kill(os.getpid(), 9)", FAILS + "exit code -9"),
        ("sys.stderr.buffer.write(b'\\xff\\nerror: \\xff'); sys.exit(1)", FAILS + "error: \ufffd"),
    ],
)
def test_a_failed_child_is_reported_by_its_most_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str | None
) -> None:
    """Oracle: by hand, from what g++, ld and torch print; only a success is kept."""
    monkeypatch.setattr(compile_probe, "PROBE", f"import os, sys\n{program}")
    fake_compiler(tmp_path, "exit 0", monkeypatch)
    assert compile_probe._host_reason(CPU) == reason
    assert list(ResultCache("compile_probe")._read().values()) == ([True] if reason is None else [])


def test_a_child_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the process ids that the child wrote down: its own, and that of a compiler which ignores SIGTERM."""
    pids = tmp_path / "pids"
    program = f"""
import os, subprocess, time
compiler = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000; true"])
with open({str(pids)!r} + ".part", "w") as file:
    file.write(f"{{os.getpid()}} {{compiler.pid}}")
os.replace({str(pids)!r} + ".part", {str(pids)!r})
time.sleep(1000)
"""
    monkeypatch.setattr(compile_probe, "PROBE", program)
    wait = compile_probe.subprocess.Popen.wait

    def wait_until_started(child: Any, timeout: float | None = None) -> int:
        deadline_s = time.monotonic() + 60
        while timeout and not pids.exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return wait(child, timeout and 0.01)

    monkeypatch.setattr(compile_probe.subprocess.Popen, "wait", wait_until_started)
    assert compile_probe._probe(CPU) == f"{FAILS}a tiny function took more than {compile_probe.PROBE_TIMEOUT_S} s"

    def alive(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    deadline_s = time.monotonic() + 60
    while any(map(alive, map(int, pids.read_text().split()))):
        assert time.monotonic() < deadline_s


def test_without_space_for_the_child_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the system's error, in place of a traceback on one rank."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_probe.tempfile, "TemporaryFile", full)
    assert compile_probe._probe(CPU) == f"{FAILS}[Errno 28] No space left on device"


def test_without_a_compiler_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: an empty path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compile_probe, "_probe", lambda device: pytest.fail("a child was started"))
    assert compile_probe._host_reason(CPU) == f"{FAILS}g++ and clang++ are missing"


def test_a_success_is_kept_until_the_compiler_or_a_switch_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Oracle: probes that were counted; another compiler, a switch of torch's or a damaged file need one more."""
    probes = []
    monkeypatch.setattr(compile_probe, "_probe", probes.append)
    path = fake_compiler(tmp_path, "exit 0", monkeypatch)
    for _ in range(2):
        assert compile_probe._host_reason(CPU) is None
    assert len(probes) == 1

    path.write_text("#!/bin/sh\nexit 1 # another\n")
    compile_probe._host_reason(CPU)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    compile_probe._host_reason(CPU)
    assert len(probes) == 3

    for content in (b'{"a', b"\xff\xfe", b"[" * 100_000, json.dumps([1]).encode()):
        cache.write_bytes(content)
        compile_probe._host_reason(CPU)
    assert len(probes) == 7


def test_a_failure_is_probed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: probes that were counted: a header may have been installed since."""
    probes = []
    monkeypatch.setattr(compile_probe, "_probe", lambda device: probes.append(device) or FAILS)
    fake_compiler(tmp_path, "exit 0", monkeypatch)
    assert compile_probe._host_reason(CPU) == compile_probe._host_reason(CPU) == FAILS
    assert len(probes) == 2


def test_without_a_home_folder_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a user without an entry and without HOME, as containers have."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert not ResultCache("compile_probe").store({"a": 1}, True)
    assert ResultCache("compile_probe").load({"a": 1}) is None


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ([None, None, None], None),
        ([None, None, "g++ is missing"], "b: g++ is missing"),
        (["g++ is missing", None, "g++ is missing"], "g++ is missing"),
        (["g++ is missing", None, "gcc is missing"], "a: g++ is missing; b: gcc is missing"),
    ],
)
def test_one_host_that_cannot_compile_makes_all_ranks_eager(reasons: list[str | None], expected: str | None) -> None:
    """Oracle: by hand, for two hosts with two ranks and one: which hosts cannot, and why."""

    class Hosts:
        hosts, leads_host = ("a", "a", "b"), False

        def gather(self, message: Any) -> list[str | None]:
            return reasons

    control: Any = Hosts()
    assert compile_probe.eager_reason(control, CPU) == expected


@pytest.mark.parametrize("reason", [None, FAILS + "Python.h"])
def test_a_launch_says_why_its_blocks_are_eager(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """Oracle: compiled if it works; else eager, with the reason, also after the micro-batch was measured."""
    monkeypatch.setattr(compile_probe, "eager_reason", lambda control, device: reason)
    monkeypatch.setattr(launch.devices, "current_device", lambda: CPU)
    control: Any = SimpleNamespace(rank=0, world_size=1)
    engine_config = compile_probe.agree(ds_config.EngineConfig({}, 1, 1, 0, compiled=True), torch.float32, control)
    expected = "compiled" if reason is None else f"eager ({reason})"
    assert choices.blocks(engine_config) == expected

    trials: list[Any] = []
    monkeypatch.setattr(launch.micro_batch, "choose", lambda trial, *_: trials.append(trial) or 4)
    monkeypatch.setattr(
        launch, "joined_config", lambda *given: ds_config.EngineConfig({}, given[-1], 1, 0, compiled=True)
    )
    recipe: Any = SimpleNamespace(train=SimpleNamespace(precision="fp32"))
    changed = launch._with_fastest_micro_batch(recipe, SimpleNamespace(), engine_config, control)  # type: ignore[arg-type]
    assert (changed.micro_batch, choices.blocks(changed)) == (4, expected)
    assert trials[0].engine_config.compiled is (reason is None)

    eager = ds_config.EngineConfig({}, 1, 1, 0, compiled=False)
    assert compile_probe.agree(eager, torch.float32, control) is eager
    assert choices.blocks(eager) == "eager"


NO_HEADER = "fatal error: Python.h: No such file or directory"


def compiler_without_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that answers as g++ does without Python.h, and an empty cache folder for torch."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
    # what torch asks before it compiles is answered by the real one
    version = 'case "$*" in *--version*|*-dump*) exec g++ "$@";; esac'
    fake_compiler(folder, f'{version}\necho "x.cpp:1:10: {NO_HEADER}" >&2\nexit 1', monkeypatch)


@pytest.mark.slow
@needs_compiler
def test_a_compiler_without_headers_fails_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the compiler's own line."""
    compiler_without_headers(tmp_path, monkeypatch)
    assert compile_probe._host_reason(CPU) == f"{FAILS}x.cpp:1:10: {NO_HEADER}"


@pytest.mark.slow
@needs_compiler
def test_a_run_without_headers_trains_eagerly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the compiler's line on the screen and in env.json, and steps that were taken, also by the trials."""
    compiler_without_headers(tmp_path, monkeypatch)
    config = tmp_path / "compiled.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "compile_blocks": True}))
    flags = ["--ds-config", config, "--micro-batch", "auto", "--max-steps", 2, "--run-dir", "run"]
    done = runs.run(runs.deepspeed_command(2, "--recipe", runs.write_recipe(tmp_path), *flags), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = f"eager ({FAILS}x.cpp:1:10: {NO_HEADER})"
    assert f"blocks: {expected}" in done.stdout
    assert json.loads((tmp_path / "run" / "env.json").read_text())["kernels"]["blocks"] == expected
    assert "micro-batch" in done.stdout and len(runs.records(tmp_path / "run")) >= 2


@pytest.mark.slow
@needs_compiler
def test_a_switch_that_compiles_nothing_is_not_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's own variable, under which everything runs eagerly and nothing is printed."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert compile_probe._host_reason(CPU) == f"{FAILS}an environment variable switches it off"


@pytest.mark.slow
@needs_compiler
def test_a_working_compiler_is_called_each_time(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: this machine's compiler, which the tests of compiled blocks use: a new library in torch's folder a probe,
    though the same folder holds the earlier one.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    counts = []
    for _ in range(2):
        assert compile_probe._host_reason(CPU) is None
        assert list(json.loads(cache.read_text()).values()) == [True]
        cache.unlink()
        counts.append(len(list((tmp_path / "torch").rglob("*.so"))))
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("other", [None, "this CPU has no AVX-512 bf16"])
def test_all_ranks_take_the_same_backward_pass_of_attention(monkeypatch: pytest.MonkeyPatch, other: str | None) -> None:
    """Oracle: this rank has built the library; it keeps it only if the other rank has one, too."""
    monkeypatch.setenv("DS_SLM_HALF_PRODUCTS", "native")
    monkeypatch.setattr(cpu_attention, "_library", object())
    control: Any = SimpleNamespace(gather=lambda own: [own, other], hosts=["one", "two"])
    compile_probe.build_attention(control)
    assert cpu_attention.is_built(torch.bfloat16) == (other is None)
    assert cpu_attention.failure() == (other and f"two: {other}")


def test_a_rank_without_bf16_products_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a rank that upcasts takes part in the one message, else the others would wait, and builds nothing."""
    monkeypatch.setenv("DS_SLM_HALF_PRODUCTS", "upcast")
    monkeypatch.setattr(compile_probe, "eager_reason", lambda *_: None)
    monkeypatch.setattr(compile_probe.devices, "current_device", lambda: CPU)
    monkeypatch.setattr(cpu_attention, "build", None)
    said: list[str] = []
    control: Any = SimpleNamespace(gather=lambda own: said.append(own) or [None, own], hosts=["one", "two"])
    compile_probe.agree(ds_config.EngineConfig({}, 1, 1, 0, compiled=True), torch.bfloat16, control)
    assert said == ["this CPU does not multiply in bf16"]
    assert cpu_attention.failure() == f"two: {said[0]}"


@pytest.mark.parametrize(
    ("compiled", "reason", "dtype", "builds"),
    [
        (True, None, torch.bfloat16, True),
        (True, None, torch.float32, False),
        (True, "no compiler", torch.bfloat16, False),
        (False, None, torch.bfloat16, False),
    ],
)
def test_a_launch_builds_attention_with_its_blocks(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, reason: str | None, dtype: torch.dtype, builds: bool
) -> None:
    """Oracle: a count of the builds: in bf16 that this CPU multiplies, and only where blocks are compiled."""
    monkeypatch.setenv("DS_SLM_HALF_PRODUCTS", "native")
    monkeypatch.setattr(compile_probe, "eager_reason", lambda *_: reason)
    monkeypatch.setattr(compile_probe.devices, "current_device", lambda: CPU)
    built: list[Any] = []
    monkeypatch.setattr(compile_probe, "build_attention", built.append)
    control: Any = SimpleNamespace()
    compile_probe.agree(ds_config.EngineConfig({}, 1, 1, 0, compiled=compiled), dtype, control)
    assert built == [control] * builds
