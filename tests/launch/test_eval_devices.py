"""`ds-slm eval --devices` as a user runs it: whoever is killed, nothing is left behind, and nothing is waited for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ds_slm.evaluate import documentation
from ds_slm.evaluate.on_devices import PROGRAM
from ds_slm.model.decoder import build
from tests.support import scored_models

PATIENCE_S = 240


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an untrained model."""
    folder = tmp_path_factory.mktemp("killed")
    texts = [row["ctx"] for row in documentation.rows()]
    tokenizer_folder = scored_models.write_tokenizer(folder / "tokenizer", texts)
    recipe = scored_models.recipe_of()
    assert recipe.model is not None
    state = scored_models.state_of(build(recipe.model, seed=1))
    scored_models.write_run(folder / "run", recipe, state, tokenizer_folder)
    return folder / "run"


KILLED = {
    "all, by Ctrl-C": (130, ""),
    "rank 0": (-signal.SIGKILL, ""),
    "rank 2": (
        2,
        "error: rank 2 of 3 died (signal 9, Killed): memory may be too small for 3 copies of the model; score on fewer "
        "--devices.",
    ),
}


@pytest.mark.parametrize("killed", KILLED)
def test_whoever_is_killed_nothing_is_left(killed: str, run: Path) -> None:
    """Oracle: the exit code and what is told, of a command that is about to score; and its processes, all gone."""
    command = [str(Path(sys.executable).parent / "ds-slm"), "eval", str(run), "--tasks", "documentation"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--devices", "3"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "200 items" in process.stdout.readline()  # it scores from now on
        ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if PROGRAM in one.cmdline()]
        assert len(ranks) == 2

        if killed == "all, by Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            doomed = next(one for one in ranks if one.cmdline()[5] == "2")
            (process if killed == "rank 0" else doomed).kill()
        told = process.communicate(timeout=PATIENCE_S)[1].strip()

    assert (process.returncode, told) == KILLED[killed]
    assert psutil.wait_procs(ranks, timeout=PATIENCE_S)[1] == []
    assert not (run / "eval.json").exists()
