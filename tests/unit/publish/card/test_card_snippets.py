"""The Python of each published card, run on our export of its recipe: only the model's name is replaced by a folder.

Shapes are the recipes', with fresh weights; slm-124m has 2 layers, axiom-380m-instruct 2 narrow ones. The tokenizer is
a small trained one with ChatML's control tokens; ids beyond it stand for nothing. Without a GPU cuda is read as cpu.
"""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.model.decoder import build
from ds_slm.publish.export import export
from ds_slm.recipe import loading
from tests.support.data_recipes import recipe, source, texts

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

ANT = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model_id = "GODELEV/Ant-10M"
# Load the custom tokenizer and model architecture
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
model_id,
torch_dtype=torch.float16,
device_map="auto"
)
# Set up raw text input
prompt = "The basic principles of small language models require"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
# Generate using high repetition penalties to counter the narrow vocabulary space
with torch.no_grad():
    outputs = model.generate(
    **inputs,
    max_new_tokens=32,
    do_sample=True,
    temperature=0.7,
    top_p=0.9,
    repetition_penalty=1.5
    )
# Decode tokens back into structural text fragments
generated_text = tokenizer.decode(outputs[0], skip_special_tokens=True)
print("Generated Output Fragments:")
print(generated_text)
"""
AXIOM = r"""
from transformers import AutoTokenizer, AutoModelForCausalLM

model_name = "user-anto/Axiom-Dense-380M-Instruct"

tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, device_map="cpu")

prompt = "<|im_start|>user\nWrite a short email to my team about meeting tomorrow.<|im_end|>\n<|im_start|>assistant\n"
inputs = tokenizer(prompt, return_tensors="pt").to("cpu")

with torch.no_grad():
    outputs = model.generate(
        **inputs,
        max_new_tokens=128,
        temperature=0.2,
        top_p=0.85,
        repetition_penalty=1.15,
        no_repeat_ngram_size=3,
    )

print(tokenizer.decode(outputs[0]))
"""
GPT_S = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
model_name = "AxiomicLabs/GPT-S-1.4M"
tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    model_name, trust_remote_code=True, torch_dtype=torch.bfloat16, device_map="auto",
)
prompt = "The future of AI is"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
with torch.inference_mode():
    output = model.generate(
        **inputs, max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.95, repetition_penalty=1.1,
        no_repeat_ngram_size=4,
    )
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
SLM_10M = """
from transformers import AutoTokenizer, AutoModelForCausalLM
import torch
import torch.nn.functional as F
model = AutoModelForCausalLM.from_pretrained(
    "liodon-ai/slm-10m", trust_remote_code=True, dtype=torch.bfloat16,
).to("cuda")
tokenizer = AutoTokenizer.from_pretrained("liodon-ai/slm-10m", trust_remote_code=True)
def score(context, completion):
    full = tokenizer.encode(context + completion, return_tensors="pt").to("cuda")
    ctx_len = len(tokenizer.encode(context, add_special_tokens=False))
    with torch.no_grad():
        logits = model(full).logits[0]
    return -F.cross_entropy(logits[ctx_len - 1:-1], full[0, ctx_len:]).item()
context = "Which is an example of a renewable energy resource? Answer:"
choices = [" biomass", " coal", " gas", " oil"]
scores = [score(context, c) for c in choices]
best = choices[scores.index(max(scores))]
print(f"Best answer: {best.strip()}")
"""
SLM_124M = """
from transformers import AutoTokenizer, AutoModelForCausalLM
model_id = "rijuludar/slm-124M-llama32k-fwedu"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id)
prompt = "The process of photosynthesis involves"
inputs = tokenizer(prompt, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""
SMALLER = [
    "model.num_hidden_layers=2", "model.hidden_size=256", "model.intermediate_size=512", "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
]  # fmt: skip
CARDS = {
    "ant-10m": (ANT, "GODELEV/Ant-10M", [], "Generated Output Fragments:\nThe basic principles of small"),
    "axiom-380m-instruct": (
        f"import torch\n{AXIOM}", "user-anto/Axiom-Dense-380M-Instruct", SMALLER, "<|im_start|>user\nWrite a short"),
    "gpt-s-1.4m": (GPT_S, "AxiomicLabs/GPT-S-1.4M", [], "The future of AI is"),
    "slm-10m": (SLM_10M, "liodon-ai/slm-10m", [], "Best answer: "),
    "slm-124m": (
        SLM_124M, "rijuludar/slm-124M-llama32k-fwedu", ["model.num_hidden_layers=2"], "The process of photosynthesis"),
}  # fmt: skip
"""Card -> its Python (axiom's forgets an import), the name in it, what is smaller, how its output begins."""


@pytest.mark.parametrize("card", CARDS)
def test_the_cards_own_snippet_runs_on_our_export(card: str, tmp_path: Path) -> None:
    """Oracle: the published snippet: what it prints begins with its prompt, or is one of its choices."""
    snippet, name, smaller, begins = CARDS[card]
    tokens = '"<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3'
    section = f'kind = "bpe"\nvocab_size = 320\nspecial_tokens = {{ {tokens} }}\npad_token = "<|pad|>"\n'
    trained = build_tokenizer(recipe(source("made", path="."), tokenizer=section), lambda _: iter(texts()))
    trained.save(tmp_path / "tokenizer")
    shape = loading.load(card, smaller).model
    folder = tmp_path / "export"
    export(dict(build(shape, seed=1).named_parameters()), shape, tmp_path / "tokenizer", folder)

    code = snippet.replace(f'"{name}"', repr(str(folder)))
    if not torch.cuda.is_available():
        code = code.replace('"cuda"', '"cpu"')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().startswith(begins) and len(printed.getvalue()) > len(begins)
