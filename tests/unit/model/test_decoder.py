"""The decoder: its shape, its arithmetic, its initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from ds_slm.errors import ConfigError
from ds_slm.model import decoder, kernels, loss
from ds_slm.model.decoder import Decoder, KVCache, build
from ds_slm.model.documents import PackedDocuments
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Model
from tests.support import tolerances

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "exclusive": {"exclusive_attention": True},
}
CARDS = {
    "slm-10m": 9_968_640,
    "gpt-s-1.4m": 1_426_176,
    "ant-10m": 9_902_336,
    "slm-124m": 134_105_856,
    "axiom-380m": 385_849_344,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes):
    return Model(**(SMALL | changes))


def random_ids(*size, vocab_size=SMALL["vocab_size"], seed=0):
    return torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(seed))


def gradients(model, *inputs, **options):
    model.zero_grad()
    model(*inputs, **options).objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_all_close(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("card", CARDS)
def test_parameter_counts_are_the_cards(card):
    """Oracle: the counts the cards publish, or that follow from their configurations."""
    with torch.device("meta"):
        model = Decoder(loading.load(card).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == CARDS[card]


def test_parameter_names_are_hugging_faces():
    """Oracle: the names in transformers' Qwen3ForCausalLM."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = Qwen3Config(vocab_size=96, head_dim=16, **{name: SMALL[name] for name in fields})
    with torch.device("meta"):
        theirs = dict(Qwen3ForCausalLM(config).named_parameters())
        ours = dict(Decoder(small(qk_norm=True, tie_word_embeddings=False)).named_parameters())
        tied = dict(Decoder(small(qk_norm=True)).named_parameters())
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert ours.keys() - tied.keys() == {"lm_head.weight"}


@pytest.mark.parametrize("card", CARDS)
def test_first_loss_is_as_predicted(card):
    """Oracle: ln V + hidden_size * sigma^2 / 2, sigma of the head; logits are then normal with that variance."""
    shape = loading.load(card).model
    model = build(shape, seed=0)
    with torch.inference_mode():
        logits_BTV = model(random_ids(1, 48, vocab_size=shape.vocab_size))
    loss_of_uniform_targets = (logits_BTV.logsumexp(-1) - logits_BTV.mean(-1)).mean().item()
    sigma = (shape.embedding_init_std if shape.tie_word_embeddings else None) or shape.init_std
    assert loss_of_uniform_targets == pytest.approx(
        math.log(shape.vocab_size) + shape.hidden_size * sigma**2 / 2, abs=0.05
    )


