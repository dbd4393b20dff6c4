"""Scoring with a model that is being trained, on all its ranks and at every ZeRO stage.

    `[eval]` --scored_tasks--> tasks, on rank 0 --`on_ranks`--> figures by TASK/METRIC

Ranks vote on signals after each round. No random number is drawn, so training goes on as if nothing had been scored.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.distributed.ranks import Control
from ds_slm.evaluate import evaluation
from ds_slm.evaluate.on_ranks import RanksScorer, serve
from ds_slm.evaluate.opening import Opened
from ds_slm.evaluate.scoring import DecoderScorer
from ds_slm.model.decoder import Decoder
from ds_slm.recipe.schema import Recipe

Score = Callable[[nn.Module, Control, Callable[[], None]], tuple[dict[str, float], str]]
"""A function of the model, the ranks and the vote after each round. It returns figures by TASK/METRIC, and why they
could not be scored; both are empty on all ranks except 0."""


def scored_tasks(recipe: Recipe, tokenizer_folder: Path, rank: int, report: Callable[[str], None]) -> Score | None:
    """The function that scores the recipe's `[eval]` tasks; None if it names none.

    Args:
        recipe: its `[eval]` names the tasks, the number of items, and the folder of their files.
        tokenizer_folder: the tokenizer with which the model is trained.
        rank: this process's rank. Only rank 0 finds the tasks' rows, now.
        report: takes a line for each task.

    Raises:
        UserError: on rank 0, with every task that cannot be scored.
    """
    settings = recipe.eval
    if not settings.tasks:
        return None

    tokenizer = load_tokenizer(tokenizer_folder)
    bench_dir = Path(settings.bench_dir) if settings.bench_dir else None
    names = evaluation.chosen_tasks(settings.tasks, recipe)
    tasks = evaluation.prepare(names, bench_dir, report) if rank == 0 else []

    def score(model: nn.Module, control: Control, vote: Callable[[], None]) -> tuple[dict[str, float], str]:
        assert isinstance(model, Decoder)
        own = DecoderScorer(model)
        if control.rank != 0:
            serve(own, control, vote)
            return {}, ""

        # An error in a task's own code costs its figures, not the run; a forward that fails ends the run.
        scorer = RanksScorer(own, control, vote)
        figures, problem = {}, ""
        try:
            figures = _figures(scorer, tokenizer, tasks, settings.limit)
        except Exception as error:
            if scorer.in_round:
                raise
            problem = str(error) or type(error).__name__
        scorer.end()
        return figures, problem

    return score


def _figures(
    scorer: RanksScorer, tokenizer: Tokenizer, tasks: Sequence[evaluation.Task], limit: int | None
) -> dict[str, float]:
    opened = Opened(scorer, tokenizer, Path(), {"path": "the model in training"})
    results, _ = evaluation.evaluate(opened, tasks, limit, lambda rows: None)
    return {f"{one.name}/{metric}": figure.value for one in results for metric, figure in one.figures.items()}
