"""DeepSpeed's engine behind four verbs: agree, forward_backward, step, evaluate.

    rows of a step -> micro-batches of this rank -> agree: the weights of all ranks' rows, summed
                   -> forward_backward: gradients add up -> step: clipped and applied

A step has one message of ours: after its last backward pass every rank sends its sums, its request, and what the next
step's rows hold. So `agree` sends a message only at the first step of a launch, and if a disk is slow.

The loss of a step is the sum over all its tokens, on all ranks and in all micro-batches, divided by the sum of their
weights: never a mean of means. DeepSpeed divides by the accumulation steps and averages over ranks, so each
micro-batch's objective (a sum) is multiplied by world_size * accumulation_steps / sum of the step's weights.

Ranks talk in two ways. `Control` carries JSON over gloo. A `Vote` asks all ranks, between two micro-batches, whether a
signal has reached any of them (`Interrupt`), so that all stop or save after the same micro-batch (distributed/).
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_slm import pulse
from ds_slm.data.rows import Rows
from ds_slm.distributed.problems import raise_on_all
from ds_slm.distributed.ranks import Control
from ds_slm.distributed.stop import Interrupt, Request, Vote, micro_batches_per_vote
from ds_slm.engine import masters, partitions
from ds_slm.engine.deepspeed_workarounds import import_muon_uncompiled, without_broadcast
from ds_slm.engine.layer_norms import LayerNorms
from ds_slm.engine.optim import build_optimizer, set_learning_rate
from ds_slm.engine.row_reader import Share
from ds_slm.errors import AgreedDataError
from ds_slm.model import kernels
from ds_slm.model.decoder import Decoder
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe.ds_config import EngineConfig
from ds_slm.recipe.schema import Recipe


@dataclass(frozen=True)
class Sums:
    """The sums of a forward over all rows of all ranks, and the means of them."""

    nll: float
    weight: float
    z2: float
    count: float
    nonfinite_ranks: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Weighted mean of the negative log-likelihood, in nats per token."""
        return self.nll / self.weight

    @property
    def mean_z2(self) -> float:
        """Mean of logsumexp squared over the tokens that count."""
        return self.z2 / self.count


@dataclass(frozen=True)
class Totals:
    """What the sums of a step, or of an evaluation, are divided by: known for all ranks before the first forward."""

    weight: float
    """Sum of the loss weights of all targets."""
    count: float
    """Number of targets with a weight above 0."""
    micro_batches_per_vote: int
    """Micro-batches from one vote to the next: more if they are short."""


