"""Every forward path on a GPU that is not there: tensors without values, on the device that torch calls cuda.

Two devices in one operation, a value that the CPU would have to wait for, and a graph that breaks are found here.
Kernels and figures are not, for nothing is computed; nor are backward passes, which torch begins on real devices alone.
`make fake-gpu` installs a build of PyTorch that knows CUDA.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ds_slm.model import decoder, documents, kernels
from ds_slm.model.decoder import Decoder, KVCache
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe import loading

if not torch.version.cuda:
    pytest.skip("this PyTorch was built without CUDA: make fake-gpu", allow_module_level=True)

H100 = (9, 0)
ROWS, TOKENS = 2, 128
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors hold no values, and the GPU is an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    torch._dynamo.reset()  # each test's blocks are compiled anew: more than a few forms of a function are refused
    decoder.rotary_tables.cache_clear()
    with FakeTensorMode(shape_env=ShapeEnv()):
        yield
    decoder.rotary_tables.cache_clear()


def model_of(name: str, dtype: torch.dtype) -> Decoder:
    """A recipe's model on the GPU, in a launch's dtype."""
    recipe, usual = loading.load(name), torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be moved or cast afterwards
    try:
        with torch.device("cuda"):
            return decoder.build(recipe.model, 0, recipe.train.gradient_checkpointing)
    finally:
        torch.set_default_dtype(usual)


def ids_BT() -> Tensor:
    return torch.zeros(ROWS, TOKENS, dtype=torch.long, device="cuda")


def on_gpu(*tensors: Tensor) -> bool:
    return all(one.device.type == "cuda" for one in tensors)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", loading.library_names())
def test_the_loss_and_its_gradient_stay_on_the_device(name: str, dtype: torch.dtype, packed: bool) -> None:
    """Oracle: fake tensors, which refuse two devices in one operation and any value that is asked for."""
    model = model_of(name, dtype)
    weights_BT = torch.ones(ROWS, TOKENS, device="cuda")
    documents = PackedDocuments(ids_BT(), ROWS) if packed else None
    sums = model(ids_BT(), ids_BT(), weights_BT, documents, z_scale=1e-4)
    assert on_gpu(*sums) and sums.objective.requires_grad  # the loss forms its gradient in the forward pass
    with torch.no_grad():
        evaluated = model.eval()(ids_BT(), ids_BT(), weights_BT, documents)
    assert on_gpu(*evaluated) and not evaluated.objective.requires_grad


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", loading.library_names())
def test_branches_and_generation_stay_there(name: str, dtype: torch.dtype) -> None:
    """Oracle: as above, of the hidden states of rows with branches, of a prompt and of the token behind it."""
    model = model_of(name, dtype)
    with torch.no_grad():
        positions = model.model.positions_of(*decoder.branched(ids_BT()))
        hidden_BTD = model.model(ids_BT(), positions, None)
        cache = KVCache(model.shape, 1, TOKENS, dtype, torch.device("cuda"))
        first_B1V = model(ids_BT()[:1, :8], sight=cache)
        next_B1V = model(ids_BT()[:1, :1], sight=cache)
    assert on_gpu(hidden_BTD, first_B1V, next_B1V)
    assert cache.length == 9 and next_B1V.shape == (1, 1, model.shape.vocab_size)


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", loading.library_names())
def test_a_block_is_one_graph(name: str, packed: bool) -> None:
    """Oracle: torch.compile with fullgraph, which refuses a graph that breaks and warns of doubts."""
    model = model_of(name, torch.bfloat16)
    kernels.make_device_checks_constant()
    torch.compiler.assume_constant_result(documents.varlen_takes_groups)
    backbone = model.model
    x_BTD = backbone.embed_tokens(ids_BT())
    of_rows = (
        backbone.packed_positions(PackedDocuments(ids_BT(), ROWS)) if packed else backbone.positions(ids_BT(), None)
    )
    assert not packed or of_rows.mask_BTS is None  # the variable-length kernel's rows
    compiled = torch.compile(backbone.layers[0], backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert on_gpu(compiled(x_BTD, of_rows))
        assert on_gpu(decoder.run_with_training_graph(compiled, x_BTD, of_rows))
