"""Packed rows without a mask over T x T: the same as with it, value and gradients, on each form."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_slm.model import decoder, documents, kernels, loss
from ds_slm.model.decoder import Decoder
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe.sections import Model

ROWS, TOKENS = 3, 96
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": TOKENS, "init_std": 0.2,
}  # fmt: skip
LENGTHS = ((40, 1, 55), (96,), (33, 33, 30))

pytestmark = pytest.mark.usefixtures("one_thread")


def document_ids() -> Tensor:
    """Documents of LENGTHS, the last of each row the padding; ids come again in a row."""
    names = ((0, 1, 0), (5,), (0, 1, -1))
    rows = [torch.tensor(name).repeat_interleave(torch.tensor(long)) for name, long in zip(names, LENGTHS, strict=True)]
    return torch.stack(rows).int()


def varlen_by_loop(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch's varlen_attn promises, one sequence after another on any device."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert all(one.is_contiguous() and one.dim() == 3 for one in (query, key, value))
    offsets = cu_seq_q.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(query)
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    assert min(lengths) >= 0 and max(lengths) <= max_q == max_k
    parts = [
        F.scaled_dot_product_attention(
            *(one.transpose(0, 1).unsqueeze(0) for one in part), is_causal=True, enable_gqa=enable_gqa
        )[0].transpose(0, 1)
        for part in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        if len(part[0])
    ]
    return torch.cat(parts)


@pytest.fixture(params=["each", "varlen", "varlen without groups"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses the form without a mask, or the mask. A GPU's form runs on the CPU, its kernel as a loop."""
    if request.param == "varlen without groups":  # as in torch 2.11
        monkeypatch.setattr(documents, "varlen_parameters", lambda: frozenset({"window_size"}))
    if request.param != "each":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
        monkeypatch.setattr(
            kernels, "attend_each", lambda q, k, v, offsets_C: documents.attend_varlen(q, k, v, offsets_C)
        )
    return lambda yes: monkeypatch.setattr(kernels, "CALL_SCORES", 0 if yes else 1 << 40)


