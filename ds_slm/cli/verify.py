"""The checks of `ds-slm verify RUN`: its checkpoints, its ledger of rows, a bad step, or resuming itself.

Each prints its answer, or with `as_json` one object, and raises an error if the user should act.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ds_slm.cli.output import print_json, report_to
from ds_slm.errors import CheckpointError, DataError


def checkpoints(run: Path, as_json: bool) -> None:
    """Print whether each checkpoint is whole, and why not. Raises CheckpointError if there is none, or a damaged one.

    Checkpoints that a launch has set aside are listed too, and do not count as a mistake.
    """
    from ds_slm.checkpoint import files as checkpoint_files
    from ds_slm.checkpoint import retention

    folders = [checkpoint_files.folder_of_step(run, step) for step in checkpoint_files.steps(run)]
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint: name the folder of a run that has saved one.")

    found = {folder.name: checkpoint_files.verify(folder) for folder in folders}
    aside = {f"{retention.DAMAGED}/{one.name}": checkpoint_files.verify(one) for one in retention.set_aside_ones(run)}
    if as_json:
        print_json({"whole": not any(found.values()), "checkpoints": found, "set_aside": aside})
    else:
        lines = [f"{name}: {' '.join(problems) or 'whole'}" for name, problems in found.items()]
        lines += [f"{name}: set aside, not used: {' '.join(problems) or 'whole'}" for name, problems in aside.items()]
        print("\n".join(lines))

    if damaged := [name for name, problems in found.items() if problems]:
        raise CheckpointError(f"{run}: {', '.join(damaged)} damaged; resuming and exporting pass over these.")


def resuming(run: Path, flags: Sequence[str], as_json: bool) -> None:
    """Train a few steps, kill, resume, compare. Raises CheckpointError if the two runs differ."""
    from ds_slm.cluster.prove_resume import prove

    scratch = run.with_name(f"{run.name}.verify-resume")
    problems = prove(run, flags, scratch, report_to(as_json))
    if as_json:
        print_json({"same": not problems, "differences": problems})
    if problems:
        raise CheckpointError([f"{run}: a killed and resumed run is another one ({scratch}):", *problems])
    if not as_json:
        print("killed and resumed is the same run: losses, gradient norms, rows and every tensor, bit for bit")
    shutil.rmtree(scratch)


def bad_step(run: Path, step: int, as_json: bool) -> None:
    """Run a refused step's rows again, one by one. Raises CheckpointError if no such step was refused."""
    from ds_slm.train import guard

    found = guard.replay(run, step)
    if as_json:
        print_json({"step": step, "found": list(found)})
    else:
        for line in found:
            print(line, flush=True)


def rows(run: Path, against: Path | None, as_json: bool) -> None:
    """Print the ledger of rows, or whether another run drew the same rows. Raises DataError if it did not."""
    from ds_slm.run import ledger

    ours = ledger.read(run)
    if against is None:
        if as_json:
            print_json({"ledger": ours})
        else:
            print("\n".join(f"{step} {link}" for step, link in ours.items()))
        return

    compared = ledger.compare(ours, ledger.read(against))
    if as_json:
        print_json(asdict(compared))

    # A difference is an error, even if it was printed as JSON.
    if compared.differ_at_step is not None:
        raise DataError(
            f"{run} and {against} drew the same rows up to step {compared.same_until_step} and others by step "
            f"{compared.differ_at_step}: compare their recipe.toml and the data_sha256 in their env.json (other data "
            "give other ledgers from the first step on)."
        )

    if not as_json:
        print(f"{run} and {against} drew the same rows in the same order up to step {compared.same_until_step}")
