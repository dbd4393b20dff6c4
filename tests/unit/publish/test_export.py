"""What leaves the house: the exported folder, read by transformers, and generated text."""

import json
import os
import shutil

import pytest
import torch

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.errors import CheckpointError, DataError
from ds_slm.model import hf
from ds_slm.model.decoder import Decoder, build
from ds_slm.model.documents import PackedDocuments
from ds_slm.publish.export import export, export_folder, export_run
from ds_slm.publish.generate import GREEDY, Chooser, Sampling, generate, sampler
from ds_slm.recipe import loading
from ds_slm.recipe.sections import Model
from tests.support.faults import fail_at

os.environ["HF_HUB_OFFLINE"] = "1"

EOS, PAD, VOCAB = 0, 1, 300
UNUSED = range(2 + 256 + 3, VOCAB)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_theta": 2_500.0,
    "rms_norm_eps": 1e-6,
    "init_std": 0.2,
}
VARIANTS = {
    "llama": ({}, "LlamaForCausalLM"),
    "llama-untied": ({"tie_word_embeddings": False, "num_key_value_heads": 4}, "LlamaForCausalLM"),
    "qwen3": ({"qk_norm": True}, "Qwen3ForCausalLM"),
    "exclusive": ({"exclusive_attention": True}, "ExclusiveForCausalLM"),
    "exclusive-qk-norm": ({"exclusive_attention": True, "qk_norm": True}, "ExclusiveForCausalLM"),
}
RUN_OVERRIDES = [f"tokenizer.vocab_size={VOCAB}", "data.seq_len=64"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE with a few merges, as the tokenizers package writes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|pad|>", *alphabet, "th", "the", "an"]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("a", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[:2]])
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[0], "pad_token": tokens[1]}
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def remote_code_cache(tmp_path_factory):
    """Keeps transformers' copies of our modeling file out of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session", params=VARIANTS)
def pair(request, tokenizer_folder, remote_code_cache, tmp_path_factory):
    """One of our models, and what transformers loads from its export."""
    from transformers import AutoModelForCausalLM

    changes, architecture = VARIANTS[request.param]
    shape = Model(**(SHAPE | changes))
    ours = build(shape, seed=1)
    out = tmp_path_factory.mktemp("export") / "model"
    exported = export(dict(ours.named_parameters()), shape, tokenizer_folder, out.with_name("without-card"))
    with export_folder(dict(ours.named_parameters()), shape, tokenizer_folder, out) as folder:
        (folder / "README.md").write_bytes(b"# A model\n")
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=shape.exclusive_attention).eval()
    assert type(theirs).__name__ == architecture
    assert exported == sum(parameter.numel() for parameter in theirs.parameters())
    return ours, theirs, out


def random_ids(*size, seed=0):
    return torch.randint(2, VOCAB, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    """Oracle: LlamaForCausalLM, Qwen3ForCausalLM or our exported modeling file, loaded from the export, in fp32."""
    ours, theirs, _ = pair
    ids_BT = random_ids(2, 64)
    assert theirs.dtype == torch.float32
    wanted_BTV = theirs(ids_BT).logits
    assert wanted_BTV.std() > 0.5
    torch.testing.assert_close(ours(ids_BT), wanted_BTV, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(pair, side):
    """Oracle: transformers on a padded batch with its attention mask, at every place that is not padding."""
    ours, theirs, _ = pair
    rows = [random_ids(length, seed=length) for length in (5, 12, 20)]
    ids_BT, mask_BT = torch.full((3, 20), PAD), torch.zeros(3, 20, dtype=torch.long)
    for row, ids in enumerate(rows):
        place = slice(20 - len(ids), None) if side == "left" else slice(0, len(ids))
        ids_BT[row, place], mask_BT[row, place] = ids, 1
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    wanted_BTV = theirs(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    for row, ids in enumerate(rows):
        torch.testing.assert_close(ours(ids[None])[0], wanted_BTV[row, mask_BT[row] > 0], **CLOSE)
    padded_BTV = ours(ids_BT, sight=PackedDocuments(mask_BT))  # the padding is one more document
    torch.testing.assert_close(padded_BTV[mask_BT > 0], wanted_BTV[mask_BT > 0], **CLOSE)


@torch.no_grad()
def test_logits_with_packing(pair):
    """Oracle: transformers on each document alone, and on the packed row with its positions and a mask of documents."""
    ours, theirs, _ = pair
    lengths = (9, 3, 14)
    ids_BT = random_ids(1, 26, seed=2)
    documents_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    got_BTV = ours(ids_BT, sight=PackedDocuments(documents_BT))
    alone_BTV = torch.cat([theirs(part).logits for part in ids_BT.split(lengths, 1)], 1)
    torch.testing.assert_close(got_BTV, alone_BTV, **CLOSE)
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    mask_BTT = (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)).tril()
    packed_BTV = theirs(ids_BT, position_ids=positions_BT, attention_mask=mask_BTT.unsqueeze(1)).logits
    torch.testing.assert_close(got_BTV, packed_BTV, **CLOSE)


@torch.no_grad()
def test_cached_generation_is_the_same(pair):
    """Oracle: transformers' greedy generate: with its cache and without, by both of its attention implementations."""
    ours, theirs, _ = pair
    prompt = random_ids(7, seed=3).tolist()
    got = generate(ours, prompt, 16, GREEDY, unused_ids=UNUSED)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for implementation, use_cache in (("eager", True), ("sdpa", True), ("sdpa", False)):
        theirs.set_attn_implementation(implementation)
        assert theirs.generate(torch.tensor([prompt]), use_cache=use_cache, **options)[0, 7:].tolist() == got


