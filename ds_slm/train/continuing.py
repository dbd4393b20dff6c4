"""Whether a run is finished, and if not, the checkpoint it goes on from. Collective."""

from pathlib import Path

from ds_slm.checkpoint import resume
from ds_slm.distributed.problems import raise_on_all
from ds_slm.distributed.ranks import Control
from ds_slm.errors import CheckpointError, attempt
from ds_slm.run import folder as run_folder
from ds_slm.train.inputs import Inputs
from ds_slm.train.task import Corpus


def is_finished(inputs: Inputs, control: Control) -> bool:
    """Whether a host's folder holds the finished run; if so, prints it. Collective."""
    recipe, run_dir, corpus = inputs.recipe, inputs.options.run_dir, inputs.corpus
    done = max(control.gather(run_folder.finished(run_dir)), key=lambda one: one.get("step", -1))
    if done.get("step", -1) < recipe.train.steps:
        return False
    resume.refuse_other_beginning(run_dir, done, inputs.identity, corpus.older_sha256s)
    _mend_finished(control, run_dir, corpus)
    if control.rank == 0:
        print(f"{run_dir} is finished: {recipe.train.steps} steps. Nothing to do.", flush=True)
    return True


def resume_point(inputs: Inputs, control: Control) -> resume.ResumePoint | None:
    """The checkpoint to go on from; None if there is none. Raises CheckpointError if one was asked for. Collective."""
    options = inputs.options
    _refuse_unwritable(control, options.run_dir)
    found = None
    if options.resume != "never":
        found = resume.find(control, options.run_dir, inputs.identity, inputs.corpus.older_sha256s)
    if found is None and options.resume == "must":
        raise CheckpointError(f"--resume must: no host has a whole checkpoint in {options.run_dir}.")
    return found


def _mend_finished(control: Control, run: Path, corpus: Corpus) -> None:
    """Mend the tokenizer of a finished run if it is damaged, so that the run can be exported. Collective."""
    problems: list[str] = []
    notes = None
    if control.leads_host and run_folder.finished(run):
        notes = attempt(problems, lambda: run_folder.mend_tokenizer(run, corpus.tokenizer_folder))
    for line in dict.fromkeys(line for lines in control.gather([*(notes or []), *problems]) for line in lines):
        if control.rank == 0:
            print(f"warning: {line}", flush=True)


def _refuse_unwritable(control: Control, run: Path) -> None:
    """Raise on all ranks if a host cannot write into its run folder. Leaves no file behind."""
    problems: list[str] = []
    if control.leads_host:
        attempt(problems, lambda: run_folder.refuse_unusable(run))
    raise_on_all(control, [f"--run-dir {run}: {problem}" for problem in problems])
