"""Fixtures for every test."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support import data_recipes, tolerances

if TYPE_CHECKING:
    from tests.support.assistants import Assistant

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is slow, not wrong
hypothesis.settings.load_profile("untimed")

# A shell that starts the tests in the background ignores SIGINT, and every process below it would.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that DS_SLM_TEST_DATA names; skips where it is unset. Only read it."""
    named = os.environ.get("DS_SLM_TEST_DATA")
    if not named:
        pytest.skip("DS_SLM_TEST_DATA is unset: it names a folder of real data that does not ship with the project")
    folder = Path(named)
    assert folder.is_dir(), f"DS_SLM_TEST_DATA = {named} is no folder"
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only wait for the first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def torchs_attention() -> Iterator[None]:
    """A test whose blocks are compiled builds attention's backward pass for itself alone."""
    yield
    if module := sys.modules.get("ds_slm.model.cpu_attention"):
        vars(module).update(_library=None, _failure=None)


@pytest.fixture(params=tolerances.PRODUCTS)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Half-precision products in either form, whatever the CPU: a test that asks for this runs once in each."""
    from ds_slm.model import kernels

    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiler(request: pytest.FixtureRequest) -> Iterator[str]:
    """What torch.compile does once it has traced a model and its derivatives: nothing more, or, slowly, fuse them.

    Whole runs on fused blocks are in tests/launch/test_equivalence.py.
    """
    import torch

    from ds_slm.model import loss

    def forget() -> None:
        torch._dynamo.reset()
        loss._compiled.cache_clear()

    forget()
    torch.compiler.set_default_backend(request.param)
    yield request.param
    torch.compiler.set_default_backend(None)
    forget()


@pytest.fixture
def ds_slm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, run in this process: its exit code, and what it printed."""
    from ds_slm.cli import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["ds-slm", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(words, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def cl100k_folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cl100k tokenizer, built from its ranks and saved."""
    folder = tmp_path_factory.mktemp("cl100k")
    data_recipes.cl100k(test_data / "cl100k_base" / "cl100k_base.tiktoken").save(folder)
    return folder


@pytest.fixture(scope="session")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> "Assistant":
    """A tiny assistant that was trained for seconds. Only read it."""
    import torch

    from tests.support.assistants import write_assistant

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = write_assistant(tmp_path_factory.mktemp("assistant"))
    torch.set_num_threads(threads)
    return made
