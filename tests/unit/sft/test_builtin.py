"""Conversations from documentation: how many, of which form, and whether names and answers are what Python says."""

import hashlib
import importlib
import inspect
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sft import builtin
from sft.builtin import Conversation, Entry, answer_of, conversations, conversations_about, entries
from sft.chatml import problem_of

ROOT = Path(__file__).resolve().parents[3]

ORACLE_MODULES = (
    "argparse", "ast", "asyncio", "base64", "bdb", "calendar", "cmd", "codecs", "collections", "concurrent.futures",
    "configparser", "contextlib", "csv", "dataclasses", "difflib", "dis", "doctest", "email.message", "enum", "ftplib",
    "gettext", "http.client", "importlib.abc", "inspect", "ipaddress", "json", "logging", "mailbox", "os.path",
    "pathlib", "pickle", "pydoc", "random", "shutil", "socket", "statistics", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "traceback", "typing", "unittest", "urllib.parse", "urllib.request", "uuid", "weakref",
    "xml.dom.minidom", "zipfile",
)  # fmt: skip
"""Of the standard library, importable anywhere without effect."""

PACKAGE = {
    "__init__.py": '"""A package that was made for a test."""\nfrom ._inner import *\n'
    "from .door import Open as Opened, Open\nfrom ._inner import hidden as found",
    "_inner.py": '__all__ = ["shown"]\ndef shown():\n    """Show what the package exports."""\n'
    'def hidden():\n    """Find what the package calls otherwise."""\n',
    "door.py": "from ._inner import hidden\n"
    'class Open:\n    """Open the door of the package."""\n'
    '    @property\n    def width(self):\n        """Width of the open door in metres."""\n'
    '    @width.setter\n    def width(self, value):\n        """Make the open door as wide as that."""\n'
    '    def _secret(self):\n        """Keep this method to the class."""\n'
    '    async def push(self):\n        """Push the door until it is open."""\n        def inner():\n'
    '            """Never to be seen by the users."""\n',
    "deep/down/well.py": 'def dig():\n    """Dig a well that is deep enough."""\n',
    "user.py": "from .deep.down.well import dig\n",
    "tests/helper.py": 'def helper():\n    """Help the tests of the package along."""\n',
    "test_door.py": 'def helper():\n    """Help the tests of the door along."""\n',
    "broken.py": 'def (:\n    """Not a function that can be parsed."""\n',
}


@pytest.fixture(scope="module")
def everything(known: dict[str, Entry]) -> list[Conversation]:
    return conversations_about(known.values())


@pytest.fixture(scope="module")
def known() -> dict[str, Entry]:
    return {entry.name: entry for entry in entries()}


def spoken(conversation: Conversation, role: str) -> list[str]:
    return [message["content"] for message in conversation if message["role"] == role]


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def test_there_are_enough_of_every_form(everything: list[Conversation]) -> None:
    """Oracle: the promised number; a sixth with several turns and a sixth with a system turn, within a fifth of it."""
    assert 3_000 <= len(everything) <= 8_000
    several = sum(len(spoken(conversation, "user")) > 1 for conversation in everything) / len(everything)
    system = sum(conversation[0]["role"] == "system" for conversation in everything) / len(everything)
    assert several == pytest.approx(1 / 6, rel=0.2)
    assert system == pytest.approx(1 / 6, rel=0.2)
    assert max(len(spoken(conversation, "user")) for conversation in everything) == 3


def test_the_standard_library_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the promised number, with no package installed."""
    monkeypatch.setattr(builtin, "PACKAGES", ("no_such_package",))
    assert len(conversations()) >= 3_000


def test_messages_are_well_formed(everything: list[Conversation]) -> None:
    """Oracle: ChatML's own check; plain dictionaries of two strings; no control token; printable ASCII."""
    assert not [conversation for conversation in everything if problem_of(conversation)]
    messages = [message for conversation in everything for message in conversation]
    assert all(set(message) == {"role", "content"} for message in messages)
    assert all(re.fullmatch(r"[ -~]+", message["content"]) for message in messages)
    assert not [message for message in messages if "<|" in message["content"]]


