"""An assistant's export behind an OpenAI API: transformers' own server, where `transformers[serving]` is installed."""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_slm.cli.speaking import speaker_of
from ds_slm.publish.chat import Conversation
from ds_slm.publish.models import open_model
from ds_slm.publish.sampling import Settings
from tests.support.assistants import Assistant, write_assistant
from tests.support.runs import BIN, free_port

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason="pip install 'transformers[serving]'")

LONGEST_START_S = 240


def asked(url: str, content: Any = None) -> Any:
    """The JSON that comes back."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LONGEST_START_S) as response:
        return json.load(response)


@contextlib.contextmanager
def served(export: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server that has come up, without a network; `folder` is for what it writes."""
    port = free_port()
    (folder / "hub").mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    log = (folder / "log").open("w")
    command = [str(BIN / "transformers"), "serve", str(export), "--device", "cpu", "--port", str(port), *flags]
    program = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end_s = time.monotonic() + LONGEST_START_S
        while True:
            try:
                asked(f"http://localhost:{port}/health")
                break
            except urllib.error.URLError:
                assert program.poll() is None and time.monotonic() < end_s, (folder / "log").read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        program.terminate()
        program.wait()
        log.close()


def test_transformers_serves_an_export(assistant: Assistant, tmp_path: Path) -> None:
    """Oracle: our own greedy answers over two turns, and their tokens: both ends of an answer are known there."""
    with served(assistant.export, tmp_path) as server:
        assert_answers_are_ours(server, assistant)
        assert asked(f"{server}/v1/models")["object"] == "list"


def test_transformers_serves_exclusive_attention(tmp_path: Path) -> None:
    """Oracle: our own greedy answers. The modeling file is code of the export, which the server must be told to run."""
    assistant = write_assistant(tmp_path / "made", overrides=["model.exclusive_attention=true"])
    with served(assistant.export, tmp_path, "--trust-remote-code") as server:
        assert_answers_are_ours(server, assistant)


def assert_answers_are_ours(server: str, assistant: Assistant) -> None:
    """Ask the server, and our own code."""
    speaker = speaker_of(open_model(assistant.export), assistant.export, False, torch.device("cpu"))
    conversation = Conversation(speaker, Settings(temperature=0), "be brief.")
    for question in ("what is the capital of Norway?", "what is the capital of Japan?"):
        messages = [*conversation.messages, {"role": "user", "content": question}]
        content = {"model": str(assistant.export), "messages": messages, "temperature": 0}
        found = asked(f"{server}/v1/chat/completions", content)
        expected = "".join(conversation.ask(question))
        assert conversation.answer is not None
        assert found["choices"][0]["message"]["content"] == expected
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == conversation.answer.tokens
        assert found["usage"]["prompt_tokens"] == conversation.answer.prompt_tokens
