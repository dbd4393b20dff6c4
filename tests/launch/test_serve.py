"""An assistant's export behind an OpenAI API: transformers' own server, where `transformers[serving]` is installed."""

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
from tests.support.assistants import Assistant
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


@pytest.fixture
def server(assistant: Assistant, tmp_path: Path) -> Iterator[str]:
    """The address of a server that has come up, without a network."""
    port = free_port()
    (tmp_path / "hub").mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    command = [str(BIN / "transformers"), "serve", str(assistant.export), "--device", "cpu", "--port", str(port)]
    program = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end_s = time.monotonic() + LONGEST_START_S
        while True:
            try:
                asked(f"http://localhost:{port}/health")
                break
            except urllib.error.URLError:
                assert program.poll() is None and time.monotonic() < end_s, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        program.terminate()
        program.wait()
        log.close()


def test_transformers_serves_an_export(server: str, assistant: Assistant) -> None:
    """Oracle: our own greedy answers over two turns, and their tokens: both ends of an answer are known there."""
    speaker = speaker_of(open_model(assistant.export), assistant.export, False, torch.device("cpu"))
    conversation = Conversation(speaker, Settings(temperature=0), "be brief.")
    for question in ("what is the capital of Norway?", "what is the capital of Japan?"):
        messages = [*conversation.messages, {"role": "user", "content": question}]
        found = asked(
            f"{server}/v1/chat/completions", {"model": str(assistant.export), "messages": messages, "temperature": 0}
        )
        expected = "".join(conversation.ask(question))
        assert conversation.answer is not None
        assert found["choices"][0]["message"]["content"] == expected
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == conversation.answer.tokens
        assert found["usage"]["prompt_tokens"] == conversation.answer.prompt_tokens
    assert asked(f"{server}/v1/models")["object"] == "list"
