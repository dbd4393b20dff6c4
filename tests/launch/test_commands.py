"""Small real launches: of the command line, of a hostfile that is missing, of other data."""

import subprocess
import sys
from pathlib import Path

from tests.support import runs
from tests.support.assistants import small_talk, write_base, write_sft


def test_other_data_give_another_ledger(tmp_path: Path) -> None:
    """Oracle: two short real runs on the same rows of different text, and a third on the first one's text again."""
    ledgers = []
    for number, seed in enumerate((0, 1, 0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.write_corpus(folder / "corpus.jsonl", seed=seed)
        recipe = runs.write_recipe(folder)
        done = runs.run(runs.deepspeed_command(1, "--recipe", recipe, "--run-dir", "run", "--max-steps", 2), folder)
        assert done.returncode == 0, done.stderr
        assert "step 2 of 20 is saved: the same command without --max-steps goes on" in done.stdout
        ledgers.append([record["ledger"] for record in runs.records(folder / "run")])
    assert ledgers[0] == ledgers[2]
    assert not set(ledgers[0]) & set(ledgers[1])


def test_two_steps_for_real(tmp_path: Path) -> None:
    """Oracle: the records and files of a run of `ds-slm sft` under the real launcher on one rank."""
    base = write_base(tmp_path)
    recipe = write_sft(tmp_path, small_talk())
    command = [sys.executable, "-c", "from ds_slm.cli.main import run; run()", "sft", str(recipe), "--base", str(base)]
    flags = ["--devices", "1", "--master_port", str(runs.free_port()), "--set", "train.steps=2"]
    flags += ["--set", "schedule.warmup_steps=1"]
    done = subprocess.run(
        [*command, *flags],
        cwd=tmp_path,
        env=runs.environment(PYTHONPATH=str(runs.ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in runs.records(tmp_path / "runs" / "chatty")] == [1, 2]
    assert (tmp_path / "runs" / "chatty" / "done.json").is_file()


def test_the_real_launcher_with_a_wrong_hostfile(tmp_path: Path) -> None:
    """DeepSpeed itself only warns and would train on this machine."""
    script = (
        f"import sys\nsys.path.insert(0, {str(runs.ROOT)!r})\n"
        "from ds_slm.cluster.hostfile import refuse_missing_hostfile\n"
        "from ds_slm.errors import run_program\n"
        "sys.exit(run_program(refuse_missing_hostfile))\n"
    )
    (tmp_path / "train.py").write_text(script)
    command = runs.deepspeed_command(1, "--hostfile", "x", script=Path("train.py"))
    done = subprocess.run(  # not forked: ranks read the launcher's command line
        [command[0], "--hostfile=absent", *command[1:]],
        cwd=tmp_path,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path / 'absent'} is not a file" in done.stderr
    assert "Traceback" not in done.stderr
