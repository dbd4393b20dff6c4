"""torch's compiler tests each vector instruction set of a CPU at every start: those that passed once are believed.

    a set's name, torch's test program --> passed before (CACHE/instruction_sets.json)? --> True
                                                                                       --> torch's own test

A test loads a library in a process of its own, one rank after another: ten of them take two seconds.

Known gap: what a result depends on beside the compiler, the CPU's model and torch is not looked at; torch's own test
runs again where the file is removed.
"""

import os
import platform
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ds_slm.engine.result_cache import ResultCache
from ds_slm.run import measure, software


def believe_passed_tests() -> None:
    """Let torch's compiler ask the file first, from now on. Does nothing where this torch has no such test."""
    from torch._inductor import cpu_vec_isa

    test = getattr(cpu_vec_isa.VecISA, "check_build", None)
    if test is None or hasattr(test, "__wrapped__"):
        return
    cache, conditions = ResultCache("instruction_sets"), _conditions()

    @wraps(test)
    def passes(self: Any, code: str) -> bool:
        key = {**conditions, "set": str(self), "program": code}
        if cache.load(key) is True:
            return True
        passed = bool(test(self, code))
        if passed:
            cache.store(key, True)
        return passed

    cpu_vec_isa.VecISA.check_build = passes


def _conditions() -> dict[str, Any]:
    """What a result depends on."""
    compiler = software.find_compiler("cpu")
    return {
        "compiler": [software.size_and_mtime(Path(compiler).resolve()) if compiler else None, os.environ.get("CXX")],
        "cpu": measure.device_name(torch.device("cpu")),
        "versions": [torch.__version__, platform.platform()],
    }