def naive_exclusive_block_attention(block, x_TD, shape):
    """Exclusive attention of one row, written out head by head and token by token in float64."""
    E, groups = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    weights = {name: parameter.detach().double() for name, parameter in block.self_attn.named_parameters()}
    q, k, v = (x_TD @ weights[f"{name}_proj.weight"].T for name in "qkv")

    def turned(vector, position):
        angles = [position * shape.rope_theta ** (-2 * i / E) for i in range(E // 2)]
        pairs = [(vector[i], vector[i + E // 2], angle) for i, angle in enumerate(angles)]
        left = [a * math.cos(angle) - b * math.sin(angle) for a, b, angle in pairs]
        right = [b * math.cos(angle) + a * math.sin(angle) for a, b, angle in pairs]
        return torch.stack(left + right)

    rows = []
    for t in range(len(x_TD)):
        heads = []
        for head in range(shape.num_attention_heads):
            own, shared = slice(head * E, (head + 1) * E), slice(head // groups * E, (head // groups + 1) * E)
            query = turned(q[t, own], t)
            scores = torch.stack([query @ turned(k[s, shared], s) / math.sqrt(E) for s in range(t + 1)]).softmax(0)
            y = scores @ v[: t + 1, shared]
            direction = v[t, shared] / v[t, shared].norm()
            heads.append(y - (y @ direction) * direction)
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights["o_proj.weight"].T


def test_exclusive_attention_is_its_equation():
    """Oracle: z = y - (y.v/|v|) v/|v| per head, in float64, with the value of the query's group."""
    shape = small(exclusive_attention=True)
    block = build(shape, seed=1).model.layers[0]
    x_BTD = torch.randn(1, 9, shape.hidden_size, generator=torch.Generator().manual_seed(2))
    cos, sin = decoder.rotary_tables(shape.head_dim, shape.rope_theta, 9, x_BTD.device)
    got = block.self_attn(x_BTD, decoder.Positions(cos, sin, None, causal=True), None, 0)
    torch.testing.assert_close(
        got[0].double(), naive_exclusive_block_attention(block, x_BTD[0].double(), shape), atol=1e-5, rtol=0
    )
    assert got[0, 1:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 20, 32, 128])
@pytest.mark.usefixtures("products")
def test_exclusive_attention_is_exactly_zero_where_a_token_sees_only_itself(dtype, head_dim):
    """Oracle: y = v there, so y minus its component along v is 0; also at the start of each packed document."""
    shape = small(exclusive_attention=True, num_hidden_layers=1, head_dim=head_dim)
    model = build(shape, seed=3).to(dtype)
    outputs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    ids_BT = random_ids(2, 12)
    model(ids_BT)
    model(ids_BT, sight=PackedDocuments(torch.tensor([[0] * 5 + [1] * 7] * 2)))
    assert not outputs[0][:, 0].any() and not outputs[1][:, [0, 5]].any()
    assert outputs[0][:, 1:].any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_forward(variant):
    """Oracle: the forward without a cache; prefill in two parts, then one token at a time."""
    shape = small(**VARIANTS[variant])
    model = build(shape, seed=4)
    ids_BT = random_ids(2, 20)
    with torch.no_grad():
        wanted_BTV = model(ids_BT)
        cache = KVCache(shape, 2, 20, torch.float32, ids_BT.device)
        for start, end in [(0, 6), (6, 11), *((t, t + 1) for t in range(11, 20))]:
            logits_B1V = model(ids_BT[:, start:end], sight=cache)
            torch.testing.assert_close(logits_B1V[:, 0], wanted_BTV[:, end - 1], atol=1e-5, rtol=0)
    assert cache.length == 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_do_not_see_each_other(variant):
    """Oracle: each document in a row of its own, logits and gradients; ids need not be unique within a row."""
    model = build(small(**VARIANTS[variant]), seed=5)
    lengths, names = (7, 1, 10), (4, 9, 4)
    ids_BT, targets_BT = random_ids(1, 18, seed=6), random_ids(1, 18, seed=7)
    documents = PackedDocuments(torch.repeat_interleave(torch.tensor(names), torch.tensor(lengths))[None])
    parts = list(zip(ids_BT.split(lengths, 1), targets_BT.split(lengths, 1), strict=True))
    logits_BTV = model(ids_BT, sight=documents)
    torch.testing.assert_close(logits_BTV, torch.cat([model(ids) for ids, _ in parts], 1), atol=1e-5, rtol=0)
    packed = gradients(model, ids_BT, targets_BT, sight=documents)
    alone = [gradients(model, ids, targets) for ids, targets in parts]
    assert_all_close(packed, {name: sum(part[name] for part in alone) for name in packed}, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.usefixtures("products")
def test_gradient_checkpointing_changes_nothing(dtype, packing):
    """Oracle: the same gradients without it, to the last bit: the recomputation is the same computation."""
    ids_BT, targets_BT = random_ids(3, 24), random_ids(3, 24, seed=1)
    documents = PackedDocuments((torch.arange(24) // 7).expand(3, -1)) if packing else None
    found = [
        gradients(build(small(), 8, recompute).to(dtype), ids_BT, targets_BT, None, documents, 1e-3)
        for recompute in (False, True)
    ]
    assert_all_close(*found, atol=0, rtol=0)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_evaluation_takes_the_graph_of_training(recompute, packing, monkeypatch):
    """Oracle: how often the compiler is asked for a graph; the loss of the eager model, to the last bit."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(kernels, "CALL_SCORES", 0)
    monkeypatch.setattr("ds_slm.model.loss._compiled", lambda: loss._from_logits)
    model = build(small(), 8, recompute)
    ids_BT, targets_BT = random_ids(3, 24), random_ids(3, 24, seed=1)
    documents = PackedDocuments((torch.arange(24) // 7).expand(3, -1)) if packing else None
    with torch.no_grad():
        eager = model.eval()(ids_BT, targets_BT, None, documents)

    for block in model.model.layers:
        block.compile(dynamic=False, backend=backend)
    model.compiled = True
    for _ in range(2):
        model.train()(ids_BT, targets_BT, None, documents).objective.backward()
        with torch.no_grad():
            evaluated = model.eval()(ids_BT, targets_BT, None, documents)
        assert torch.equal(evaluated.nll, eager.nll) and not evaluated.objective.requires_grad
    assert len(graphs) == 1


def test_gradient_checkpointing_is_on_only_while_training():
    """Oracle: how often a block is run in one forward and backward."""
    calls = []
    model = build(small(), 0, gradient_checkpointing=True)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, random_ids(1, 8), random_ids(1, 8))
    assert len(calls) == 2
    model.eval()
    gradients(model, random_ids(1, 8), random_ids(1, 8))
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_product_is_the_rounded_exact_one(dtype, products):
    """Oracle: the product of the same half-precision operands in float64, value and gradients, rounded once.

    The upcast form rounds as IEEE says; a CPU's own instructions may round the other way, to the next value.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(dtype) for size in ((3, 17, 40), (24, 40), (3, 17, 24))
    )
    x.requires_grad_(), weight.requires_grad_()
    got = kernels.product(x, weight)
    got.backward(grad)

    d_weight = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    rounding = torch.finfo(dtype).eps * (0.5 if products == "upcast" else 1) * 1.01
    for mine, exact in (
        (got, x.double() @ weight.double().T),
        (x.grad, grad.double() @ weight.double()),
        (weight.grad, d_weight),
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=rounding, atol=1e-5)


def test_product_is_linear_where_the_device_multiplies():
    """Oracle: F.linear."""
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    assert torch.equal(kernels.product(x, weight), F.linear(x, weight))
    assert kernels.multiplies("cuda", torch.bfloat16) and kernels.multiplies("cpu", torch.float32)


@pytest.mark.parametrize("form", tolerances.PRODUCTS)
def test_the_environment_chooses_the_products(monkeypatch, form):
    """Oracle: the words a user looks for at the start of a run; fp32 and other devices are as they were."""
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, form)
    assert kernels.multiplies("cpu", torch.bfloat16) == (form == "native")
    words = {"native": "cpu bfloat16", "upcast": "cpu fp32, bfloat16 operands upcast and results rounded"}
    found = kernels.effective_kernels("cpu", torch.bfloat16)
    assert found["products"] == f"{words[form]} (DS_SLM_HALF_PRODUCTS={form})"
    assert found["products"] in found["attention"]
    assert kernels.multiplies("cpu", torch.float32) and kernels.multiplies("cuda", torch.bfloat16)
    assert kernels.effective_kernels("cpu", torch.float32)["products"] == "cpu float32"


def test_without_a_choice_the_cpu_decides(monkeypatch):
    """Oracle: torch's own test of the CPU's instructions."""
    monkeypatch.delenv(kernels.PRODUCTS_VARIABLE, raising=False)
    assert kernels.multiplies("cpu", torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert kernels.PRODUCTS_VARIABLE not in kernels.effective_kernels("cpu", torch.bfloat16)["products"]
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "nativ")
    with pytest.raises(ConfigError, match="DS_SLM_HALF_PRODUCTS=nativ: expected native, upcast, or unset"):
        kernels.multiplies("cpu", torch.bfloat16)


def test_embedding_gradient_of_a_frequent_token_is_not_lost():
    """Oracle: 3,000 ones add up to 3,000 (rounded to bf16), not to the 256 at which bf16 sums stand still."""
    weight = torch.zeros(4, 3, dtype=torch.bfloat16, requires_grad=True)
    kernels.embed(torch.tensor([[1] * 3000 + [2]]), weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad[:, 0].tolist() == [0.0, torch.tensor(3000.0).bfloat16().item(), 1.0, 0.0]


def test_norm_is_computed_in_fp32():
    """Oracle: float64; squares of these bf16 values would lose their sum in bf16, and overflow in fp16."""
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 300.0)):
        x = (torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
        norm = decoder.RMSNorm(512, 1e-5).to(dtype)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(norm(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_rotary_tables_survive_a_cast_of_the_model():
    """Oracle: the fp32 tables: positions near 1,000 would be the same in bf16."""
    shape = small(max_position_embeddings=1024)
    model = build(shape, 0).bfloat16()
    places = model.model.positions(random_ids(1, 1024), None)
    assert places.cos.dtype == torch.float32 and not [name for name, _ in model.named_buffers()]
    exact = torch.arange(1024).double().outer(shape.rope_theta ** (-torch.arange(0, 16, 2).double() / 16)).cos()
    torch.testing.assert_close(places.cos.double(), exact, atol=1e-4, rtol=0)


def test_initialisation_depends_on_the_seed_alone():
    """Oracle: another build after disturbing torch's generator, in another dtype, in another order."""
    shape = small(tie_word_embeddings=False, scaled_residual_init=True, embedding_init_std=0.5)
    torch.manual_seed(1)
    one = dict(build(shape, seed=9).named_parameters())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = Decoder(shape).to(torch.bfloat16)
    decoder.initialise(two, shape, seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in two.named_parameters():
        assert torch.equal(parameter, one[name].bfloat16()), name
    other = dict(build(shape, seed=10).named_parameters())
    assert not torch.equal(other["lm_head.weight"], one["lm_head.weight"])
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.0.mlp.gate_proj.weight"])


def test_initialisation_has_the_recipes_deviations():
    """Oracle: slm-10m's N(0, 0.02), with 0.02 / sqrt(2 * 12) for o_proj and down_proj; axiom-380m's head at 0.00289."""
    shape = loading.load("slm-10m").model
    parameters = dict(build(shape, seed=0).named_parameters())
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(24) if residual else 0.02
        assert parameter.std().item() == pytest.approx(deviation, rel=0.02), name
        assert abs(parameter.mean().item()) < 4 * deviation / math.sqrt(parameter.numel()), name
    axiom = loading.load("axiom-380m").model
    assert (axiom.embedding_init_std or axiom.init_std) == pytest.approx(0.02 / math.sqrt(48), abs=2e-6)


def test_targets_give_loss_sums_and_their_absence_logits():
    """Oracle: F.cross_entropy of the logits."""
    model = build(small(), seed=11)
    ids_BT, targets_BT = random_ids(2, 10), random_ids(2, 10, seed=1)
    sums = model(ids_BT, targets_BT)
    wanted = F.cross_entropy(model(ids_BT).flatten(0, 1), targets_BT.flatten(), reduction="sum")
    torch.testing.assert_close(sums.nll, wanted.detach(), rtol=1e-6, atol=0)
    assert sums.weight == 20 and sums.count == 20


def test_a_row_beyond_the_context_is_refused():
    """Oracle: the assertion: the recipe never allows it."""
    with pytest.raises(AssertionError, match="max_position_embeddings"):
        build(small(), 0)(random_ids(1, 65))


@pytest.mark.usefixtures("compiler")
def test_compiled_parts_are_one_graph_for_all_blocks_and_change_nothing():
    """Oracle: the eager model; torch's own count of graphs: a block's, and the loss's."""
    shape = small(num_hidden_layers=12, qk_norm=True)
    eager, compiled = (build(shape, seed=1) for _ in range(2))
    compiled.compile_parts()
    ids_BT = torch.randint(shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for z_scale in (0.1, 0.2):
        sums = [model(ids_BT[:, :-1], ids_BT[:, 1:], z_scale=z_scale) for model in (eager, compiled)]
        torch.testing.assert_close(tuple(sums[1]), tuple(sums[0]), rtol=1e-5, atol=1e-6)
        for one in sums:
            one.objective.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - counted == 2
    for (name, got), wanted in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (got.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max(), name