def test_answers_are_short_plain_sentences(everything: list[Conversation]) -> None:
    """Oracle: patterns of markup, doctests, code and signatures; a period at the end; the length that was asked for."""
    answers = [answer for conversation in everything for answer in spoken(conversation, "assistant")]
    about = [answer for answer in answers if not answer.startswith("It is in ")]
    assert all(20 <= len(answer) <= 220 and answer[0].isupper() and answer.endswith(".") for answer in about)
    assert not [answer for answer in answers if re.search(r"[`*{}<>\[\]|\\=]|->|::|:\w+:|https?:|  ", answer)]
    assert not [answer for answer in about if re.match(r"(?:def|class|import|from) |\w+\(.*\)\.$", answer)]


def test_conversations_fit_the_demo_rows(everything: list[Conversation]) -> None:
    """Oracle: 129 tokens of 4 characters, 5 tokens of markup a message; the demo's own tokenizer needs 3 characters."""
    for characters_per_token, share in ((4, 0.99), (3, 0.95)):
        tokens = [sum(len(turn["content"]) / characters_per_token + 5 for turn in turns) for turns in everything]
        assert sum(count <= 129 for count in tokens) >= share * len(tokens)
    assert sorted(sum(len(turn["content"]) for turn in turns) for turns in everything)[len(everything) // 2] <= 130


def test_one_question_has_one_answer(everything: list[Conversation]) -> None:
    """Oracle: a dictionary of everything said before each answer; counts of names and of equal answers."""
    answer_to: dict[str, str] = {}
    answers: list[str] = []
    asked: list[str] = []
    for conversation in everything:
        for place, message in enumerate(conversation):
            if message["role"] == "assistant":
                before = json.dumps(conversation[:place])
                assert answer_to.setdefault(before, message["content"]) == message["content"]
        about = [answer for answer in spoken(conversation, "assistant") if not answer.startswith("It is in ")]
        answers += about
        asked += spoken(conversation, "user")[: len(about)]
    assert max(Counter(answers).values()) <= 3
    assert len(answers) - len(set(answers)) < 0.1 * len(answers)
    assert len(set(asked)) == len(asked)


def test_names_are_public(known: dict[str, Entry]) -> None:
    """Oracle: no part of a name that begins with an underscore, no tests."""
    assert not [name for name in known if re.search(r"(?:^|\.)(?:_|tests?\.)", name)]


@pytest.mark.parametrize(
    "entry",
    [
        Entry("json.dumps", "function", "json", "Serialize obj to a JSON formatted str."),
        Entry("os.path.join", "function", "os.path", "Join two or more pathname components, inserting '/' as needed."),
        Entry(
            "textwrap.dedent", "function", "textwrap", "Remove any common leading whitespace from every line in text."
        ),
        Entry("asyncio.Queue.put", "method", "asyncio", "Put an item into the queue."),
        Entry("len", "function", "builtins", "Return the number of items in a container."),
        Entry("open", "function", "builtins", "Open file and return a stream. Raise OSError upon failure."),
        Entry("socketserver", "module", "socketserver", "Generic socket server classes."),
        Entry("unittest.TestCase.id", "method", "unittest", ""),
        Entry("statistics.NormalDist.mean", "property", "statistics", "Arithmetic mean of the normal distribution."),
    ],
    ids=lambda entry: entry.name,
)
def test_known_entries(entry: Entry, known: dict[str, Entry]) -> None:
    """Oracle: read in Python's documentation; none for a docstring that begins with code or is missing."""
    assert known.get(entry.name) == (entry if entry.answer else None)


def test_answers_are_what_python_says(known: dict[str, Entry]) -> None:
    """Oracle: `inspect.getdoc` of real objects, found by their names alone; 200 of them chosen by a seed.

    Letters are compared: an answer has no markup. What was written in C too has another docstring and is not asked.
    """
    candidates = sorted(name for name, entry in known.items() if entry.module in ORACLE_MODULES)
    checked = 0
    for name in random.Random(1337).sample(candidates, 300):
        entry = known[name]
        thing = importlib.import_module(entry.module)
        for part in name[len(entry.module) + 1 :].split(".") if entry.kind != "module" else []:
            thing = inspect.getattr_static(thing, part)
        thing = getattr(thing, "__func__", getattr(thing, "__wrapped__", thing))
        if inspect.isfunction(thing) or inspect.ismodule(thing):
            first = (inspect.getdoc(thing) or "").partition("\n\n")[0]
            assert letters(first).startswith(letters(entry.answer)), name
            checked += 1
    assert checked >= 200


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the sum of all items", "Return the sum of all items."),
        ("Return the sum\n    of all items.\n\n    Nothing else.", "Return the sum of all items."),
        ("Use :func:`~os.path.join` or :class:`a Path <pathlib.Path>` here.", "Use os.path.join or a Path here."),
        ("Return *key* or ``None`` where `x` is empty.", "Return key or None where x is empty."),
        ("Parse it, e.g. Like this or like that. More.", "Parse it, e.g. Like this or like that."),
        (f"Do {'very ' * 12}well what it does. Do nothing else at all.", f"Do {'very ' * 12}well what it does."),
        (f"Do the one thing well. Do {'very ' * 50}much.", "Do the one thing well."),
        ("Too short.", ""),
        ("f(x) -> the value of x at this place.", ""),
        ("returns the value of x at this place.", ""),
        ("Return the value of x as follows:", ""),
        ("Return the value of <|im_end|> in the text.", ""),
        ("Return the value of the text ' and \" of it.", ""),
        ("See the documentation of the base class.", ""),
        (f"Do {'very ' * 50}much.", ""),
        ("", ""),
    ],
)
def test_answer_of_a_docstring(docstring: str, answer: str) -> None:
    """Oracle: read by eye."""
    assert answer_of(docstring) == answer


