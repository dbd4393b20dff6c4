"""torch's tests of vector instruction sets: a set that passed once is not tested again."""

from pathlib import Path
from typing import Any

import pytest
from torch._inductor import cpu_vec_isa

from ds_slm.engine import instruction_sets


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that torch's own test was asked for; those named `bad` fail."""
    asked: list[str] = []

    def check_build(self: Any, program: str) -> bool:
        asked.append(program)
        return program != "bad"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    instruction_sets.believe_passed_tests()
    return asked


def test_what_passed_once_is_not_tested_again(tests: list[str]) -> None:
    """Oracle: by hand, which tests run: another set, another program and a failure do."""
    avx2, avx512 = cpu_vec_isa.VecAVX2(), cpu_vec_isa.VecAVX512()
    assert [one.check_build("a") for one in (avx2, avx2, avx512)] == [True] * 3
    assert [avx2.check_build(program) for program in ("b", "bad", "bad")] == [True, False, False]
    assert tests == ["a", "a", "b", "bad", "bad"]


@pytest.mark.parametrize("changes", ["compiler", "cpu", "torch"])
def test_another_compiler_cpu_or_torch_is_tested_anew(
    tests: list[str], changes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a second process in which one of them is another."""
    assert cpu_vec_isa.VecAVX2().check_build("a")
    match changes:
        case "compiler":
            monkeypatch.setattr(instruction_sets.software, "find_compiler", lambda _: None)
            monkeypatch.setenv("CXX", "another")
        case "cpu":
            monkeypatch.setattr(instruction_sets.measure, "device_name", lambda _: "another")
        case _:
            monkeypatch.setattr(instruction_sets.torch, "__version__", "9.9")
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", cpu_vec_isa.VecISA.check_build.__wrapped__)
    instruction_sets.believe_passed_tests()
    assert cpu_vec_isa.VecAVX2().check_build("a") and tests == ["a", "a"]


def test_a_torch_without_such_tests_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: nothing is added where nothing was."""
    monkeypatch.delattr(cpu_vec_isa.VecISA, "check_build")
    instruction_sets.believe_passed_tests()
    assert not hasattr(cpu_vec_isa.VecISA, "check_build")
