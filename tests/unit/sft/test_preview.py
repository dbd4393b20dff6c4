"""Masks that are shown are those of the shards: on the page, in the terminal; refused where they cannot be meant."""

import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from sft import encode, preview, shards
from sft.chatml import Encoded
from tests.support.assistants import chat, ds_slm, small_talk, write_base, write_sft

ROOT = Path(__file__).resolve().parents[3]
TRAINED, BEGIN, CUT, IDS = 1 << 31, 1 << 30, 1 << 28, (1 << 28) - 1
"""The shards' format, spelt out."""
IM_START, IM_END = 2, 3

ODD = [
    chat("<script>alert(1)</script> & \x1b[31mred\x9b1m\r\n\tx", 'ok 😀 <|im_end|> "q" <b>\n\nbye\n', system="be 漢字"),
    chat("hi", "long " * 80, "more", "never seen"),
    chat("no answer"),
    chat("cut", "😀" * 60),
    chat("\nfirst", "one", "two \ufffd", "\ufffd\ufffd 漢\ufffd", "three", ""),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("preview"))


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """Where data and HTML of the odd conversations go."""
    write_sft(base.parent, [*ODD, *small_talk()])
    return base.parent


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def shard(folder: Path, recipe: str = "chatty") -> list[np.ndarray]:
    """The training split's conversations, read without the code that is tested."""
    flagged = np.fromfile(folder / "data" / recipe / "chats" / "train-00000.bin", "<u4")
    return np.split(flagged, np.flatnonzero(flagged & BEGIN)[1:])


def decode(base: Path, ids: list[int]) -> str:
    return tokenizers.Tokenizer.from_file(str(base / "tokenizer.json")).decode(ids, skip_special_tokens=False)


def pictured(text: str) -> str:
    """Control characters as they are shown."""
    shown = {"\r": "␍", "\x1b": "␛", "\x9b": "\ufffd"}
    return "".join(shown.get(character, character) for character in text)


def colours(base: Path, flagged: np.ndarray) -> list[tuple[bool, str]]:
    """What a shard says: the text of each stretch of equal flags and kind."""
    kinds = [(bool(token & TRAINED), (token & IDS) in (IM_START, IM_END), int(token & IDS)) for token in flagged]
    stretches = [(key, [kind[2] for kind in group]) for key, group in groupby(kinds, lambda kind: kind[:2])]
    return [(trained, pictured(decode(base, ids))) for (trained, _), ids in stretches]


