"""The chunked loss against the whole one."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ds_slm.data.rows import Rows
from ds_slm.model import decoder, loss
from ds_slm.model.decoder import build
from ds_slm.model.loss import Targets, chunked_loss
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model
from ds_slm.recipe.sizes import loss_chunk_tokens
from tests.support import runs

pytestmark = pytest.mark.usefixtures("one_thread")


class Problem(NamedTuple):
    hidden_ND: torch.Tensor
    head_weight_VD: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor

    def loss(self, z_scale=0.0, chunk_tokens=None):
        targets = Targets(self.targets_N, self.weights_N, z_scale)
        return chunked_loss(self.hidden_ND, self.head_weight_VD, targets, chunk_tokens)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loading.load(str(runs.write_recipe(tmp_path)))


def problem(tokens=37, size=16, vocabulary=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights_N = torch.rand(tokens, generator=generator)
    weights_N[::5] = 0
    return Problem(
        (torch.randn(tokens, size, generator=generator) * 2).to(dtype).requires_grad_(),
        torch.randn(vocabulary, size, generator=generator).to(dtype).requires_grad_(),
        torch.randint(vocabulary, (tokens,), generator=generator),
        weights_N,
    )


def whole_loss(given, z_scale):
    """The definition in float64: F.cross_entropy and logsumexp over all logits; returns sums and gradients."""
    hidden_ND, head_weight_VD = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    weights_N = given.weights_N.double()
    logits_NV = hidden_ND @ head_weight_VD.T
    nll = (weights_N * F.cross_entropy(logits_NV, given.targets_N, reduction="none")).sum()
    z2 = logits_NV.logsumexp(-1)[weights_N > 0].square().sum()
    (nll + z_scale * z2).backward()
    return nll.detach(), z2.detach(), hidden_ND.grad, head_weight_VD.grad


@pytest.mark.parametrize("z_scale", [0.0, 0.03])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 37, 1000, None])
def test_value_and_gradients_are_those_of_the_whole_loss(chunk_tokens, z_scale):
    """Oracle: F.cross_entropy plus z-loss in float64."""
    given = problem()
    nll, z2, d_hidden_ND, d_weight_VD = whole_loss(given, z_scale)
    sums = given.loss(z_scale, chunk_tokens)
    (sums.objective * 0.5).backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sums.nll.double(), nll, **close)
    torch.testing.assert_close(sums.z2.double(), z2, **close)
    torch.testing.assert_close(sums.objective.double(), nll + z_scale * z2, **close)
    torch.testing.assert_close(given.hidden_ND.grad.double(), d_hidden_ND / 2, **close)
    torch.testing.assert_close(given.head_weight_VD.grad.double(), d_weight_VD / 2, **close)
    assert sums.weight == given.weights_N.sum() and sums.count == (given.weights_N > 0).sum()
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in sums)
    assert [value.requires_grad for value in sums] == [True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_half_precision_gradients_are_near_the_exact_ones(dtype):
    """Oracle: float64 on the same rounded inputs; errors stay at the size of the dtype's rounding, without a bias."""
    given = problem(tokens=300, dtype=dtype)
    nll, _, *exact = whole_loss(given, 0.01)
    sums = given.loss(0.01, 64)
    (sums.objective * (2 / 3)).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(sums.nll.double(), nll, rtol=eps, atol=0)
    for tensor, wanted in zip(given[:2], exact, strict=True):
        assert tensor.grad.dtype == dtype
        got, wanted = tensor.grad.double(), wanted * (2 / 3)
        torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=4 * eps * wanted.abs().max().item())
        assert got.norm().item() == pytest.approx(wanted.norm().item(), rel=eps / 4)


