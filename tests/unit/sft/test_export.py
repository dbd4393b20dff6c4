"""An assistant's export: its chat template, the two ends of an answer, its parameters, and the way a card uses it."""

import json
import re
from pathlib import Path

import pytest
import torch

from ds_slm.data.tokenizers.tokenizer import IM_END, load_tokenizer
from ds_slm.model import decoder
from ds_slm.publish.export import export
from ds_slm.recipe import loading
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.sections import Model, Sft
from sft.chatml import ChatML
from sft.prepare import prepare_conversations
from tests.support.data_recipes import BPE, CL100K, prepare, recipe, source, texts, write_jsonl

PROMPT = "<|im_start|>user\nWrite a short mail.<|im_end|>\n<|im_start|>assistant\n"


def assistant_tokenizer(folder: Path, section: str, base_tokenizer: Path) -> Path:
    """The tokenizer folder of prepared conversations."""
    talks = [
        json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": text}]) for text in texts(40)
    ]
    lines = "".join(f'{{"messages": {talk}}}\n' for talk in talks)
    (folder / "talks.jsonl").write_text(lines)
    made = recipe(source("talks", path=folder / "talks.jsonl", column="messages"), tokenizer=section, seq_len=512)
    made = made.model_copy(update={"sft": Sft()})
    prepared = prepare_conversations(made, folder / "data" / "talks", base_tokenizer, report=lambda line: None)
    return prepared.tokenizer_folder


def tiny_shape(vocab_size: int) -> Model:
    """A shape whose embedding is nearly all of it."""
    return loading.load("axiom-380m").model.model_copy(
        update={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": vocab_size,
        }
    )


def exported(folder: Path, tokenizer_folder: Path, vocab_size: int) -> tuple[Path, int]:
    """An export of a fresh decoder, and its number of parameters."""
    shape = tiny_shape(vocab_size)
    model = decoder.build(shape, seed=0)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return folder, export(state, shape, tokenizer_folder, folder)


def test_the_published_count() -> None:
    """Oracle: the card's 385,849,344, from the formula and the built model; a tied head is stored once."""
    model = loading.load("axiom-380m-instruct").model
    assert parameters(model) == 385_849_344
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in decoder.Decoder(model).parameters()) == 385_849_344
    assert model == loading.load("axiom-380m").model


def test_chat_template_and_ends(tmp_path: Path) -> None:
    """Oracle: our own encoding of the prompt; generation stops at a turn's end and at the end of text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = write_jsonl(tmp_path / "text.jsonl", texts(200))
    base = prepare(recipe(source("a", path=text), tokenizer=BPE), tmp_path / "base")
    tokenizer_folder = assistant_tokenizer(tmp_path, BPE, base.tokenizer_folder)
    folder, parameters = exported(tmp_path / "out", tokenizer_folder, 300)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    question = [{"role": "system", "content": "be short"}, {"role": "user", "content": "é <|im_end|>?"}]
    plain = [{"role": "user", "content": "abc"}]
    found = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == ChatML(ours).prompt(plain)
    assert theirs.apply_chat_template(question, tokenize=False).count(IM_END) == 3
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [ours.token_id(IM_END), ours.eos_id]
    assert model.num_parameters() == parameters
    assert not (folder / "manifest.json").exists()


@pytest.fixture(scope="module")
def cl100k_export(test_data: Path, cl100k_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant's export with a vocabulary of 100,277 ids, which takes long to make."""
    folder = tmp_path_factory.mktemp("cl100k")
    section = CL100K.replace("RANKS", str(test_data / "cl100k_base" / "cl100k_base.tiktoken"))
    return exported(folder / "out", assistant_tokenizer(folder, section, cl100k_folder), 100_277)[0]


def test_the_cards_own_snippet(test_data: Path, cl100k_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the quick start as published, where the card lies beside the test data: only the name of the model is
    another, and the import that it forgets is added. It prints its prompt and what follows.
    """
    card = test_data.parent / "cards" / "axiom-380m-instruct.txt"
    if not card.is_file():
        pytest.skip("the card is not beside the test data")
    snippet = card.read_text().split("Quickstart\n")[1].split("Model Summary")[0]
    published = re.search(r'model_name = "(.*)"', snippet)
    assert published is not None
    exec(compile("import torch\n" + snippet.replace(published[1], str(cl100k_export)), str(card), "exec"), {})
    assert capsys.readouterr().out.startswith("<|im_start|>user\n")


def test_used_as_a_card_uses_it(cl100k_export: Path) -> None:
    """transformers as a card's reader calls it, device_map and all: the prompt's control tokens are parsed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cl100k_export)
    model = AutoModelForCausalLM.from_pretrained(cl100k_export, device_map="cpu")
    inputs = tokenizer(PROMPT, return_tensors="pt").to("cpu")
    assert inputs["input_ids"][0, 0] == 100_264
    assert (inputs["input_ids"] == 100_265).sum() == 1
    with torch.no_grad():
        outputs = model.generate(
            **inputs, max_new_tokens=8, temperature=0.2, top_p=0.85, repetition_penalty=1.15, no_repeat_ngram_size=3
        )
    assert tokenizer.decode(outputs[0]).startswith(PROMPT)
    assert model.generation_config.eos_token_id == [100_265, 100_257]
    assert model.generation_config.pad_token_id == 100_257