def gradients(model: Decoder, document_ids_BT: Tensor) -> dict[str, Tensor]:
    """The loss sums and the gradient of each parameter."""
    generator = torch.Generator().manual_seed(1)
    ids_BT, targets_BT = (torch.randint(96, (ROWS, TOKENS), generator=generator) for _ in range(2))
    model.zero_grad()
    sums = model(ids_BT, targets_BT, sight=PackedDocuments(document_ids_BT))
    sums.objective.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return found | {"objective": sums.objective.detach()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "changes", [{}, {"exclusive_attention": True}, {"num_key_value_heads": 4, "qk_norm": True}], ids=str
)
def test_a_model_is_the_same_with_documents_cut_and_masked(
    changes: dict[str, Any], recompute: bool, cut: Callable[[bool], None]
) -> None:
    """Oracle: a mask over T x T, in fp32: the loss and every gradient, beside the largest value of each."""
    model = decoder.build(Model(**(SMALL | changes)), 0, recompute)
    found = {}
    for yes in (True, False):
        cut(yes)
        found[yes] = gradients(model, document_ids())
    assert (
        model.model.packed_positions(PackedDocuments(document_ids())).mask_BTS is not None
    )  # the second one was masked
    for name, wanted in found[False].items():
        error = (found[True][name] - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_half_precision_is_the_masked_one_within_its_error(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a mask over T x T in fp32 on the same half-precision operands; y is within two roundings of it."""
    q, k, v = (torch.randn(ROWS, heads, TOKENS, 16).to(dtype) for heads in (4, 2, 2))
    starts_BT = documents.starts_of(document_ids())
    got = kernels.attention(q, k, v, None, False, documents.offsets_of(starts_BT, 7))
    _, mask_BTT = decoder.packed(document_ids())
    wanted = kernels.attention(q.float(), k.float(), v.float(), mask_BTT, False)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_compiled_documents_are_one_graph_for_all_lengths() -> None:
    """Oracle: the eager values and gradients, to the last bit; how often the compiler is asked for a graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    from torch._dynamo.backends.debugging import aot_eager

    def weighted(q: Tensor, k: Tensor, v: Tensor, offsets_C: Tensor) -> Tensor:
        return (kernels.attention(q * 2, k, v, None, False, offsets_C) * v.repeat_interleave(2, 1)).sum()

    compiled = torch.compile(weighted, backend=backend, fullgraph=True, dynamic=False)
    for ids_BT in (document_ids(), document_ids().flip(1), torch.zeros(ROWS, TOKENS)):
        operands = [torch.randn(ROWS, heads, TOKENS, 16, requires_grad=True) for heads in (4, 2, 2)]
        starts_BT = documents.starts_of(ids_BT)
        offsets_C = documents.offsets_of(starts_BT, int(starts_BT.sum()))
        found = []
        for function in (weighted, compiled):
            value = function(*operands, offsets_C)
            found.append([value.detach(), *torch.autograd.grad(value, operands)])
        for eager, other in zip(*found, strict=True):
            assert torch.equal(eager, other)
    assert len(graphs) == 1


def test_a_compiled_model_has_one_graph_for_few_and_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose offsets are padded to other lengths. Oracle: how often the compiler is asked for a graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(kernels, "CALL_SCORES", 0)
    monkeypatch.setattr("ds_slm.model.loss._compiled", lambda: loss._from_logits)
    model = decoder.build(Model(**SMALL), 0)
    for block in model.model.layers:
        block.compile(dynamic=False, backend=backend)
    model.compiled = True

    lengths = set()
    for long in (48, 8, 3):
        ids_BT = (torch.arange(TOKENS, dtype=torch.int32) // long).expand(ROWS, -1)
        packed = PackedDocuments(ids_BT)
        offsets_C = model.model.packed_positions(packed).offsets_C
        assert offsets_C is not None
        lengths.add(len(offsets_C))
        model(torch.zeros(ROWS, TOKENS, dtype=torch.long), sight=packed)
    assert len(lengths) == 3 and len(graphs) == 1


def test_gradients_of_a_spread_sum_and_of_strided_operands() -> None:
    """Oracle: attention of each document by torch's own autograd; the gradient of a sum has no memory of its own."""
    ids_BT = document_ids()
    starts_BT = documents.starts_of(ids_BT)
    operands = [torch.randn(ROWS, TOKENS, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = (one.transpose(1, 2) for one in operands)
    got = torch.autograd.grad(
        kernels.attention(q, k, v, None, False, documents.offsets_of(starts_BT, 7)).sum(), operands
    )
    places = [
        (row, slice(sum(longs[:i]), sum(longs[: i + 1])))
        for row, longs in enumerate(LENGTHS)
        for i in range(len(longs))
    ]
    total = sum(
        F.scaled_dot_product_attention(*(x[row, :, at] for x in (q, k, v)), is_causal=True, enable_gqa=True).sum()
        for row, at in places
    )
    for mine, theirs in zip(got, torch.autograd.grad(total, operands), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_offsets_are_the_runs_and_then_empty_documents() -> None:
    """Oracle: itertools.groupby over each row; the number of rows and the mean per row decide the length alone."""
    for ids_BT in (document_ids(), torch.arange(TOKENS).expand(ROWS, -1) // 5, torch.zeros(1, 7)):
        lengths = [len(list(run)) for row in ids_BT.tolist() for _, run in itertools.groupby(row)]
        begins = list(itertools.accumulate(lengths, initial=0))
        offsets_C = documents.offsets_of(documents.starts_of(ids_BT), len(begins) - 1)
        assert offsets_C.dtype == torch.int32
        assert offsets_C[: len(begins)].tolist() == begins
        assert set(offsets_C[len(begins) :].tolist()) <= {ids_BT.numel()}
        assert len(offsets_C) == documents.padded_count(len(begins) - 1, len(ids_BT)) + 1
    padded = {(count, rows): documents.padded_count(count, rows) for count, rows in ((4, 4), (32, 4), (33, 4), (99, 1))}
    assert padded == {(4, 4): 32, (32, 4): 32, (33, 4): 64, (99, 1): 128}


def test_many_short_documents_are_masked_on_a_cpu() -> None:
    """Oracle: the border as measured, with 4 heads and 256 tokens a row between 24 and 32 tokens a document."""
    model = decoder.build(Model(**(SMALL | {"max_position_embeddings": 256})), 0).model
    masked = {
        length: model.packed_positions(PackedDocuments(torch.arange(256).expand(2, -1) // length)).mask_BTS is not None
        for length in (4, 24, 32, 256)
    }
    assert masked == {4: True, 24: True, 32: False, 256: False}


@pytest.mark.parametrize(
    ("changed", "name", "why"),
    [
        ({}, "varlen", ""),
        ({"dtype": torch.float16}, "varlen", ""),
        ({"dtype": torch.float32}, "mask", "the flash kernel needs bf16 or fp16"),
        ({"ampere": False}, "mask", "a GPU from Ampere on"),
        ({"head_dim": 20}, "mask", "no head_dim of 20"),
        ({"head_dim": 264}, "mask", "no head_dim of 264"),
        ({"parameters": frozenset()}, "mask", f"torch {torch.__version__} has no causal varlen_attn"),
        ({"parameters": frozenset({"window_size"})}, "varlen", ""),
        ({"device": "cpu"}, "each", ""),
    ],
)
def test_one_rule_chooses_the_form_and_tells_why_not(
    changed: dict[str, Any], name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what torch's flash kernel accepts: its checks; and the words at the start of a run."""
    given: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64} | changed
    monkeypatch.setattr(kernels, "_is_ampere_or_newer", lambda: changed.get("ampere", True))
    parameters = changed.get("parameters", frozenset({"window_size", "enable_gqa"}))
    monkeypatch.setattr(kernels, "varlen_parameters", lambda: parameters)
    device, dtype, head_dim = given["device"], given["dtype"], given["head_dim"]
    form = kernels.packed_form(device, dtype, head_dim)
    assert form.name == name and why in form.why and bool(form.why) == (name == "mask")
    said = kernels.effective_kernels(device, dtype, head_dim)["attention"]
    assert ("dense mask of packed rows" in said) == (name == "mask") and form.why in said
    assert "packed" not in kernels.effective_kernels(device, dtype)["attention"]


def test_this_torch_has_the_grouped_entry() -> None:
    """Oracle: torch's release notes: `enable_gqa` came with 2.12."""
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    assert {"window_size", "enable_gqa"} <= documents.varlen_parameters() or release < (2, 12)
