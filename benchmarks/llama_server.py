"""llama.cpp in this process, from the xllamacpp package: its server, asked over the loopback."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A GGUF file, loaded. Its server listens on a free port of 127.0.0.1 for as long as the object lives."""

    def __init__(self, path: Path, context: int) -> None:
        """Loads a file; `context` is the number of tokens that it may hold."""
        import xllamacpp  # type: ignore[import-not-found]

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel = context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.warmup, params.fit_params = False, False
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def _post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ids(self, text: str, parse_special: bool = True, add_special: bool = True) -> list[int]:
        """The ids of a text; by default control tokens are parsed, and the tokens around a text are added."""
        return self._post("/tokenize", content=text, parse_special=parse_special, add_special=add_special)["tokens"]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._post("/detokenize", tokens=list(ids))["content"]

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation by the file's chat template, and the beginning of an answer."""
        return self._post("/apply-template", messages=list(messages))["prompt"]

    def greedy(self, prompt: str | Sequence[int], count: int, **options: Any) -> dict[str, Any]:
        """The most likely continuation of at most `count` tokens."""
        asked = prompt if isinstance(prompt, str) else list(prompt)
        fixed = {"temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        return self._post("/completion", prompt=asked, n_predict=count, **fixed, **options)

    def log_probabilities(self, prompt: Sequence[int], vocab_size: int) -> dict[int, float]:
        """The log-probability of every id that may follow."""
        # The server gives them only for a token that is text, not for an end or a part of a letter.
        text = [[self.ids("a")[-1], 1e4]]
        first = self.greedy(prompt, 1, n_probs=vocab_size, logit_bias=text)["completion_probabilities"][0]
        return {one["id"]: one["logprob"] for one in first["top_logprobs"]}
