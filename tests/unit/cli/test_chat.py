"""`ds-slm chat`: conversations from stdin, one answer for a script, and what is refused."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_slm.cli import chat
from ds_slm.data.sources.readers import is_unicode
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.publish.sampling import Settings
from tests.support.assistants import CITIES, CONTEXT, Assistant

pytestmark = pytest.mark.usefixtures("one_thread")
FRANCE, JAPAN = "what is the capital of France?", "what is the capital of Japan?"
Command = Callable[..., Any]


class Typed(io.StringIO):
    """Lines that somebody types at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(assistant: Assistant, ds_slm: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A conversation with the likeliest answers: the lines that are typed, and further flags."""

    def run(text: str, *flags: object, stdin: type[io.StringIO] = io.StringIO, model: Path = assistant.run) -> Any:
        monkeypatch.setattr(sys, "stdin", stdin(text))
        return ds_slm("chat", model, "--temperature", 0, *flags)

    return run


def answers(printed: str) -> list[str]:
    """What is neither a cost nor a remark."""
    return [line for line in printed.splitlines() if line.startswith("it is")]


@pytest.mark.parametrize("place", ["run", "export", "checkpoint"])
def test_a_conversation(place: str, assistant: Assistant, talk: Command) -> None:
    """Oracle: what the model was taught, from each place; a cost stands behind every answer."""
    model = assistant.run / "checkpoints" / "step-00000007" if place == "checkpoint" else getattr(assistant, place)
    done = talk(f"{FRANCE}\n\n{JAPAN}\n", model=model)
    assert (done.returncode, done.stderr) == (0, "")
    assert answers(done.stdout) == ["it is Paris.", f"it is {CITIES['Japan']}."]
    assert done.stdout.count("tokens/s") == 2
    assert "/help" not in done.stdout and "> " not in done.stdout  # for somebody who types


def test_somebody_who_types_is_greeted(talk: Command, assistant: Assistant) -> None:
    """Oracle: the model's size and context, the marks of input, and an end on a line of its own."""
    done = talk(f'{FRANCE}\n"""what is the capital\nof Japan?"""\n/quit\nnever read\n', stdin=Typed)
    assert done.returncode == 0
    greeting, *rest = done.stdout.splitlines()
    assert f"a context of {CONTEXT} tokens" in greeting and "/help" in greeting
    assert done.stdout.count("> ") == 3 and done.stdout.count("... ") == 1
    assert rest and done.stdout.endswith("\n")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("/hlep", "/hlep is not a command; the nearest is '/help'"),
        ("/zzz", "/zzz is not a command; /help lists them"),
        ("/set temprature=1", "the nearest is 'temperature'"),
        ("/set top_p=7", "top_p is 7.0: expected more than 0, and 1 at most"),
        ("/set", "temperature=0.0, top_k=0"),
        ("/undo", "nothing was said yet"),
        ("/save", "expected a file"),
        ("/save nowhere/at/all", "in a folder that exists"),
        ("/save here.jsonl", "nothing was said yet"),
        ("/save ~nobody-here.jsonl", "in a folder that exists"),
        ("/save a\0b", "null byte; expected a file"),
        ("/system caf\udce9", "the system prompt holds bytes that are not UTF-8"),
        ("/set temperature=1e-40", "temperature is 1e-40: expected 0, or 0.001 to 1000"),
        ("/set max-new-tokens=99999999999999999999", "less than 2**31"),
        ("cat " * CONTEXT, f"tokens and the model's context {CONTEXT}: shorten it"),
        ("caf\udce9?", "bytes that are not UTF-8"),
        ('"""a text\nwithout end', "it was not sent"),
    ],
)
def test_a_mistake_is_told_and_the_conversation_goes_on(lines: str, told: str, talk: Command) -> None:
    """Oracle: the sentence, and the answer to the next question; the text without an end was the last."""
    done = talk(f"{lines}\n" if '"""' in lines else f"{lines}\n{FRANCE}\n")
    assert done.returncode == 0
    assert told in done.stdout
    assert answers(done.stdout) == ([] if '"""' in lines else ["it is Paris."])
    assert is_unicode(done.stdout) and "Traceback" not in done.stdout + done.stderr


