"""How long one core of this machine takes for a recipe: a few of its own blocks are timed, and the rest counted.

    two models of few blocks, a micro-batch, one thread --> seconds of a block; seconds of all the rest
    the optimiser over the smaller model                --> seconds for each value

A CPU's speed depends on sizes, precision, caches and kernels far more than on a datasheet, so nothing is assumed. The
cores of a machine share caches and memory, so meanwhile the cores of the other ranks compute the same.
Known gaps: rows are not packed; DeepSpeed's copies of gradients and weights are not timed.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore

import torch

from ds_slm.engine.optim import build_optimizer
from ds_slm.engine.trial_pass import TrialPass
from ds_slm.errors import DeviceError
from ds_slm.model import decoder
from ds_slm.model.kernels import DTYPES
from ds_slm.recipe.rates import CoreSpeed
from ds_slm.recipe.schema import Recipe

REPEATS = 3
LOOK_EVERY_S = 1.0
BLOCKS = (1, 3)
"""The number of blocks in each of the two models."""


def core_speed(recipe: Recipe, micro_batch: int, compiled: bool = False, cores: int = 1) -> CoreSpeed:
    """Time one core of this machine.

    Args:
        recipe: what is trained.
        micro_batch: rows of a forward.
        compiled: whether blocks are compiled first, which takes up to a minute where torch's cache does not hold them.
        cores: this one and others, which compute the same meanwhile.

    Raises:
        DeviceError: another core's process ended.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _busy_cores(cores - 1, _with_blocks(recipe, BLOCKS[1]), micro_batch, compiled):
            few_s, more_s = (_micro_batch_s(_with_blocks(recipe, blocks), micro_batch, compiled) for blocks in BLOCKS)
            update_s_per_value = _update_s_per_value(_with_blocks(recipe, BLOCKS[0]))
    finally:
        torch.set_num_threads(threads)

    block_s = max(more_s - few_s, 0.0) / (BLOCKS[1] - BLOCKS[0])
    micro_batch_s = few_s + (recipe.model.num_hidden_layers - BLOCKS[0]) * block_s
    return CoreSpeed(micro_batch_s, update_s_per_value, compiled)


def _with_blocks(recipe: Recipe, blocks: int) -> Recipe:
    shape = recipe.model.model_copy(update={"num_hidden_layers": blocks})
    return recipe.model_copy(update={"model": shape})


@contextmanager
def _busy_cores(count: int, recipe: Recipe, rows: int, compiled: bool) -> Iterator[None]:
    """Other processes compute the same within it. Raises DeviceError if one ends, which most often lacks memory."""
    if not count:
        yield
        return

    spawning = multiprocessing.get_context("spawn")
    ready, others = spawning.Semaphore(0), list[BaseProcess]()
    try:
        for _ in range(count):
            other = spawning.Process(target=_compute, args=(recipe, rows, compiled, ready))
            other.start()
            others.append(other)
        for _ in others:
            while not ready.acquire(timeout=LOOK_EVERY_S):
                _refuse_ended(others)
        yield
        _refuse_ended(others)
    finally:
        for other in others:
            other.kill()
            other.join()


def _refuse_ended(others: list[BaseProcess]) -> None:
    if ended := [other.exitcode for other in others if other.exitcode is not None]:
        raise DeviceError(
            f"{len(ended)} of {len(others)} processes that keep cores busy have ended (exit codes "
            f"{', '.join(map(str, ended))}), most often for lack of memory: name fewer --devices, or omit --measure."
        )


def _compute(recipe: Recipe, rows: int, compiled: bool, ready: Semaphore) -> None:
    """What a busy core does, until the process that started it ends it, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to this process, too
    torch.set_num_threads(1)
    work, parent = _pass(recipe, rows, compiled), multiprocessing.parent_process()
    work()
    ready.release()
    while parent is not None and parent.is_alive():
        work()


def _micro_batch_s(recipe: Recipe, rows: int, compiled: bool) -> float:
    """Seconds of a forward and backward pass, and of adding up its gradients in fp32."""
    return _least_s(_pass(recipe, rows, compiled))


def _pass(recipe: Recipe, rows: int, compiled: bool) -> TrialPass:
    forward_backward = TrialPass(recipe, rows, torch.device("cpu"), DTYPES[recipe.train.precision])
    if compiled:
        forward_backward.model.compile_parts()
    return forward_backward


def _update_s_per_value(recipe: Recipe) -> float:
    """Seconds of the optimiser's step for each value that it updates."""
    model = decoder.build(recipe.model, recipe.train.seed)
    optimizer = build_optimizer(model, recipe.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    values = sum(parameter.numel() for parameter in model.parameters())
    return _least_s(optimizer.step) / values


def _least_s(work: Callable[[], object]) -> float:
    """The least of REPEATS durations; the first run chooses kernels and touches memory, so it does not count."""
    work()
    durations_s = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        work()
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s)
