"""GGUF files, loaded by llama.cpp in this process and compared with transformers on the export beside them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, IM_END, load_tokenizer
from ds_slm.errors import UserError
from ds_slm.model.decoder import build
from ds_slm.publish import gguf as files
from ds_slm.publish.export import WeightFormat, export_run
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support import conversations, scored_models
from tests.support.faults import fail_at
from tests.support.llama_cpp import LlamaCpp

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT, TOLERANCE = 325, 160, 2e-3
"""Five ids more than the tokenizer has; the tolerance is that of float16 at logits of this size."""
EIGHT_BIT_TOLERANCE = 0.045
"""About twice what was measured, 0.013 to 0.022."""
SHAPE = [
    f"model.vocab_size={VOCAB}",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.init_std=0.05",
    "model.rope_theta=2500.0",
    "model.rms_norm_eps=0.01",
]
VARIANTS = {
    "llama": ["model.tie_word_embeddings=true", "model.head_dim=16"],
    "llama-untied": ["model.tie_word_embeddings=false", "model.num_key_value_heads=4", "model.head_dim=16"],
    "qwen3": ["model.qk_norm=true", "model.tie_word_embeddings=false", "model.head_dim=20"],
}
PROMPTS = ["<|im_start|>user\nwho sees the cat?<|im_end|>\n<|im_start|>assistant\n", "the dog", "Übersee 3,141.59"]


@dataclass
class Exported:
    """A run's export with a GGUF file, and the model it was made of."""

    recipe: Recipe
    state: dict[str, Tensor]
    folder: Path

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return next(self.folder.glob("*.gguf"))

    def llama_cpp(self) -> LlamaCpp:
        """The file, loaded."""
        return LlamaCpp(self.file, CONTEXT)

    def transformers(self) -> tuple[Any, Any]:
        """Model and tokenizer of the folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(self.folder).eval(), AutoTokenizer.from_pretrained(self.folder)

    def tensors(self) -> dict[str, Any]:
        """Those of the file, by llama.cpp's names."""
        return {tensor.name: tensor for tensor in gguf.GGUFReader(self.file).tensors}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant's byte-level BPE."""
    folder = tmp_path_factory.mktemp("tokenizer")
    conversations.tokenizer().save(folder)
    (folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def model_of(overrides: Sequence[str]) -> tuple[Recipe, dict[str, Tensor]]:
    """A model whose norms differ and whose heads look somewhere: neither is so of a fresh one."""
    recipe = loading.parse(conversations.TINY, [*SHAPE, *overrides])
    state = scored_models.state_of(build(recipe.model, seed=1))
    generator = torch.Generator().manual_seed(2)
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 5
        if tensor.dim() == 1:
            tensor.uniform_(0.6, 1.4, generator=generator)
    return recipe, state


def exported(
    folder: Path, tokenizer_folder: Path, overrides: Sequence[str] = (), precision: str = "f16",
    change: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> Exported:  # fmt: skip
    """A run of such a model, exported."""
    recipe, state = model_of(overrides)
    change(state)
    scored_models.write_run(folder / "run", recipe, state, tokenizer_folder)
    export_run(folder / "run", folder / "out", weights=WeightFormat(gguf=precision))
    return Exported(recipe, state, folder / "out")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, chat_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("variant"), chat_tokenizer, VARIANTS[request.param])


@torch.no_grad()
def worst_difference(one: Exported) -> float:
    """Between the log-probabilities of every id by llama.cpp and by transformers."""
    (model, tokenizer), llama_cpp, worst = one.transformers(), one.llama_cpp(), 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = llama_cpp.log_probabilities(ids, VOCAB)
        assert sorted(found) == list(range(VOCAB))
        assert expected_V.std() > 0.2
        found_V = torch.tensor([found[number] for number in range(VOCAB)])
        worst = max(worst, float((found_V - expected_V).abs().max()))
    return worst


def greedy_of_transformers(one: Exported, prompt: str, count: int) -> list[int]:
    """What is generated, up to a choice that is not ahead of the second one by more than the tolerance."""
    model, tokenizer = one.transformers()
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(
        **inputs, do_sample=False, max_new_tokens=count, output_scores=True, return_dict_in_generate=True
    )
    ids = made.sequences[0, inputs.input_ids.shape[1] :].tolist()
    margins = [float(-scores_BV[0].topk(2).values.diff()) for scores_BV in made.scores]
    ties = (place for place, margin in enumerate(margins) if margin < 2 * TOLERANCE)
    return ids[: next(ties, count)]


def test_log_probabilities_are_those_of_transformers(variant: Exported) -> None:
    """Oracle: transformers on the export, for every id after several prompts."""
    assert worst_difference(variant) < TOLERANCE


def test_greedy_text_is_that_of_transformers(variant: Exported) -> None:
    """Oracle: transformers' generate on the export: the same ids, and the text its tokenizer gives them."""
    llama_cpp, (_, tokenizer), compared = variant.llama_cpp(), variant.transformers(), 0
    for prompt in PROMPTS:
        expected = greedy_of_transformers(variant, prompt, 20)
        assert llama_cpp.greedy(prompt, 20)["tokens"][: len(expected)] == expected
        assert llama_cpp.text(expected) == tokenizer.decode(expected)
        compared += len(expected)
    assert compared > 30


@pytest.mark.parametrize("wrong", ["rows", "theta", "eps"])
def test_the_tolerance_is_narrow(
    wrong: str, chat_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same comparison after a mistake in the writer, which must show."""
    if wrong == "rows":
        monkeypatch.setattr(files, "interleaved", lambda rows, head_dim: rows)
    elif wrong == "theta":
        monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, theta: None)
    else:
        add_eps = gguf.GGUFWriter.add_layer_norm_rms_eps
        monkeypatch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, eps: add_eps(self, 1e-5))
    assert worst_difference(exported(tmp_path, chat_tokenizer)) > 4 * TOLERANCE


def swap(name: str, one: int, other: int) -> Callable[[dict[str, Tensor]], None]:
    """Changes a matrix: two rows change places."""

    def change(state: dict[str, Tensor]) -> None:
        state[name][[one, other]] = state[name][[other, one]]

    return change


def test_an_answer_ends_with_its_turn(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: transformers, whose generation ends with <|im_end|>, put in a later token's place."""
    untied = VARIANTS["llama-untied"]
    free = greedy_of_transformers(exported(tmp_path / "free", chat_tokenizer, untied), PROMPTS[0], 12)
    place = next(place for place in range(3, len(free)) if free[place] not in free[:place])

    end = load_tokenizer(chat_tokenizer).token_id(IM_END)
    one = exported(tmp_path, chat_tokenizer, untied, change=swap("lm_head.weight", free[place], end))
    assert greedy_of_transformers(one, PROMPTS[0], 12) == [*free[:place], end]
    found = one.llama_cpp().greedy(PROMPTS[0], 12)
    assert found["stop_type"] == "eos"
    assert [*found["tokens"], end][: place + 1] == [*free[:place], end]
    assert found["content"] == load_tokenizer(chat_tokenizer).decode(free[:place])


def test_ids_that_stand_for_nothing_are_never_generated(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: transformers, which suppresses them, though one is the most likely at each step."""
    untied = VARIANTS["llama-untied"]
    first = greedy_of_transformers(exported(tmp_path / "free", chat_tokenizer, untied), PROMPTS[1], 1)[0]
    one = exported(tmp_path, chat_tokenizer, untied, change=swap("lm_head.weight", first, VOCAB - 1))
    expected = greedy_of_transformers(one, PROMPTS[1], 8)
    assert expected and VOCAB - 1 not in expected
    assert one.llama_cpp().greedy(PROMPTS[1], 8)["tokens"][: len(expected)] == expected


def test_the_chat_template_gives_the_text_of_the_exports(variant: Exported) -> None:
    """Oracle: transformers with the export's own template."""
    llama_cpp, (_, tokenizer) = variant.llama_cpp(), variant.transformers()
    for messages in conversations.made(20):
        messages = messages if messages[-1]["role"] == "user" else messages[:-1]  # an answer would be continued
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert llama_cpp.rendered(messages) == expected
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert llama_cpp.ids(expected) == ids


def test_eight_bits_are_within_half_a_step(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: the weights: each is off by at most half of its block's largest value / 127, and float16's rounding."""
    one = exported(tmp_path, chat_tokenizer, ["model.qk_norm=true", "model.head_dim=20"], "q8_0")
    tensors = one.tensors()
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.layers.1.mlp.gate_proj": "blk.1.ffn_gate"}.items():
        stored, weights = tensors[f"{theirs}.weight"], one.state[f"{ours}.weight"].numpy()
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
        blocks = weights.reshape(-1, files.BLOCK)
        found = gguf.dequantize(stored.data, stored.tensor_type).reshape(blocks.shape)
        largest = np.abs(blocks).max(1, keepdims=True)
        assert (np.abs(found - blocks) <= largest / 127 * 0.5 + largest * 2**-11).all()
        assert np.abs(found - blocks).max() > largest.max() / 127 * 0.4


def test_eight_bits_change_the_log_probabilities_little(
    variant: Exported, chat_tokenizer: Path, tmp_path: Path
) -> None:
    """Oracle: transformers in fp32, within the bound above."""
    scored_models.write_run(tmp_path / "run", variant.recipe, variant.state, chat_tokenizer)
    export_run(tmp_path / "run", tmp_path / "out", weights=WeightFormat(gguf="q8_0"))
    assert worst_difference(Exported(variant.recipe, variant.state, tmp_path / "out")) < EIGHT_BIT_TOLERANCE


def test_rows_that_are_not_whole_blocks_stay_f16(
    chat_tokenizer: Path, tmp_path: Path, ds_slm: Callable[..., Any]
) -> None:
    """Oracle: the types in the file, what the command prints, and transformers."""
    recipe, state = model_of(["model.head_dim=10", "model.tie_word_embeddings=false"])
    scored_models.write_run(tmp_path / "run", recipe, state, chat_tokenizer)
    told = ds_slm("export", tmp_path / "run", "--out", tmp_path / "out", "--gguf", "q8_0")
    one, odd = Exported(recipe, state, tmp_path / "out"), ["blk.0.attn_output.weight", "blk.1.attn_output.weight"]

    kinds = gguf.GGMLQuantizationType
    expected = {name: kinds.F32 if tensor.data.ndim == 1 else kinds.Q8_0 for name, tensor in one.tensors().items()}
    assert {name: t.tensor_type for name, t in one.tensors().items()} == expected | dict.fromkeys(odd, kinds.F16)
    assert told.stdout.splitlines()[1] == (
        f"{one.file}: q8_0, but for 2 matrices in f16, because their rows do not divide by 32: "
        "model.layers.0.self_attn.o_proj.weight, model.layers.1.self_attn.o_proj.weight"
    )
    assert worst_difference(one) < EIGHT_BIT_TOLERANCE


def test_the_file_lies_beside_the_others(chat_tokenizer: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the folder's name, the header, and what the command prints; a tied head is not stored twice."""
    recipe, state = model_of(VARIANTS["llama"])
    scored_models.write_run(tmp_path / "run", recipe, state, chat_tokenizer)
    told = ds_slm("export", tmp_path / "run", "--out", tmp_path / "mine-1.5", "--gguf", "f16")
    one = Exported(recipe, state, tmp_path / "mine-1.5")
    assert told.stdout.splitlines()[1] == f"{one.file}: f16"
    assert one.file.name == "mine-1.5-f16.gguf"
    assert "\nllama-cli -m mine-1.5-f16.gguf\n" in (tmp_path / "mine-1.5" / "README.md").read_text()
    assert (one.folder / "model.safetensors").is_file()
    assert sum(tensor.n_elements for tensor in one.tensors().values()) == sum(map(Tensor.numel, state.values()))
    fields = gguf.GGUFReader(one.file).fields
    assert fields["general.name"].contents() == "tiny-sft"
    assert fields["llama.context_length"].contents() == CONTEXT


REFUSED = {
    "exclusive attention": (["model.exclusive_attention=true"], "f16", "no exclusive attention"),
    "layers": (["model.num_hidden_layers=513"], "f16", "513 layers"),
    "precision": ([], "q4_k_m", "expected one of f16, q8_0"),
    "no blocks": (
        ["model.hidden_size=36", "model.intermediate_size=33", "model.head_dim=10"],
        "q8_0",
        "use --gguf f16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_load_is_refused(
    name: str, chat_tokenizer: Path, tmp_path: Path, ds_slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 2 and the reason, before the weights are read; nothing is left behind."""
    overrides, precision, reason = REFUSED[name]
    changed = {override.split("=")[0] for override in overrides}
    recipe = loading.parse(
        conversations.TINY, [*overrides, *(line for line in SHAPE if line.split("=")[0] not in changed)]
    )
    scored_models.write_run(tmp_path / "run", recipe, {}, chat_tokenizer)
    monkeypatch.setattr(checkpoint_files, "read_model", None)
    told = ds_slm("export", tmp_path / "run", "--out", tmp_path / "out", "--gguf", precision)
    assert told.returncode == 2 and reason in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_with_other_ids_is_refused(
    chat_tokenizer: Path, tmp_path: Path, ds_slm: Callable[..., Any]
) -> None:
    """Oracle: exit code 2 and the reason; the same run is exported without the file."""
    recipe, state = model_of(VARIANTS["llama"])
    other = shutil.copytree(chat_tokenizer, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    scored_models.write_run(tmp_path / "run", recipe, state, other)
    arguments = ("export", tmp_path / "run", "--out", tmp_path / "out")
    told = ds_slm(*arguments, "--gguf", "f16")
    assert told.returncode == 2 and "NFC" in told.stderr
    assert not (tmp_path / "out").exists()
    assert ds_slm(*arguments).returncode == 0


def test_values_beyond_float16_are_refused(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: the parameter and its value in the error; nothing is left behind."""

    def enlarge(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = -70_000.0

    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds 7e\+04"):
        exported(tmp_path, chat_tokenizer, change=enlarge)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_whose_gguf_file_fails_leaves_nothing(chat_tokenizer: Path, tmp_path: Path) -> None:
    """Oracle: the run folder alone, after a full disk."""
    with fail_at("syncing", "*.gguf"), pytest.raises(OSError, match="No space"):
        exported(tmp_path, chat_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