def test_commands_change_the_conversation(talk: Command, tmp_path: Path) -> None:
    """Oracle: the messages that are saved after each command, in the form that fine-tuning reads."""
    one, two, three = (tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl"))
    done = talk(
        f"{FRANCE}\n{JAPAN}\n/undo\n/save {one}\n/reset\n/system be brief.\n{JAPAN}\n/save {two}\n"
        f"/system\n/set max-new-tokens=2\n{FRANCE}\n/save {two}\n/save {three}\n"
    )
    assert done.returncode == 0
    saved = {path.name: json.loads(path.read_text())["messages"] for path in (one, two, three)}
    turns = [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": "it is Paris."}]
    assert saved["one.jsonl"] == turns
    assert saved["two.jsonl"] == saved["three.jsonl"]
    assert [message["role"] for message in saved["two.jsonl"]] == ["user", "assistant"] * 2
    assert saved["two.jsonl"][1]["content"] == f"it is {CITIES['Japan']}."
    assert "cut: it has max_new_tokens" in done.stdout


def test_a_system_prompt_is_saved_with_the_rest(talk: Command, tmp_path: Path) -> None:
    """Oracle: the first message. Another's file is never overwritten."""
    file, other = tmp_path / "talk.jsonl", tmp_path / "other.jsonl"
    other.write_text("kept")
    done = talk(f"{FRANCE}\n/save {file}\n/save {other}\n", "--system", "be brief.")
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "be brief."}
    assert other.read_text() == "kept" and "name another file" in done.stdout


def test_forgotten_turns_are_told_once_each_time(talk: Command) -> None:
    """Oracle: the sentence behind those answers for which turns were forgotten, and behind no others."""
    done = talk(f"{FRANCE}\n" * 8)
    told = [" forgotten" in line for line in done.stdout.splitlines() if "tokens/s" in line]
    assert len(told) == 8 and not any(told[:3]) and any(told[3:])
    assert done.stdout.count(" forgotten") == sum(told)


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what was said of the first answer, and the whole second one; at the mark a hint."""
    write, seen = chat._write, []

    def interrupted(piece: str) -> None:
        write(piece)
        seen.append(piece)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_write", interrupted)
    done = talk(f"{FRANCE}\n/reset\n{FRANCE}\n")
    assert done.returncode == 0
    said = "".join(seen[:2])
    assert done.stdout.splitlines()[0] == said != "it is Paris."
    assert "stopped" in done.stdout.splitlines()[1]
    assert answers(done.stdout)[-1] == "it is Paris."


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: pictures of them; in a file they are as the model wrote them."""
    terminal, file = Typed(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stdout", stream)
        chat._write("a\x1b[2J\tb\n\x9b\x7fé")
    assert terminal.getvalue() == "a␛[2J\tb\n\ufffd␡é"
    assert file.getvalue() == "a\x1b[2J\tb\n\x9b\x7fé"


def test_one_prompt_is_answered_for_a_script(talk: Command, assistant: Assistant) -> None:
    """Oracle: what the model was taught, alone on stdout; from stdin the same; one object with --json."""
    done = talk("", "--prompt", JAPAN)
    assert (done.returncode, done.stdout) == (0, f"it is {CITIES['Japan']}.\n")
    assert "tokens/s" in done.stderr
    assert talk(f"{JAPAN}\n", "--prompt", "-").stdout == done.stdout

    done = talk("", "--prompt", JAPAN, "--system", "be brief.", "--json", "--top-k", 3)
    found = json.loads(done.stdout)
    text, tokenizer = f"it is {CITIES['Japan']}.", load_tokenizer(assistant.export)
    assert found.pop("seconds") > 0 and found.pop("tokens_per_s") > 0 and found.pop("prompt_tokens") > 0
    assert found == {
        "model": str(assistant.run / "checkpoints" / "step-00000007"), "system": "be brief.", "prompt": JAPAN,
        "answer": text, "tokens": len(tokenizer.encode(text)) + 1, "stopped_by": "<|im_end|>", "forgotten_turns": 0,
        "settings": asdict(Settings(temperature=0, top_k=3)),
    }  # fmt: skip


def test_ctrl_c_ends_a_script(talk: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the exit code of a program that was interrupted; no word about training, no traceback."""

    def interrupted(piece: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_write", interrupted)
    done = talk("", "--prompt", FRANCE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "\n", "")


def test_a_base_continues_a_text(talk: Command, assistant: Assistant) -> None:
    """Oracle: transformers' greedy generate on the export; nothing is remembered from one text to the next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assistant.base)
    model: Any = AutoModelForCausalLM.from_pretrained(assistant.base)
    text = "it is"
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert output.shape[1] == len(tokenizer.encode(text)) + 5
    expected = tokenizer.decode(output[0], skip_special_tokens=True).removeprefix(text)

    flags = ("--continue", "--max-new-tokens", 5)
    assert talk("", *flags, "--prompt", text, model=assistant.base).stdout == expected + "\n"
    done = talk(f"{text}\n/undo\n{text}\n", *flags, model=assistant.base)
    assert done.stdout.count(f"{expected}\n5 tokens") == 2
    assert "/undo belongs to a conversation" in done.stdout


def _mistake(case: str, assistant: Assistant, folder: Path) -> list[object]:
    """The arguments of a mistake."""
    ask = ["--prompt", FRANCE]
    if case == "base":
        return [assistant.base, *ask]
    if case == "no tokenizer":
        shutil.copytree(assistant.export, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
        return [folder / "bare", *ask]
    if case == "nan":
        shutil.copytree(assistant.export, folder / "nan")
        state = load_file(folder / "nan" / "model.safetensors")
        state["model.norm.weight"][:] = torch.nan
        save_file(state, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
        return [folder / "nan"]
    return {
        "no model": [folder / "nowhere", *ask],
        "empty": [assistant.run, "--prompt", " \n"],
        "long": [assistant.run, "--prompt", "cat " * CONTEXT],
        "json": [assistant.run, "--json"],
        "system": [assistant.base, "--continue", "--system", "be brief."],
        "system bytes": [assistant.run, *ask, "--system", "caf\udce9"],
        "settings": [assistant.run, *ask, "--temperature", -1, "--top-p", 2],
        "extremes": [assistant.run, *ask, "--repetition-penalty", 1e-40, "--max-new-tokens", 10**20],
    }[case]


MISTAKES = {
    "base": ["is a base", "--continue", "ds-slm sft RECIPE --base"], "no tokenizer": ["holds no whole tokenizer"],
    "nan": ["not finite"], "no model": ["does not exist"], "empty": ["the prompt is empty"],
    "long": [f"context {CONTEXT}: shorten it"], "json": ["add --prompt TEXT"], "system": ["leave out --system"],
    "system bytes": ["the system prompt holds bytes"], "settings": ["temperature is -1.0", "top_p is 2.0"],
    "extremes": ["repetition_penalty is 1e-40: expected 0.01 to 100", f"max_new_tokens is {10**20}"],
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, assistant: Assistant, tmp_path: Path, ds_slm: Command) -> None:
    """Oracle: exit code 2, nothing on stdout, one paragraph that says what is wrong and what is right."""
    done = ds_slm("chat", *_mistake(case, assistant, tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert all(part in done.stderr for part in MISTAKES[case]), done.stderr
    assert "Traceback" not in done.stderr and "\n\n" not in done.stderr.strip()


def test_another_chat_template_is_kept(assistant: Assistant, tmp_path: Path, ds_slm: Command) -> None:
    """Oracle: transformers' ids of a template that is not ours; what it refuses is told."""
    from transformers import AutoTokenizer

    shutil.copytree(assistant.export, tmp_path / "other")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'system' %}"
    template += "{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}[assistant]"
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    flags = ("--prompt", FRANCE, "--max-new-tokens", 3, "--json")
    found = json.loads(ds_slm("chat", tmp_path / "other", *flags).stdout)
    assert found["prompt_tokens"] == len(
        AutoTokenizer.from_pretrained(tmp_path / "other").encode(f"[user]{FRANCE}[assistant]")
    )
    done = ds_slm("chat", tmp_path / "other", "--system", "be brief.", *flags)
    assert done.returncode == 2 and "refuses this conversation (no system prompt)" in done.stderr


@pytest.mark.parametrize(
    ("template", "told"),
    [(b"{{ 1 + 'a' }}", "refuses this conversation (unsupported operand"), (b"caf\xe9", "is not UTF-8")],
)
def test_a_chat_template_that_fails_is_told(
    template: bytes, told: str, assistant: Assistant, tmp_path: Path, ds_slm: Command
) -> None:
    """Oracle: exit code 2 and the sentence."""
    shutil.copytree(assistant.export, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_bytes(template)
    done = ds_slm("chat", tmp_path / "other", "--prompt", FRANCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and "Traceback" not in done.stderr
