"""An exported tokenizer in other programs' hands: its template under plain Jinja, its padding in a batch."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch

from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE, unmarked
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from ds_slm.recipe import loading
from tests.support import conversations


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    conversations.tokenizer().save(folder)
    (folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def exported(tokenizer_folder: Path, out: Path, **changes: Any) -> Path:
    """A fresh decoder with a trained tokenizer, as a Hugging Face folder."""
    shape = loading.parse(conversations.TINY).model.model_copy(update=changes)
    export(dict(build(shape, seed=4).named_parameters()), shape, tokenizer_folder, out)
    return out


def test_the_template_renders_under_plain_jinja(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: transformers, with the template that training uses; the marks alone are gone."""
    from transformers import AutoTokenizer

    folder = exported(tokenizer_folder, tmp_path / "out")
    shipped = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    marked = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(jinja2.TemplateSyntaxError):
        jinja2.Environment().from_string(CHAT_TEMPLATE)
    for options in ({}, {"trim_blocks": True, "lstrip_blocks": True}):
        template = jinja2.Environment(**options).from_string(shipped)
        for messages in conversations.made(20):
            for prompt in (False, True):
                expected = marked.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                assert template.render(messages=messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("mark", ["{%- generation -%}", "{% generation %}", "{%generation-%}", "{%-  generation %}"])
def test_white_space_around_a_mark_stays(mark: str) -> None:
    """Oracle: another block that does nothing, in place of the mark."""
    marked = f"a \n  {mark}\n b \n {mark.replace('generation', 'endgeneration')} \n c"
    other = marked.replace("endgeneration", "endif").replace("generation", "if true")
    for options in ({}, {"trim_blocks": True, "lstrip_blocks": True}):
        environment = jinja2.Environment(**options)
        found = environment.from_string(unmarked(marked)).render()
        assert found == environment.from_string(other).render()


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"exclusive_attention": True}], ids=str)
def test_transformers_4_and_5_read_the_same(tokenizer_folder: Path, tmp_path: Path, changes: Any) -> None:
    """Oracle: the words each version looks for: where one is missing, version 4 takes its default and says nothing."""
    folder = exported(tokenizer_folder, tmp_path / "out", rope_theta=2_500.0, **changes)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 2_500.0
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer_config.get("extra_special_tokens"), list)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"exclusive_attention": True}], ids=str)
def test_batched_answers_are_those_of_one_by_one(tokenizer_folder: Path, tmp_path: Path, changes: Any) -> None:
    """Oracle: transformers' generate, each prompt by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported(tokenizer_folder, tmp_path / "out", **changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompts = ["the cat", "the dog sees the bird in the garden", "a"]
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

    def answers(texts: list[str]) -> list[list[int]]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            return model.generate(**inputs, **options)[:, -8:].tolist()

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]
