"""The backward pass of causal attention where a CPU multiplies bf16 in tiles (AMX).

    build, where blocks are compiled: cpu_attention.cpp --> torch's own compiler and its cache --> a library
    q, k, v, y, logsumexp, dy --> backward --> dq, dk, dv

torch's forward pass is fast there, its backward pass multiplies in small pieces. Where the library is not built, or the
CPU has no such products, torch's pass is taken: the same within bf16's rounding.

Known gaps: bf16 alone; heads that share keys are computed one after another, so a few rows do not fill dozens of cores.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
NOT_ASKED, NO_TILES = "blocks are not compiled", "this CPU has no AMX"

_library: ctypes.CDLL | str = NOT_ASKED
"""The library, or why there is none."""


def build() -> str | None:
    """Compile and load the library, once in a process; returns why that cannot be, None where it is there.

    The first time on a machine takes some ten seconds; torch keeps the result.
    """
    global _library
    if _library == NOT_ASKED:
        _library = _load()
    return _library if isinstance(_library, str) else None


def leave(reason: str) -> None:
    """Take torch's own pass from now on, as another rank must."""
    global _library
    _library = reason


def is_built(dtype: torch.dtype) -> bool:
    """Whether `backward` computes in this dtype."""
    return not isinstance(_library, str) and dtype == torch.bfloat16


def failure() -> str | None:
    """Why there is no library although this CPU has AMX; None where there is one, or nobody asked."""
    return _library if isinstance(_library, str) and _library not in (NOT_ASKED, NO_TILES) else None


def backward(dy_BHTE: Tensor, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, y_BHTE: Tensor,
             logsumexp_BHT: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of causal attention over whole rows; `is_built` must hold.

    Args:
        dy_BHTE: the gradient of y_BHTE.
        q_BHTE: queries, bf16.
        k_BKTE: keys.
        v_BKTE: values.
        y_BHTE: what torch's forward pass gave.
        logsumexp_BHT: its logsumexp of the scores, fp32.

    Returns:
        dq_BHTE, dk_BKTE, dv_BKTE.
    """
    assert not isinstance(_library, str), _library
    B, H, T, E = q_BHTE.shape
    delta_BHT = (dy_BHTE.float() * y_BHTE).sum(-1)
    operands = [one.contiguous() for one in (q_BHTE, k_BKTE, v_BKTE, dy_BHTE, logsumexp_BHT, delta_BHT)]
    gradients = [torch.empty_like(one) for one in operands[:3]]

    pointers = (ctypes.c_void_p(one.data_ptr()) for one in (*operands, *gradients))
    sizes = (ctypes.c_int64(size) for size in (B, H, k_BKTE.shape[1], T, E))
    _library.backward(*pointers, *sizes, ctypes.c_double(E**-0.5))
    dq_BHTE, dk_BKTE, dv_BKTE = gradients
    return dq_BHTE, dk_BKTE, dv_BKTE


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()):
        return NO_TILES

    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(SOURCE.read_text())
        library.supported.restype, library.backward.restype = ctypes.c_bool, None
    except Exception as error:  # a compiler that lacks a header, a cache without room, a torch that moved these names
        return f"cpu_attention.cpp: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return library if library.supported() else "this torch has no products of tiles"