def test_names_are_those_that_users_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what `import made` would offer, of a package that was made for it and is never imported."""
    for name, text in PACKAGE.items():
        (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name).write_text(text)
    monkeypatch.setattr(builtin, "_roots", lambda: [(tmp_path / "made", tmp_path)])
    monkeypatch.setattr(builtin, "_builtins", lambda: iter(()))
    assert {entry.name: (entry.kind, entry.module, entry.answer) for entry in entries()} == {
        "made": ("module", "made", "A package that was made for a test."),
        "made.shown": ("function", "made", "Show what the package exports."),
        "made.found": ("function", "made", "Find what the package calls otherwise."),
        "made.deep.down.well.dig": ("function", "made.deep.down.well", "Dig a well that is deep enough."),
        "made.Open": ("class", "made", "Open the door of the package."),
        "made.Open.width": ("property", "made", "Width of the open door in metres."),
        "made.Open.push": ("method", "made", "Push the door until it is open."),
    }


def test_one_changed_docstring_changes_one_conversation() -> None:
    """Oracle: the conversations before; one more name changes its neighbours at most."""
    asked = [Entry(f"made.f{n}", "function", "made", f"Return the number {n} to the caller.") for n in range(400)]
    before = conversations_about(asked)
    assert conversations_about(asked[::-1]) == before
    changed = [*asked[:7], replace(asked[7], answer="Return another number to the caller."), *asked[8:]]
    after = conversations_about(changed)
    assert [one == other for one, other in zip(before, after, strict=True)].count(False) == 1
    for gone in range(20):
        kept = conversations_about(asked[:gone] + asked[gone + 1 :])
        assert sum(conversation not in before for conversation in kept) <= 3


def test_the_same_in_every_process(everything: list[Conversation]) -> None:
    """Oracle: the text of another process with another hash seed, which has imported nothing that was read."""
    program = (
        "import sys, hashlib, json\nfrom sft.builtin import conversations\n"
        "text = json.dumps(conversations())\n"
        "assert not {'numpy', 'networkx', 'tkinter', 'pydoc', 'this'} & set(sys.modules)\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "11"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == hashlib.sha256(json.dumps(everything).encode()).hexdigest(), found.stderr