@pytest.mark.usefixtures("products")
def test_small_weights_survive_fp16():
    """Oracle: float64; a loss scale of 2^16 is applied, as in training, only after the gradient was formed."""
    given = problem(dtype=torch.float16)
    given.weights_N.mul_(1e-6)
    _, _, d_hidden_ND, _ = whole_loss(given, 0.0)
    (given.loss().objective * 2**16).backward()
    wanted = d_hidden_ND * 2**16
    torch.testing.assert_close(given.hidden_ND.grad.double(), wanted, rtol=0.02, atol=0.01 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("products")
def test_a_padded_vocabulary_changes_nothing(monkeypatch, dtype):
    """Oracle: the loss without padding: 50 ids padded to 64, where a GPU's products want it."""
    given, padded = problem(dtype=dtype), problem(dtype=dtype)
    monkeypatch.setitem(loss.ALIGNMENT, "cpu", 1)
    wanted = given.loss(0.1, 8)
    monkeypatch.setitem(loss.ALIGNMENT, "cpu", 64)
    got = padded.loss(0.1, 8)
    (wanted.objective + got.objective).backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-5, atol=0)
    torch.testing.assert_close(padded.hidden_ND.grad, given.hidden_ND.grad, **close)
    torch.testing.assert_close(padded.head_weight_VD.grad, given.head_weight_VD.grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("products")
def test_tokens_of_weight_zero_add_exactly_nothing(dtype):
    """Oracle: zero; their hidden states are infinite or enormous and their targets outside the vocabulary."""
    given = problem(dtype=dtype)
    given.weights_N.zero_()
    given.targets_N.fill_(-100)
    with torch.no_grad():
        given.hidden_ND.fill_(1e38)[3:5] = torch.inf
    sums = given.loss(0.1, 8)
    sums.objective.backward()
    assert [value.item() for value in sums] == [0, 0, 0, 0, 0]
    assert not given.hidden_ND.grad.any() and not given.head_weight_VD.grad.any()


def test_masked_tokens_do_not_touch_the_others():
    """Oracle: the loss of the remaining tokens alone."""
    given = problem()
    kept_N = given.weights_N > 0
    with torch.no_grad():
        given.hidden_ND[~kept_N] = torch.nan
    alone = Problem(given.hidden_ND[kept_N], given.head_weight_VD, given.targets_N[kept_N], given.weights_N[kept_N])
    for got, wanted in zip(given.loss(0.1), alone.loss(0.1), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_sums_of_parts_are_the_sum_of_the_whole():
    """Oracle: one call over all tokens: what lets a step be split into micro-batches and ranks at will."""
    given = problem()
    parts = [
        Problem(given.hidden_ND[part], given.head_weight_VD, given.targets_N[part], given.weights_N[part]).loss(0.1)
        for part in (slice(0, 11), slice(11, None))
    ]
    for got, wanted in zip(map(sum, zip(*parts, strict=True)), given.loss(0.1), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_evaluation_forms_no_gradient():
    """Oracle: the same sums, from one matrix product a chunk instead of three."""
    given, products = problem(), []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_))
            return function(*args, **(kwargs or {}))

    with CountProducts():
        wanted = given.loss(0.1, 8)
        assert sum(products) == 3 * 5
        products.clear()
        with torch.no_grad():
            got = given.loss(0.1, 8)
        assert sum(products) == 5
    torch.testing.assert_close(tuple(got), tuple(value.detach() for value in wanted), rtol=0, atol=0)
    assert not got.objective.requires_grad


def test_evaluation_takes_the_compiled_graph_of_training(monkeypatch):
    """Oracle: how often the compiler is asked for a graph; the eager loss, to the last bit."""
    graphs, given = [], problem()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(loss, "_compiled", lambda: torch.compile(loss._from_logits, dynamic=False, backend=backend))
    targets, wanted = Targets(given.targets_N, given.weights_N, 0.1), given.loss(0.1)
    for z_scale in (0.1, 0.2):
        chunked_loss(*given[:2], targets._replace(z_scale=z_scale), compiled=True).objective.backward()
    with torch.no_grad():
        got = chunked_loss(*given[:2], targets, compiled=True)
    torch.testing.assert_close(got.nll, wanted.nll, rtol=0, atol=0)
    assert len(graphs) == 1


def test_a_target_outside_the_vocabulary_is_an_error():
    """Oracle: torch's own check; a counted token must never be dropped in silence."""
    given = problem()
    given.targets_N[1] = 50
    with pytest.raises((IndexError, RuntimeError)):
        given.loss()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_comes_near_the_logits_of_all_tokens(dtype):
    """Oracle: every operation of forward and backward of a whole model, watched: at 32,768 tokens, a tenth at most."""
    shape = Model(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=512,
        max_position_embeddings=128,
    )
    model = build(shape, seed=0).to(dtype)
    ids_BT = torch.randint(512, (256, 129), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as seen:
        model(ids_BT[:, :-1], ids_BT[:, 1:], z_scale=1e-4).objective.backward()
    assert 0 < seen.elements <= 32_768 * 512 / 10


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("vocabulary", [65, 4096, 8192, 32_000, 100_277])
def test_chunks_stay_under_a_tenth_of_32768_tokens(device_type, vocabulary):
    """Oracle: the promise, by arithmetic, for every vocabulary of the recipes and both kinds of device."""
    assert 1 <= loss_chunk_tokens(device_type, vocabulary) <= 3276


def test_rows_of_weight_zero_change_nothing(recipe: Recipe) -> None:
    """Filler rows: the sums of a batch and of the same batch with fillers are equal to the bit."""
    model = decoder.build(recipe.model, 0)
    ids = np.random.default_rng(0).integers(0, 320, (3, 33))
    rows = Rows(ids, np.ones((3, 32), np.float32))
    padded = Rows(np.concatenate([ids, ids[:1] * 0]), np.concatenate([rows.weights, np.zeros((1, 32), np.float32)]))
    sums = [
        model(
            torch.from_numpy(one.input_ids), torch.from_numpy(one.target_ids), torch.from_numpy(one.weights), None, 1e-4
        )
        for one in (rows, padded)
    ]
    assert float(sums[0].weight) == float(sums[1].weight) == 96
    torch.testing.assert_close(sums[0].objective, sums[1].objective, rtol=1e-6, atol=0)
