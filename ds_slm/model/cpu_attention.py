"""The backward pass of causal attention where a CPU multiplies bf16 (AVX-512 bf16, AMX).

    build, where blocks are compiled: cpu_attention.cpp --> torch's own compiler and its cache --> a library
    q, k, v, y, logsumexp, dy --> backward --> dq, dk, dv

On such a CPU torch's forward pass is fast, but its backward pass multiplies in small pieces. If the library is not
built, or the CPU does not have such products, torch's pass is used: the same within bf16's rounding.

Known gaps: only bf16; heads that share keys are computed one after another, so a few rows do not fill dozens of cores.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ds_slm.errors import error_line

SOURCE = Path(__file__).with_suffix(".cpp")
NO_INSTRUCTIONS = "this CPU has no AVX-512 bf16"

_library: ctypes.CDLL | None = None
_failure: str | None = None
"""Why there is no library although it was asked for."""


def build() -> str | None:
    """Compile and load the library, once in a process; returns why that failed, None if it worked.

    The first time on a machine takes some ten seconds; torch keeps the result.
    """
    global _library, _failure
    if _library is None and _failure is None:
        _library, _failure = _load()
    return _failure


def disable(reason: str) -> None:
    """Use torch's own pass from now on, so that all ranks use the same."""
    global _library, _failure
    _library, _failure = None, reason


def is_built(dtype: torch.dtype) -> bool:
    """Whether `backward` computes in this dtype."""
    return _library is not None and dtype == torch.bfloat16


def failure() -> str | None:
    """Why there is no library; None if there is one, or if nobody asked for it."""
    return _failure


def backward(dy_BHTE: Tensor, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, y_BHTE: Tensor,
             logsumexp_BHT: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of causal attention over whole rows; `is_built` must hold.

    Args:
        dy_BHTE: the gradient of y_BHTE.
        q_BHTE: queries, bf16.
        k_BKTE: keys.
        v_BKTE: values.
        y_BHTE: the output of torch's forward pass.
        logsumexp_BHT: the logsumexp of the scores in that pass, fp32.

    Returns:
        dq_BHTE, dk_BKTE, dv_BKTE.

    Raises:
        MemoryError: there is no memory for a head's operands.
    """
    assert _library is not None, _failure
    B, H, T, E = q_BHTE.shape
    delta_BHT = (dy_BHTE.float() * y_BHTE).sum(-1)
    operands = [one.contiguous() for one in (q_BHTE, k_BKTE, v_BKTE, dy_BHTE, logsumexp_BHT, delta_BHT)]
    gradients = [torch.empty_like(one) for one in operands[:3]]

    pointers = (ctypes.c_void_p(one.data_ptr()) for one in (*operands, *gradients))
    sizes = (ctypes.c_int64(size) for size in (B, H, k_BKTE.shape[1], T, E))
    if not _library.backward(*pointers, *sizes, ctypes.c_double(E**-0.5)):
        raise MemoryError(f"attention's backward pass over {T} tokens has no memory for its buffers")
    dq_BHTE, dk_BKTE, dv_BKTE = gradients
    return dq_BHTE, dk_BKTE, dv_BKTE


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()):
        return None, NO_INSTRUCTIONS

    try:
        from torch._inductor.codecache import CppCodeCache

        # torch keeps it by its text, also for the next version of torch, which would load what fits no more.
        library = CppCodeCache.load(f"// torch {torch.__version__}\n{SOURCE.read_text()}")
        library.supported.restype = library.backward.restype = ctypes.c_bool
    except Exception as error:  # a compiler that lacks a header, a cache without room, a torch that moved these names
        return None, f"cpu_attention.cpp: {error_line(str(error)) or repr(error)}"
    return (library, None) if library.supported() else (None, "this torch has no such products")
