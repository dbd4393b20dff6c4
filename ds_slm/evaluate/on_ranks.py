"""Scoring on several ranks that hold the same model: ranks in training, or ranks of `ds-slm eval --devices`.

    rank 0: tasks -> batches --send--> rank r --> forward --send--> rank 0: scores -> figures
    others: `serve`: a batch, a forward, its scores; until rank 0 has no more

Only rank 0 has the harness and the benchmarks' files. Each round is one forward on every rank: a rank without its own
batch repeats rank 0's, because ZeRO-3 gathers weights on all ranks or on none. Ranks may vote after each round.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_slm.evaluate.scoring import Batch, Scorer
from ds_slm.model.decoder import Continuations
from ds_slm.model.loss import TokenScores


class Ranks(Protocol):
    """How ranks talk: over gloo in training (`distributed.ranks`), over pipes on one machine (`on_devices`)."""

    rank: int
    world_size: int

    def broadcast(self, message: Any, source: int) -> Any:
        """The source rank's JSON message on every rank."""
        ...

    def send(self, tensor: Tensor, receiver: int) -> None:
        """Send a contiguous CPU tensor to one rank, which calls `receive`."""
        ...

    def receive(self, buffer: Tensor, sender: int) -> Tensor:
        """Fill a contiguous CPU tensor with the tensor that one rank sends; returns it."""
        ...


def _no_vote() -> None:
    """The vote after a round if no signal can stop the scoring: nothing is asked."""


class RanksScorer:
    """The scorer of rank 0, which gives every rank a batch at a time."""

    def __init__(self, own: Scorer, ranks: Ranks, vote: Callable[[], None] = _no_vote) -> None:
        """`own` scores on this rank; `vote` is called on every rank after each round."""
        self._own, self._ranks, self._vote = own, ranks, vote
        self.max_length, self.branches, self.device = own.max_length, own.branches, own.device
        self.batch_tokens, self.at_a_time = own.batch_tokens, ranks.world_size
        self.in_round = False
        """Whether the other ranks are in a round with this one."""

    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens: one batch on each rank."""
        ranks, self.in_round = self._ranks, True
        dealt = [batches[rank] if rank < len(batches) else batches[0] for rank in range(ranks.world_size)]
        ranks.broadcast([_sizes(batch) for batch in dealt], 0)
        for rank in range(1, ranks.world_size):
            for tensor in _tensors(dealt[rank]):
                ranks.send(tensor.cpu().contiguous(), rank)

        found = self._own(dealt[:1])
        for rank in range(1, ranks.world_size):
            count = len(dealt[rank].continuations.targets_N)
            log_probability_N = ranks.receive(torch.empty(count, dtype=torch.float32), rank)
            is_greedy_N = ranks.receive(torch.empty(count, dtype=torch.uint8), rank)
            found.append(TokenScores(log_probability_N, is_greedy_N.bool()))

        self._vote()
        self.in_round = False
        return found[: len(batches)]

    def end(self) -> None:
        """Tell the other ranks that no batches follow."""
        self._ranks.broadcast(None, 0)


def serve(own: Scorer, ranks: Ranks, vote: Callable[[], None] = _no_vote) -> None:
    """Run a forward for each batch that comes, until rank 0 ends it: the work of every other rank."""
    while sizes := ranks.broadcast(None, 0):
        rows, length, count, has_branches = sizes[ranks.rank]
        grid = torch.empty(rows, length, dtype=torch.int64)
        ids_BT = ranks.receive(grid.clone(), 0).to(own.device)
        branch_ids_BT = ranks.receive(grid, 0).to(own.device) if has_branches else None
        places_N, targets_N = (ranks.receive(torch.empty(count, dtype=torch.int64), 0).to(own.device) for _ in range(2))

        (scores,) = own([Batch(ids_BT, Continuations(branch_ids_BT, places_N, targets_N), targets_N)])
        ranks.send(scores.log_probability_N.float().cpu().contiguous(), 0)
        ranks.send(scores.is_greedy_N.to("cpu", torch.uint8), 0)
        vote()


def _sizes(batch: Batch) -> list[int]:
    rows, length = batch.ids_BT.shape
    return [rows, length, len(batch.continuations.targets_N), int(batch.continuations.branch_ids_BT is not None)]


def _tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch that are sent, in the order in which `serve` receives them."""
    branch_ids_BT, places_N, targets_N = batch.continuations
    return [batch.ids_BT, *([] if branch_ids_BT is None else [branch_ids_BT]), places_N, targets_N]