class Engine:
    """A model under DeepSpeed, with its optimiser."""

    def __init__(
        self, recipe: Recipe, engine_config: EngineConfig, model: Decoder, control: Control, interrupt: Interrupt
    ) -> None:
        import deepspeed

        import_muon_uncompiled()

        self.recipe, self.engine_config, self.control, self.interrupt = recipe, engine_config, control, interrupt

        # DeepSpeed collects garbage ten times during its set-up. Frozen objects, all that was imported, are skipped.
        gc.freeze()

        # process_group.connect() has already made the process group. Rank 0's weights are not sent to all ranks, for
        # they have no values yet: checkpoint/resume.py gives every rank its own, and checks them.
        with without_broadcast():
            self.deepspeed: Any = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, recipe.optimizer),
                config=engine_config.deepspeed,
                dist_init_required=False,
            )[0]
        self._layers = LayerNorms(self.deepspeed) if recipe.run.layers_every_steps else None
        if engine_config.compiled:
            model.compile_parts()

        self.topology = {**partitions.topology(self.deepspeed), "partitions": masters.layout(self.deepspeed, control)}
        """What must be equal for a resumed run to be bit-exact."""
        self.device = torch.device(self.deepspeed.device)
        self.dtype = kernels.DTYPES[recipe.train.precision]
        self._micro_batch_s = 0.0
        self._announced: tuple[Share | None, list[list[float]]] = None, []

        if self.loss_scaler:
            self.loss_scaler.raise_error_at_min_scale = False  # the loop reports it, with the rows

    def agree(self, share: Share) -> Totals:
        """The totals of all ranks' rows, before the first forward. Collective, unless the step before announced them.

        Raises DataError with every rank's problems on all ranks: if one rank ended alone, the others would wait for it.
        """
        announced, said = self._announced
        if share is not announced:
            said = self._gather(torch.tensor(self._described(share), dtype=torch.float64).to(self.device))
        _, problems, weights, counts, durations_s = said
        if any(problems):
            raise_on_all(self.control, share.problems, AgreedDataError)
        return Totals(sum(weights), sum(counts), micro_batches_per_vote(max(durations_s)))

    def forward_backward(
        self, micro_batches: Sequence[Rows], totals: Totals, following: Callable[[], Share | None] = lambda: None
    ) -> Sums:
        """Add up the gradients of a step's rows; `step` applies them. All ranks pass the same number of micro-batches.

        Args:
            micro_batches: this rank's rows of the step.
            totals: what all ranks agreed on.
            following: this rank's share of the next step; None if none follows. Called after the last backward pass.

        Raises:
            Stopped: on all ranks after the same micro-batch, if a signal asks for the end.
        """
        begin_s = time.perf_counter()

        # So that the summed objective / weight = mean of nll, by weight, + z_loss * mean of z^2, by count.
        z_scale = self.recipe.train.z_loss * totals.weight / totals.count
        objective_scale = self.control.world_size * self.engine_config.accumulation_steps / totals.weight
        if not self.deepspeed.module.training:  # after an evaluation: telling every module takes a while
            self.deepspeed.train()

        own: list[Tensor] = []
        for index, rows in enumerate(micro_batches):
            if index:
                self.deepspeed.step()  # between micro-batches it only counts
            sums = self.deepspeed(*self._on_device(rows), z_scale)
            vote = self._start_vote(index, micro_batches, totals)  # its messages travel during the backward pass
            self.deepspeed.backward(sums.objective * objective_scale)
            vote.wait()
            pulse.beat()
            own += sums.nll, sums.z2

        # One message. Only here the step waits for its device: a sum that is not finite must not be applied.
        nll_by_rank, z2_by_rank = self._gather_sums(torch.stack(own).double().view(-1, 2).sum(0), following())
        self._micro_batch_s = (time.perf_counter() - begin_s) / len(micro_batches)

        pairs = zip(nll_by_rank, z2_by_rank, strict=True)
        nonfinite = tuple(rank for rank, pair in enumerate(pairs) if not all(map(math.isfinite, pair)))
        return Sums(sum(nll_by_rank), totals.weight, sum(z2_by_rank), totals.count, nonfinite)

    def step(self, learning_rate: float, show_layers: bool = False) -> bool:
        """Clip, and take one optimiser step; False if it was not taken because a gradient was not finite.

        With `show_layers`, `layer_norms` gives the norms of this step afterwards.
        """
        if show_layers and self._layers:
            self._layers.measure_next_step()
        set_learning_rate(self.deepspeed.optimizer.optimizer, learning_rate)
        self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping. Waits until the device has finished the step."""
        return float(self.deepspeed.get_global_grad_norm())

    def layer_norms(self) -> dict[str, float]:
        """Norms of weights and of gradients before clipping, by layer, of a step with `show_layers`. Collective.

        Only for a recipe with `run.layers_every_steps`: only there is the optimiser hooked.
        """
        assert self._layers is not None, "run.layers_every_steps is not set"
        return self._layers.result(
            self.grad_norm, lambda own: [sum(ranks) for ranks in self._gather(own.to(self.device))]
        )

    @property
    def loss_scaler(self) -> Any:
        """fp16's dynamic loss scaler; None in other precisions."""
        return self.deepspeed.optimizer.loss_scaler if self.recipe.train.precision == "fp16" else None

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Rows], totals: Totals) -> Sums:
        """Sums over held-out rows. All ranks pass the same number of micro-batches.

        Raises Stopped, on all ranks after the same micro-batch, if a signal asks for the end.
        """
        self.deepspeed.eval()
        own = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(micro_batches):
            sums = self.deepspeed(*self._on_device(rows), 0.0)
            own += torch.stack([sums.nll, sums.weight, sums.z2, sums.count]).double()
            self._start_vote(index, micro_batches, totals).wait()
            pulse.beat()
        nll, weight, z2, count = map(sum, self._gather_sums(own))
        return Sums(nll, weight, z2, count)

    @contextmanager
    def eager(self) -> Iterator[nn.Module]:
        """The model without compiled parts, for batches of changing shape."""
        with torch.compiler.set_stance("force_eager"):
            yield self.deepspeed.module

    def _start_vote(self, index: int, micro_batches: Sequence[Rows], totals: Totals) -> Vote:
        """Begin a vote after every few micro-batches; after the last one the requests travel with the sums."""
        done = index + 1
        if done % totals.micro_batches_per_vote or done == len(micro_batches):
            return Vote()
        return self.interrupt.start_vote()

    def _on_device(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, PackedDocuments | None]:
        """Input ids, target ids (the inputs shifted by one) and loss weights, each [B, T], and documents.

        A GPU copies page-locked rows while it computes; they stay as they are until the step is done.
        """
        ids, weights, document_ids = (
            None if array is None else torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (rows.token_ids, rows.weights, rows.document_ids)
        )
        assert ids is not None
        assert weights is not None
        documents = None if document_ids is None else PackedDocuments(document_ids, rows.document_count)
        return ids[:, :-1], ids[:, 1:], weights, documents

    def _described(self, share: Share | None) -> list[float]:
        """What a rank sends about its rows before the first forward: 1, and their sums; zeros if it has none."""
        if share is None:
            return [0.0] * 5
        return [1.0, len(share.problems), share.weight, share.count, self._micro_batch_s]

    def _gather_sums(self, own: Tensor, following: Share | None = None) -> list[list[float]]:
        """Each sum's values on all ranks; what ranks send about the next step's rows is kept for `agree`.

        All ranks' requests are in the same message: Stopped or ReplacedByNewerLaunch may be raised.
        """
        beside = torch.tensor([int(self.interrupt.request), *self._described(following)], dtype=torch.float64)
        gathered = self._gather(torch.cat([own, beside.to(self.device, non_blocking=True)]))
        sums, (requests, *said) = gathered[: len(own)], gathered[len(own) :]
        if following is not None and all(said[0]):  # otherwise a rank has not read its rows yet: `agree` asks
            self._announced = following, said
        self.interrupt.act_on(Request(int(max(requests))))
        return sums

    def _gather(self, own: Tensor) -> list[list[float]]:
        """Each value on all ranks, in the order of ranks: sums in that order have the same bits on every rank."""
        gathered = own
        if self.control.world_size > 1:
            gathered = own.new_empty(self.control.world_size * len(own))
            dist.all_gather_into_tensor(gathered, own)
        return gathered.view(-1, len(own)).T.tolist()