def test_the_folder_holds_what_a_hub_page_needs(pair, tokenizer_folder):
    """Oracle: the files themselves, and transformers' readers of them."""
    from safetensors import safe_open
    from transformers import AutoTokenizer, GenerationConfig

    ours, theirs, out = pair
    exclusive = ours.shape.exclusive_attention
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    expected |= {path.name for path in tokenizer_folder.iterdir()} | ({"modeling_exclusive.py"} if exclusive else set())
    assert {path.name for path in out.iterdir()} == expected
    with safe_open(out / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == {name for name, _ in ours.named_parameters()}
        assert tensors.metadata() == {"format": "pt"}
    assert ("lm_head.weight" in dict(ours.named_parameters())) is not ours.shape.tie_word_embeddings
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.pad_token_id) == (EOS, PAD)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the man").input_ids) == "the man"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert theirs.config.rope_parameters["rope_theta"] == json.loads((out / "config.json").read_text())["rope_theta"]
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (EOS, PAD)


def test_a_config_gives_the_shape_back(pair):
    """Oracle: the shape that was exported; also from the configuration as transformers writes it."""
    ours, theirs, out = pair
    assert hf.shape_from_hf(json.loads((out / "config.json").read_text())) == ours.shape
    assert hf.shape_from_hf(theirs.config.to_dict()) == ours.shape


def test_a_foreign_config_is_refused_with_every_reason():
    """Oracle: the fields named in the error."""
    config = hf.hf_config(Model(**SHAPE), eos_id=0, dtype="float32")
    config |= {"hidden_act": "gelu", "attention_bias": True, "rope_parameters": {"rope_type": "yarn", "factor": 4}}
    del config["hidden_size"]
    with pytest.raises(CheckpointError) as caught:
        hf.shape_from_hf(config | {"model_type": "gpt2"})
    for name in ("hidden_act", "attention_bias", "rope_type", "hidden_size", "model_type"):
        assert name in str(caught.value)


