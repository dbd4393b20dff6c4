"""The backward pass of attention in blocks: as float64's whatever the lengths; else torch's."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.exc import CppCompileError

from ds_slm.model import cpu_attention, decoder, documents, kernels
from ds_slm.recipe import loading

# rows, heads, key heads, tokens, head dimension: whole blocks, one token, odd lengths, more than one block
SHAPES = [(2, 4, 2, 256, 32), (1, 2, 2, 1, 16), (2, 3, 1, 37, 32), (1, 6, 2, 300, 64), (1, 1, 1, 129, 18)]

forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture
def built() -> None:
    """The library; skipped on a CPU without bf16 products."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no AVX-512 bf16")
    assert cpu_attention.build() is None


def random_case(B: int, H: int, K: int, T: int, E: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dy in bf16, as a model's heads lie in memory."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, dy = (torch.randn(B, T, h, E, generator=generator).bfloat16().transpose(1, 2) for h in (H, K, K, H))
    return q, k, v, dy


def exact(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The gradients in float64."""
    q, k, v = (one.double().requires_grad_() for one in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(y, (q, k, v), dy.double())


def error(found: Tensor, wanted: Tensor) -> float:
    """The relative error of a whole tensor."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(built: None, shape: tuple[int, ...]) -> None:
    """Oracle: torch in float64. Measured: 2.2e-3 to 2.9e-3; bf16 rounds by up to 3.9e-3, torch's own pass by 5.3e-3."""
    q, k, v, dy = random_case(*shape)
    y, logsumexp = forward(q, k, v, 0.0, True)
    found = cpu_attention.backward(dy, q, k, v, y, logsumexp)
    for one, wanted in zip(found, exact(q, k, v, dy), strict=True):
        assert one.shape == wanted.shape
        if wanted.norm() > 0:  # a single token's query and key have no gradient
            assert error(one, wanted) < 4e-3


def test_any_number_of_threads_gives_the_same_bits(built: None) -> None:
    """Oracle: one thread, and a second run."""
    q, k, v, dy = random_case(2, 4, 2, 200, 32)
    y, logsumexp = forward(q, k, v, 0.0, True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(cpu_attention.backward(dy, q, k, v, y, logsumexp))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_large_scores_of_later_keys_do_not_count(built: None) -> None:
    """Oracle: float64: a later key whose score would overflow exp changes nothing, and nothing is NaN."""
    q, k, v, dy = random_case(1, 1, 1, 64, 16)
    k[:, :, 32:] *= 100
    y, logsumexp = forward(q, k, v, 0.0, True)
    part = cpu_attention.backward(*(one[:, :, :32] for one in (dy, q, k, v, y, logsumexp)))
    whole = cpu_attention.backward(dy, q, k, v, y, logsumexp)
    assert torch.equal(whole[0][:, :, :32], part[0]) and all(one.isfinite().all() for one in whole)


@pytest.mark.parametrize("lengths", [(64, 64), (64, 40, 24), (1, 63, 33, 31)], ids=str)
def test_plain_and_packed_rows_go_through_it(
    built: None, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """Oracle: torch's own backward pass, within the rounding of both, and a count of the calls."""
    monkeypatch.setattr(kernels, "CALL_SCORES", 0)
    calls: list[int] = []
    backward = cpu_attention.backward
    monkeypatch.setattr(cpu_attention, "backward", lambda *given: calls.append(given[1].shape[2]) or backward(*given))

    q, k, v, dy = random_case(2, 4, 2, 64, 32)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    offsets = None if lengths == (64, 64) else bounds
    found = []
    for _ in range(2):
        own_q, own_k, own_v = (one.detach().clone().requires_grad_() for one in (q, k, v))
        y = kernels.attention(own_q, own_k, own_v, None, causal=offsets is None, offsets_C=offsets)
        found.append([y, *torch.autograd.grad(y, (own_q, own_k, own_v), dy)])
        cpu_attention.disable("the second time without")

    assert calls == ([64] if offsets is None else list(lengths))
    assert torch.equal(found[0][0], found[1][0])
    for ours, torchs in zip(found[0][1:], found[1][1:], strict=True):
        assert error(ours, torchs.double()) < 8e-3


def test_operands_that_are_upcast_go_through_torch(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the environment says that this CPU multiplies in fp32; nothing calls the library, and nothing says so."""
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "upcast")
    monkeypatch.setattr(cpu_attention, "backward", None)
    q, k, v, dy = random_case(1, 2, 1, 40, 16)
    wanted = exact(q, k, v, dy)
    q, k, v = (one.requires_grad_() for one in (q, k, v))
    found = torch.autograd.grad(kernels.attention(q, k, v, None, causal=True), (q, k, v), dy)
    assert all(error(one, other) < 8e-3 for one, other in zip(found, wanted, strict=True))
    assert "blocks" not in kernels.effective_kernels("cpu", torch.bfloat16)["attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_whose_blocks_are_compiled_builds_it(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Oracle: a count of the builds, in bf16 that this CPU multiplies and in fp32."""
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "native")
    built: list[int] = []
    monkeypatch.setattr(cpu_attention, "build", lambda: built.append(1))
    decoder.Decoder(loading.load("demo").model).to(dtype).compile_parts()
    assert len(built) == (dtype == torch.bfloat16)


def test_a_thread_without_memory_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the library's answer, made up: it returns false where a buffer cannot be allocated."""
    monkeypatch.setattr(cpu_attention, "_library", Mock(backward=Mock(return_value=False)))
    q, k, v, dy = random_case(1, 2, 1, 8, 16)
    with pytest.raises(MemoryError, match="over 8 tokens"):
        cpu_attention.backward(dy, q, k, v, dy, torch.zeros(1, 2, 8))


def test_a_compiler_that_fails_leaves_torchs_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the reason is the compiler's own line, nothing is raised, and documents are taken by torch's pass."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    failure = CppCompileError(
        ["g++", "x.cpp"], "x.cpp: In function:\nx.cpp:3:1: fatal error: omp.h: No such file\nended."
    )
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", Mock(side_effect=failure))
    reason = "cpu_attention.cpp: x.cpp:3:1: fatal error: omp.h: No such file"
    assert cpu_attention.build() == reason
    assert not cpu_attention.is_built(torch.bfloat16)
    monkeypatch.setattr(kernels, "multiplies", lambda *_: True)
    assert f"({reason})" in kernels.effective_kernels("cpu", torch.bfloat16)["attention"]

    q, k, v, dy = random_case(1, 2, 1, 40, 16)
    wanted = exact(q, k, v, dy)
    q, k, v = (one.requires_grad_() for one in (q, k, v))
    found = torch.autograd.grad(documents.attend_each(q, k, v, documents.whole_rows(1, 40)), (q, k, v), dy)
    assert all(error(one, other) < 8e-3 for one, other in zip(found, wanted, strict=True))
