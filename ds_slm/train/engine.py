"""DeepSpeed's engine behind four verbs: start, forward_backward, step, evaluate.

    rows of a step -> micro-batches of this rank -> forward, backward (gradients add up) -> step

The loss of a step is the sum over all its tokens, on all ranks and in all micro-batches, divided by the sum of their
weights: never a mean of means. DeepSpeed divides by the accumulation steps and averages over ranks, so each
micro-batch's objective (a sum) is multiplied by world_size * accumulation_steps / sum of the step's weights.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_slm.data.rows import Rows
from ds_slm.errors import RAISED_ON_ALL_RANKS, AgreedDataError, DeviceError
from ds_slm.model import kernels
from ds_slm.model.decoder import Decoder
from ds_slm.recipe.schema import Recipe
from ds_slm.train import masters, rendezvous, zero_state
from ds_slm.train.control import Control
from ds_slm.train.ds_config import Joined
from ds_slm.train.interrupt import Interrupt, Wish, micro_batches_per_vote
from ds_slm.train.optim import build_optimizer, set_learning_rate
from ds_slm.train.row_reader import Share
from ds_slm.train.store import first_line, taken

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sums:
    """Sums over all rows of all ranks."""

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
    """What all ranks' rows of a step, or of an evaluation, add up to: known before the first forward."""

    weight: float
    count: float
    """Tokens of a weight above 0."""
    micro_batches_per_vote: int


def device_type() -> str:
    """'cpu', or the accelerator DeepSpeed found."""
    return _accelerator().device_name()


def current_device() -> torch.device:
    """This rank's device, once it is connected."""
    kind = device_type()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _accelerator() -> Any:
    if not (torch.version.cuda or torch.version.hip):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches, and warns that it found none
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def refuse_missing_precision(precision: str) -> None:
    """Raise DeviceError where the device cannot compute in the recipe's precision, ConfigError where it is told how in
    unknown words.
    """
    kernels.chosen_products()
    device = _accelerator()
    supported = {
        "fp32": True,
        "fp16": bool(device.is_fp16_supported()),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if device.device_name() == "cuda" else True,
    }
    if not supported[precision]:
        others = " or ".join(f"--set train.precision={name}" for name, there in supported.items() if there)
        raise DeviceError(
            f"train.precision = {precision!r}: this device ({device.device_name()}) lacks it; use {others}."
        )


def connect() -> Control:
    """Join the process group of all ranks, which have met. The backend is DeepSpeed's choice: gloo or nccl.

    Raises:
        DeviceError: a device that is not there, or a host that the others cannot reach.
    """
    import deepspeed

    # A shared-memory all-reduce for CPU inference, compiled with g++ at every first start (minutes on a small machine;
    # a process killed meanwhile leaves a lock that hangs the next). Training never calls it.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    if device_type() == "cuda":
        local_rank = rendezvous.current().world.local_rank
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} CUDA devices: give it fewer "
                "slots in the hostfile, or widen CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        world = rendezvous.current().world
        if world.size == 1:
            raise DeviceError(taken(world)) from error
        raise DeviceError(f"the ranks cannot connect to each other: {first_line(error)}.") from error
    return Control()