@pytest.mark.parametrize("card", ["slm-10m", "ant-10m", "slm-124m", "axiom-380m"])
def test_transformers_counts_the_cards_parameters(card):
    """Oracle: the published counts, a tied head counted once, by the classes the recipe exports to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = loading.load(card)
    config = hf.hf_config(recipe.model, eos_id=None, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.tie_weights()
        ours = sum(parameter.numel() for parameter in Decoder(recipe.model).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_in_half_precision(tmp_path, tokenizer_folder, dtype):
    """Oracle: the rounded weights, loaded in the dtype the configuration names."""
    from transformers import AutoModelForCausalLM

    shape = Model(**SHAPE)
    state = dict(build(shape, seed=1).named_parameters())
    export(state, shape, tokenizer_folder, tmp_path / "out", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, state[name].to(dtype)), name


def test_a_folder_in_the_way_is_refused_and_untouched(tmp_path, tokenizer_folder):
    """Oracle: CheckpointError and the same single file; an empty folder is filled."""
    shape = Model(**SHAPE)
    state = dict(build(shape, seed=1).named_parameters())
    taken, empty = tmp_path / "taken", tmp_path / "empty"
    for folder in (taken, empty):
        folder.mkdir()
    (taken / "precious").write_text("work")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(state, shape, tokenizer_folder, taken)
    assert [path.name for path in taken.iterdir()] == ["precious"]
    export(state, shape, tokenizer_folder, empty)
    assert (empty / "model.safetensors").is_file()


def test_weights_of_another_model_are_refused(tmp_path, tokenizer_folder):
    """Oracle: every missing, superfluous and misshapen name in the error, and nothing written."""
    shape = Model(**SHAPE)
    state = {name: parameter.detach() for name, parameter in build(shape, seed=1).named_parameters()}
    state["model.norm.weight"] = torch.ones(5)
    state["lm_head.weight"] = torch.ones(2)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        export(state, shape, tokenizer_folder, tmp_path / "out")
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer_folder):
    """Oracle: DataError where there is none, CheckpointError where it has more ids than the model."""
    shape = Model(**(SHAPE | {"vocab_size": 200}))
    state = dict(build(shape, seed=1).named_parameters())
    with pytest.raises(DataError):
        export(state, shape, tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="200"):
        export(state, shape, tokenizer_folder, tmp_path / "out")


def test_an_export_that_fails_leaves_nothing(tmp_path, tokenizer_folder):
    """Oracle: an empty folder after a full disk."""
    shape = Model(**SHAPE)
    with fail_at("syncing", "model.safetensors"), pytest.raises(OSError, match="No space"):
        export(dict(build(shape, seed=1).named_parameters()), shape, tokenizer_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_runs_checkpoints_are_exported_by_step_newest_and_best(tmp_path, tokenizer_folder):
    """Oracle: the tensors each checkpoint was written with; a step that is not there is refused."""
    recipe = loading.load("demo", [f"model.{name}={value}" for name, value in SHAPE.items()] + RUN_OVERRIDES)
    run = tmp_path / "run"
    shutil.copytree(tokenizer_folder, run / "tokenizer")
    (run / "recipe.toml").write_text(loading.to_toml(recipe))
    states = {}
    for step in (2, 4, 6):
        states[step] = {name: tensor.detach() for name, tensor in build(recipe.model, seed=step).named_parameters()}
        writer = checkpoint_files.Writer(run, step)
        writer.add_tensors(checkpoint_files.MODEL, states[step])
        folder = writer.commit({"step": step})
        if step == 4:
            checkpoint_files.mark_best(folder)
    for options, step in (({"step": 2}, 2), ({}, 6), ({"best": True}, 4)):
        told = export_run(run, tmp_path / f"out-{step}", **options)
        with checkpoint_files.open_tensors(tmp_path / f"out-{step}" / "model.safetensors") as tensors:
            assert all(torch.equal(tensors.get_tensor(name), states[step][name]) for name in tensors.keys())  # noqa: SIM118
        assert told["step"] == step and told["params"] == sum(tensor.numel() for tensor in states[step].values())
    writer = checkpoint_files.Writer(run, 8)
    writer.add_tensors(checkpoint_files.MODEL, states[6])
    writer.commit({"step": 8, "tokenizer_sha256": "f00d"})
    with pytest.raises(CheckpointError, match="was trained with f00d"):
        export_run(run, tmp_path / "out-8", step=8)
    with pytest.raises(CheckpointError, match="2, 4, 6"):
        export_run(run, tmp_path / "out-3", step=3)
    with pytest.raises(CheckpointError, match=r"recipe\.toml"):
        export_run(tmp_path, tmp_path / "out-3")


def small_model(**changes):
    return build(Model(**(SHAPE | changes)), seed=1)


def test_generation_depends_on_its_seed_alone():
    """Oracle: a second call after disturbing torch's generator, and another seed."""
    model = small_model()
    torch.manual_seed(0)
    one = generate(model, [5, 6], 20, Sampling(1.5, seed=3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate(model, [5, 6], 20, Sampling(1.5, seed=3)) == one and len(one) == 20
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, [5, 6], 20, Sampling(1.5, seed=4)) != one


def test_narrow_sampling_is_greedy():
    """Oracle: greedy decoding: top_k = 1, a vanishing top_p and a vanishing temperature all leave one token."""
    model = small_model()
    greedy = generate(model, [5, 6], 12, GREEDY)
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-4}):
        assert generate(model, [5, 6], 12, Sampling(seed=1, **options)) == greedy


def test_filters_are_those_of_transformers():
    """Oracle: the tokens transformers' logits processors leave, and their probabilities, by sampling 4,000 times."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_V = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    known = [3, 7, 7, int(logits_V.argmax())]
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.8),
        ]
    )
    wanted_V = processors(torch.tensor([known]), logits_V.clone()[None])[0].softmax(-1)
    chooser = Chooser(Sampling(0.7, 8, 0.8, 1.3, seed=1))
    drawn = [chooser.choose(logits_V.clone(), known) for _ in range(4000)]
    got_V = torch.bincount(torch.tensor(drawn), minlength=30) / 4000
    assert torch.equal(got_V > 0, wanted_V > 0)
    torch.testing.assert_close(got_V, wanted_V, atol=0.03, rtol=0)


def test_generation_ends_with_a_stop_id():
    """Oracle: the same continuation, cut after the id."""
    model = small_model()
    free = generate(model, [5, 6], 20, Sampling(1.5, seed=3))
    stop = free[8]
    assert generate(model, [5, 6], 20, Sampling(1.5, seed=3), stop_ids={stop}) == free[: free.index(stop) + 1]
    assert generate(model, [5, 6], 0) == []


def test_generation_slides_beyond_the_context():
    """Oracle: greedy choices by full forwards over the window the module's docstring describes."""
    model = small_model(max_position_embeddings=8, num_hidden_layers=1)
    model.train()
    prompt = random_ids(11, seed=5).tolist()
    got = generate(model, prompt, 14, GREEDY)
    assert model.training
    known, window = list(prompt), prompt[-8:]
    for token in got:
        with torch.no_grad():
            assert token == int(model(torch.tensor([window]))[0, -1].argmax())
        known.append(token)
        window = known[-4:] if len(window) == 8 else [*window, token]


def test_the_sampler_continues_each_prompt(tokenizer_folder):
    """Oracle: two calls agree; an empty prompt starts from the end-of-document token."""
    sample = sampler(tokenizer_folder, ["the man", ""], max_new_tokens=5)
    model = small_model()
    texts = sample(model)
    assert list(texts) == ["the man", ""] and all(isinstance(text, str) for text in texts.values())
    assert sample(model) == texts