class Page(HTMLParser):
    """Conversations of a page: stretches of (trained, text), and (trained, id) of every token."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stretches: list[list[tuple[bool, str]]] = []
        self.tokens: list[list[tuple[bool, int]]] = []
        self.counts: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.inside = self.in_counts = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "div":
            self.inside = True
            self.stretches.append([])
            self.tokens.append([])
        elif tag == "p":
            self.in_counts = given.get("class") == "counts"
        elif self.inside and tag in ("mark", "span"):
            self.open.append(tag)
            self.stretches[-1].append((tag == "mark", ""))
        elif self.inside and tag == "i":
            self.tokens[-1] += [(self.open[-1] == "mark", int(token)) for token in (given["data-ids"] or "").split()]

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.inside = False
        elif tag == "p":
            self.in_counts = False
        elif self.inside and tag in ("mark", "span"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.inside:
            assert self.open, f"{data!r} has no colour"
            trained, text = self.stretches[-1][-1]
            self.stretches[-1][-1] = trained, text + data
        elif self.in_counts:
            self.counts.append(data)


def merged(stretches: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    return [(key, "".join(text for _, text in group)) for key, group in groupby(stretches, lambda one: one[0])]


@pytest.mark.parametrize("flags", [[], ["--ids"]])
def test_the_page_marks_what_the_shards_flag(
    base: Path, folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the shard's bytes, decoded by `tokenizers`: every stretch, id and count; the summary."""
    assert ds_slm("sft", "chatty.toml", "--base", base, "--preview", "7", *flags, monkeypatch=monkeypatch) == 0
    conversations = shard(folder)
    text = (folder / "preview-chatty.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.stretches) == 7
    for number, flagged in enumerate(conversations[:7]):
        assert page.stretches[number] == colours(base, flagged)
        kinds = [(bool(token & TRAINED), int(token & IDS)) for token in flagged]
        assert page.tokens[number] == (kinds if flags else [])
        truncated = ", truncated" if flagged[0] & CUT else ""
        assert page.counts[number] == f"{len(flagged)} tokens, {sum(is_on for is_on, _ in kinds)} trained{truncated}"
    assert sum("truncated" in count for count in page.counts) == 2
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    told = capsys.readouterr().out
    assert f"conversations: {len(conversations)} to train on (2 truncated)" in told
    assert "dropped: 1 without a target" in told
    assert "dropped: 1 without a target" in text
    assert "preview-chatty.html" in told
    assert not (folder / "runs").exists()


def test_the_terminal_shows_the_same(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the shard's flags; by brackets where there is no colour, else by colour; no control character."""
    arguments = ["sft", "chatty.toml", "--base", base, "--preview", "6", "--out", "six.html"]
    for colour in (False, True):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        if colour:
            monkeypatch.setenv("FORCE_COLOR", "1")
        assert ds_slm(*arguments, monkeypatch=monkeypatch) == 0
        shown = capsys.readouterr().out
        for flagged in shard(folder)[:6]:
            for trained, text in merged(colours(base, flagged)):
                lines = text.expandtabs(8).replace("\n", "⏎\n")
                if not colour:
                    assert (f"⟦{lines}⟧" in shown) if trained else (lines in shown)
        if colour:
            assert "⟦" not in shown
            assert "\x1b[1;32mthe cat is " in shown
            assert "\x1b[36m" in shown
            assert "\x1b[31m" not in shown
        else:
            assert not set(shown) & {"\x1b", "\r", "\x9b"}


def test_styles_follow_the_flags(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shard's flags, against the style of every character; ids behind each token on demand."""
    assert ds_slm("sft", "chatty.toml", "--base", base, "--preview", "1", monkeypatch=monkeypatch) == 0
    for number, flagged in enumerate(shard(folder)[:8]):
        one = preview.show(number, flagged, lambda ids: decode(base, ids), {IM_START, IM_END})
        text = preview.as_text(one)
        spans = [("green" in str(span.style), text.plain[span.start : span.end]) for span in text.spans]
        expected = [(trained, line.replace("\n", "⏎\n")) for trained, line in merged(colours(base, flagged))]
        assert merged(spans) == expected
        numbers = preview.as_text(one, with_ids=True)
        printed = [numbers.plain[span.start : span.end] for span in numbers.spans if span.style == "dim"]
        ids = [int(token) for token in flagged & IDS]
        assert [int(token) for group in printed for token in group.strip("⟨⟩").split()] == ids


def test_pieces_are_whole_characters(base: Path) -> None:
    """Oracle: the decoding of all ids at once, for text of several bytes and for random ids."""
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode("a😀漢 the cat", add_special_tokens=False).ids
    texts = preview.pieces(ids, lambda some: decode(base, some))
    assert [text for text, _ in texts if not text.isascii()] == ["😀", "漢"]
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(4, 320) for _ in range(rng.randint(1, 12))]
        found = preview.pieces(ids, lambda some: decode(base, some))
        assert "".join(text for text, _ in found) == decode(base, ids)
        assert [token for _, group in found for token in group] == ids


def test_pieces_keep_spaces_that_hang_on_the_token_before() -> None:
    """Oracle: SentencePiece's decoder, which drops the first token's space."""
    words = ["▁the", "▁cat", "▁sat", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: n for n, word in enumerate(words)}, []))
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    backend.decoder = tokenizers.decoders.Sequence([steps[1], steps[0], tokenizers.decoders.Fuse()])
    found = preview.pieces([0, 1, 2], backend.decode)
    assert [text for text, _ in found] == ["the", " cat", " sat"]
    assert "".join(text for text, _ in preview.pieces([0, 3, 4, 5, 6, 1], backend.decode)) == "the😀 cat"