def _import_muon_uncompiled() -> None:
    """DeepSpeed asks whether the optimiser is its Muon. Importing that loads all of torch's compiler, for seconds."""
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def share_cores(control: Control, zero: Mapping[str, Any]) -> int:
    """Let ranks that compute on the same cores of a host share them out; returns the threads of this rank. Collective.

    Without it each of them starts as many threads as there are cores. Ranks compute on cores where there is no GPU, and
    where the optimiser is offloaded. OMP_NUM_THREADS is heeded: whoever sets it has chosen.

    Args:
        control: the ranks' connection.
        zero: DeepSpeed's zero_optimization section.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    machine = control.leaders_of_ranks[control.rank]
    everyone = control.gather([machine, cores])
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if "OMP_NUM_THREADS" not in os.environ and (device_type() == "cpu" or offloads):
        threads = max(torch.get_num_threads() // everyone.count([machine, cores]), 1)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # bitsandbytes has an OpenMP of its own, loaded later
    return torch.get_num_threads()


@contextmanager
def connected() -> Iterator[Control]:
    """The process group, left where all ranks leave alike. After any other error it stays: the process ends with it."""
    control = connect()
    try:
        yield control
    except RAISED_ON_ALL_RANKS:
        disconnect(control)
        raise
    disconnect(control)


def disconnect(control: Control) -> None:
    """Leave the process group. Collective: only where all ranks leave alike, for another may be inside a collective."""
    rendezvous.current().close()
    control.barrier()
    dist.destroy_process_group()


class Engine:
    """A model under DeepSpeed, with its optimiser."""

    def __init__(self, recipe: Recipe, joined: Joined, model: Decoder, control: Control, interrupt: Interrupt) -> None:
        import deepspeed

        _import_muon_uncompiled()
        self.recipe, self.joined, self.control, self.interrupt = recipe, joined, control, interrupt
        self.deepspeed: Any = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, recipe.optimizer),
            config=joined.deepspeed,
            dist_init_required=False,
        )[0]
        if joined.compiled:
            model.compile_parts()
        self.topology = {**zero_state.topology(self.deepspeed), "partitions": masters.layout(self.deepspeed, control)}
        """What must be equal for a return to be bit-exact."""
        self.device = torch.device(self.deepspeed.device)
        self.dtype = DTYPES[recipe.train.precision]
        self._micro_batch_s = 0.0
        if self.loss_scaler:
            self.loss_scaler.raise_error_at_min_scale = False  # the loop tells it, with the rows

    def agree(self, share: Share) -> Totals:
        """What all ranks' rows add up to, before the first forward. Collective.

        Raises DataError with every rank's problems on all ranks: one that left alone would keep the others waiting.
        """
        weight = sum(float(rows.weights.sum()) for rows in share.micro_batches)
        count = sum(float((rows.weights > 0).sum()) for rows in share.micro_batches)
        own = torch.tensor([len(share.problems), weight, count, self._micro_batch_s], dtype=torch.float64)
        problems, weights, counts, durations_s = self._gather(own.to(self.device))
        if any(problems):
            self.raise_together(share.problems)
        return Totals(sum(weights), sum(counts), micro_batches_per_vote(max(durations_s)))

    def raise_together(self, problems: Sequence[str]) -> None:
        """Raise DataError with every rank's problems, on all ranks, where any has one. Collective."""
        if everyones := list(dict.fromkeys(p for those in self.control.gather(list(problems)) for p in those)):
            raise AgreedDataError(everyones)

    def forward_backward(self, micro_batches: Sequence[Rows], totals: Totals) -> Sums:
        """Add up the gradients of a step's rows; `step` applies them. Every rank passes as many micro-batches.

        Raises Stopped, on all ranks after the same micro-batch, where a signal asks for the end.
        """
        begin_s = time.perf_counter()
        z_scale = self.recipe.train.z_loss * totals.weight / totals.count
        scale = self.control.world_size * self.joined.accumulation_steps / totals.weight
        self.deepspeed.train()
        nll, z2 = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(micro_batches):
            if index:
                self.deepspeed.step()  # between micro-batches it only counts
            sums = self.deepspeed(*self._on_device(rows), z_scale)
            heed = self._vote(index, micro_batches, totals)  # its messages travel behind the backward pass
            self.deepspeed.backward(sums.objective * scale)
            heed()
            nll, z2 = nll + sums.nll, z2 + sums.z2

        nll_by_rank, z2_by_rank = self._gather_sums(nll, z2)
        self._micro_batch_s = (time.perf_counter() - begin_s) / len(micro_batches)
        pairs = zip(nll_by_rank, z2_by_rank, strict=True)
        nonfinite = tuple(rank for rank, pair in enumerate(pairs) if not all(map(math.isfinite, pair)))
        return Sums(sum(nll_by_rank), totals.weight, sum(z2_by_rank), totals.count, nonfinite)

    def step(self, learning_rate: float) -> bool:
        """Clip, and take one optimiser step; False where it was not taken because a gradient was not finite."""
        set_learning_rate(self.deepspeed.optimizer.optimizer, learning_rate)
        self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.deepspeed.get_global_grad_norm())

    @property
    def loss_scaler(self) -> Any:
        """fp16's dynamic loss scaler; None in other precisions."""
        return self.deepspeed.optimizer.loss_scaler if self.recipe.train.precision == "fp16" else None

    def synchronise(self) -> None:
        """Wait for the device: a clock read earlier says when its work was handed over, not when it was done."""
        _accelerator().synchronize()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Rows], totals: Totals) -> Sums:
        """Sums over held-out rows. Every rank passes as many micro-batches. Raises Stopped as `forward_backward`."""
        self.deepspeed.eval()
        own = torch.zeros(4, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(micro_batches):
            sums = self.deepspeed(*self._on_device(rows), 0.0)
            own += torch.stack([sums.nll, sums.weight, sums.z2, sums.count]).double()
            self._vote(index, micro_batches, totals)()
        nll, weight, z2, count = map(sum, self._gather_sums(*own))
        return Sums(nll, weight, z2, count)

    @contextmanager
    def eager(self) -> Iterator[nn.Module]:
        """The model without compiled parts, for batches of changing shape."""
        with torch.compiler.set_stance("force_eager"):
            yield self.deepspeed.module

    def _vote(self, index: int, micro_batches: Sequence[Rows], totals: Totals) -> Callable[[], None]:
        """Begin to vote after a micro-batch where it is time to; the last one's vote goes along with the sums."""
        done = index + 1
        if done % totals.micro_batches_per_vote or done == len(micro_batches):
            return lambda: None
        return self.interrupt.vote()

    def _on_device(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A GPU copies page-locked rows while it computes; they stay as they are until the step is done."""
        ids, weights, documents = (
            None if array is None else torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (rows.token_ids, rows.weights, rows.document_ids)
        )
        assert ids is not None
        assert weights is not None
        return ids[:, :-1], ids[:, 1:], weights, documents

    def _gather_sums(self, *own: Tensor) -> list[list[float]]:
        """Each sum's values on all ranks; their wishes go along. Raises Stopped or Superseded where any has one."""
        wish = torch.tensor([int(self.interrupt.wish)], dtype=torch.float64).to(self.device)
        *sums, wishes = self._gather(torch.cat([torch.stack(own), wish]))
        self.interrupt.act_on(Wish(int(max(wishes))))
        return sums

    def _gather(self, own: Tensor) -> list[list[float]]:
        """Each value on all ranks, in the order of ranks: sums in that order are the same bits on every rank."""
        gathered = own
        if self.control.world_size > 1:
            gathered = own.new_empty(self.control.world_size * len(own))
            dist.all_gather_into_tensor(gathered, own)
        return gathered.view(-1, len(own)).T.tolist()
