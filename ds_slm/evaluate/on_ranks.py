"""Scoring with a model that is being trained, on all its ranks and at every ZeRO stage.

    rank 0: tasks -> batches --send--> rank r --> forward --send--> rank 0: scores -> figures
    others: `serve`: a batch, a forward, its scores; until rank 0 has no more

Rank 0 alone has the harness and the benchmarks' files. Each round is one forward on every rank: a rank without a batch
of its own repeats rank 0's, because ZeRO-3 gathers weights on all ranks or on none. Signals are voted on after each
round. No random number is drawn, so training goes on as if nothing had been scored.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.distributed.ranks import Control
from ds_slm.evaluate import evaluation
from ds_slm.evaluate.opening import Opened
from ds_slm.evaluate.scoring import BATCH_TOKENS, Batch
from ds_slm.model.decoder import Continuations
from ds_slm.model.loss import TokenScores
from ds_slm.recipe import schema

Score = Callable[[nn.Module, Control, Callable[[], None]], tuple[dict[str, float], str]]
"""From the model, the ranks and the vote after each round to figures by TASK/METRIC and what kept them from being
scored; both empty on all ranks but 0."""


class RanksScorer:
    """The scorer of rank 0, which gives every rank a batch at a time."""

    branches = True

    def __init__(self, model: nn.Module, control: Control, max_length: int, vote: Callable[[], None]) -> None:
        self._model, self._control, self._vote = model, control, vote
        self.max_length, self.at_a_time = max_length, control.world_size
        self.device = next(model.parameters()).device
        self.batch_tokens = BATCH_TOKENS[self.device.type]
        self.in_round = False
        """Whether the other ranks are in a round with this one."""

    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens: one batch on each rank."""
        control, self.in_round = self._control, True
        dealt = [batches[rank] if rank < len(batches) else batches[0] for rank in range(control.world_size)]
        control.broadcast([_sizes(batch) for batch in dealt], 0)
        for rank in range(1, control.world_size):
            for tensor in _tensors(dealt[rank]):
                control.send(tensor.cpu().contiguous(), rank)

        found = [_forward(self._model, dealt[0])]
        for rank in range(1, control.world_size):
            count = len(dealt[rank].continuations.targets_N)
            log_probability_N = control.receive(torch.empty(count, dtype=torch.float32), rank)
            is_greedy_N = control.receive(torch.empty(count, dtype=torch.uint8), rank)
            found.append(TokenScores(log_probability_N, is_greedy_N.bool()))

        self._vote()
        self.in_round = False
        return found[: len(batches)]

    def end(self) -> None:
        """Let the other ranks go."""
        self._control.broadcast(None, 0)


def serve(model: nn.Module, control: Control, vote: Callable[[], None]) -> None:
    """What every other rank does until rank 0 ends it: a forward for each batch that comes."""
    device = next(model.parameters()).device
    while sizes := control.broadcast(None, 0):
        rows, length, count, has_branches = sizes[control.rank]
        grid = torch.empty(rows, length, dtype=torch.int64)
        ids_BT = control.receive(grid, 0).to(device)
        branch_ids_BT = control.receive(grid.clone(), 0).to(device) if has_branches else None
        places_N, targets_N = (control.receive(torch.empty(count, dtype=torch.int64), 0).to(device) for _ in range(2))
        scores = _forward(model, Batch(ids_BT, Continuations(branch_ids_BT, places_N, targets_N), targets_N))
        control.send(scores.log_probability_N.float().cpu().contiguous(), 0)
        control.send(scores.is_greedy_N.to("cpu", torch.uint8), 0)
        vote()


def _sizes(batch: Batch) -> list[int]:
    rows, length = batch.ids_BT.shape
    return [rows, length, len(batch.continuations.targets_N), int(batch.continuations.branch_ids_BT is not None)]


def _tensors(batch: Batch) -> list[torch.Tensor]:
    """What travels of a batch, in the order in which `serve` receives it."""
    branch_ids_BT, places_N, targets_N = batch.continuations
    return [batch.ids_BT, *([] if branch_ids_BT is None else [branch_ids_BT]), places_N, targets_N]


@torch.no_grad()
def _forward(model: nn.Module, batch: Batch) -> TokenScores:
    return model(batch.ids_BT, continuations=batch.continuations)


def scored_tasks(
    recipe: schema.Recipe, tokenizer_folder: Path, rank: int, report: Callable[[str], None]
) -> Score | None:
    """What scores the recipe's `[eval]` tasks; None where it names none.

    Args:
        recipe: `[eval]` says which tasks, how many items, and where their files lie.
        tokenizer_folder: the tokenizer that the model is trained with.
        rank: of this process. Rank 0 alone finds the tasks' rows, now.
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
        model.eval()
        if control.rank != 0:
            serve(model, control, vote)
            return {}, ""

        # What a task's own code gets wrong ends its figures, not the run; a forward that fails does.
        scorer = RanksScorer(model, control, recipe.model.max_position_embeddings, vote)
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