def test_every_token_but_the_first_under_all(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the rows' loss weights: nothing predicts a conversation's first token."""
    write_sft(folder, small_talk(), "everything")
    flags = ["--base", base, "--preview", "2", "--set", "sft.mask=all", "--ids"]
    assert ds_slm("sft", "everything.toml", *flags, monkeypatch=monkeypatch) == 0
    page = Page((folder / "preview-everything.html").read_text())
    assert [is_on for is_on, _ in page.tokens[0]] == [False] + [True] * (len(page.tokens[0]) - 1)
    assert page.counts[0] == f"{len(page.tokens[0])} tokens, {len(page.tokens[0]) - 1} trained"


WRONG = {
    "all zero": (lambda flagged: flagged & ~shards.TRAINED, "nothing is trained"),
    "all one": (lambda flagged: flagged | shards.TRAINED, "everything is trained"),
    "no end": (lambda f: np.where((f & IDS) == IM_END, f & ~shards.TRAINED, f), "ends without <|im_end|>"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_masks_that_cannot_be_meant_are_refused(
    wrong: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and the sentence that training says, for flags spoilt where they are made; no page."""
    spoil, sentence = WRONG[wrong]
    right = shards.flagged

    def spoilt(conversation: Encoded, limit: int) -> np.ndarray | str:
        found = right(conversation, limit)
        return found if isinstance(found, str) else spoil(found)

    monkeypatch.setattr(encode, "flagged", spoilt)
    monkeypatch.chdir(tmp_path)
    recipe = write_sft(tmp_path, small_talk())
    assert ds_slm("sft", recipe, "--base", base, "--preview", "3", monkeypatch=monkeypatch) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "preview-chatty.html").exists()


def test_only_questions_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and how many conversations were left out for what reason."""
    recipe = write_sft(tmp_path, [chat(f"question {number}") for number in range(30)])
    monkeypatch.chdir(tmp_path)
    assert ds_slm("sft", recipe, "--base", base, "--preview", "3", monkeypatch=monkeypatch) == 2
    assert "30 without a target" in capsys.readouterr().err


MISTAKES = {
    "no base": (["--base", "absent", "--preview", "1"], "absent does not exist"),
    "no folder": (["--base", "base", "--preview", "1", "--out", "absent/x.html"], "absent/x.html"),
    "unknown flag": (["--base", "base", "--preview", "1", "--data-rot", "x"], "--data-rot"),
    "unknown key": (["--base", "base", "--preview", "1", "--set", "sft.maks=last"], "sft.mask"),
    "other shape": (["--base", "base", "--preview", "1", "--set", "model.num_hidden_layers=1"], "num_hidden_layers"),
    "two recipes": (["--base", "base", "--preview", "1", "--recipe", "demo-instruct"], "demo-instruct"),
    "devices": (["--base", "base", "--preview", "1", "--devices", "2"], "leave out --hostfile and --devices"),
    "hostfile": (["--base", "base", "--preview", "1", "--hostfile", "absent"], "leave out --hostfile and --devices"),
    "ids alone": (["--base", "base", "--ids"], "--preview"),
    "base forgotten": (["--set", "train.seed=1"], "--base MODEL: name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: exit code 2, and the part at fault named on stderr."""
    arguments, part = MISTAKES[mistake]
    assert ds_slm("sft", "chatty.toml", *arguments, monkeypatch=monkeypatch) == 2
    assert part in capsys.readouterr().err


def test_without_a_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what is shown with the base: data that are there bring their tokenizer; else a trained one is missing."""
    write_sft(tmp_path, small_talk())
    monkeypatch.chdir(tmp_path)
    assert ds_slm("sft", "chatty.toml", "--preview", "2", monkeypatch=monkeypatch) == 2
    assert "name that one, --base MODEL" in capsys.readouterr().err
    shown = []
    for words in (["--base", base], []):
        assert ds_slm("sft", "chatty.toml", *words, "--preview", "2", monkeypatch=monkeypatch) == 0
        output = capsys.readouterr().out
        shown.append(output[output.index("conversation 0") :])
    assert shown[0] == shown[1]


def test_a_pretraining_recipe_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and the missing section."""
    assert ds_slm("sft", "demo", "--base", base, "--preview", "1", monkeypatch=monkeypatch) == 2
    assert "[sft]" in capsys.readouterr().err


def test_the_real_command_needs_no_deepspeed(base: Path, tmp_path: Path) -> None:
    """Oracle: a process in which deepspeed cannot be imported, prints UTF-8 and ends with 0."""
    write_sft(tmp_path, small_talk())
    script = "import sys; sys.modules['deepspeed'] = None; from ds_slm.cli.main import run; run()"
    command = [sys.executable, "-c", script, "sft", "chatty.toml", "--base", str(base), "--preview", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "conversation 0: " in done.stdout
    assert (tmp_path / "preview-chatty.html").is_file()
