"""What is replaced in DeepSpeed, and why: all of it is private, and was tried with the version of constraints.txt.

with replaced(owner, name, value):    an attribute has another value here, and its own again afterwards
"""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

MISSING = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module, class or object another value. One that it inherits is inherited again after."""
    own = vars(owner).get(name, MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def without_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for inference on a CPU; training never calls it.

    It would do so at every first start, for minutes on a small machine, and a process that is killed meanwhile leaves
    a lock on which the next one hangs.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon with compile() switched off: otherwise it loads torch's whole compiler, for seconds.

    DeepSpeed imports Muon itself, to ask whether the optimiser is one.
    """
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    with replaced(compiler, "compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def without_broadcast() -> AbstractContextManager[None]:
    """Keep DeepSpeed's initialize() from sending rank 0's weights to all ranks."""
    import deepspeed

    return replaced(deepspeed.DeepSpeedEngine, "_broadcast_model", lambda engine: None)
