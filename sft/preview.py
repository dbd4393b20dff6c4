"""The masks, shown before training: conversations of the training split, from the prepared shards.

    shards --read_shown--> runs of tokens that share a colour --> as_text: the terminal
                                                              --> as_html: one file, no script

Masks are not computed again: a token is shown as trained if it carries the shard's flag and follows another token, from
which it is predicted. Control tokens stand out, so that a literal `<|im_end|>` in a message looks different. Line ends
are drawn as ⏎, because each is a target or not, like any token. Other control characters are drawn as Unicode's
pictures of them, so that no text of a data set can control a terminal.

A character of several tokens is shown once, with all their ids. Bytes that are not a character, for example after a
cut, are shown as U+FFFD.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.recipe.schema import Recipe
from sft.chatml import ChatML
from sft.rows import ConversationRows, summary_line
from sft.shards import CUT, IDS, TRAINED

Piece = tuple[str, list[int]]
"""A piece of text and its tokens."""

TRAINED_STYLE, MASKED_STYLE, ID_STYLE = "bold green", "cyan", "dim"
TRAINED_MARKS = "⟦", "⟧"
"""The brackets around trained text on a terminal without colours."""
TOKENS_PER_CHARACTER = 4
"""The longest character in UTF-8 has 4 bytes."""

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one colour."""

    trained: bool
    control: bool
    """Whether it is a control token, which no text gives."""
    pieces: list[Piece]

    @property
    def text(self) -> str:
        """The text of all pieces."""
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Shown:
    """A conversation as it will be trained."""

    number: int
    """Its place in the training split."""
    tokens: int
    trained: int
    truncated: bool
    runs: list[Run]

    @property
    def counts(self) -> str:
        """One line for people."""
        return f"{self.tokens:,} tokens, {self.trained:,} trained{', truncated' if self.truncated else ''}"


def read_shown(recipe: Recipe, prepared: Prepared, count: int) -> tuple[list[Shown], dict[str, Any]]:
    """The first conversations of the training split, and the summary of all.

    Raises:
        DataError: training would refuse the data.
    """
    rows = ConversationRows(recipe, prepared)
    chatml = ChatML(load_tokenizer(prepared.tokenizer_folder))
    control_ids = {chatml.start_id, chatml.end_id}
    shown = [
        show(number, rows.training[number], chatml.tokenizer.decode, control_ids)
        for number in range(min(count, len(rows.training)))
    ]
    return shown, rows.summary()


def show(number: int, flagged: np.ndarray, decode: Callable[[list[int]], str], control_ids: set[int]) -> Shown:
    """A conversation's flagged ids, as its text in runs."""
    ids: list[int] = (flagged & IDS).tolist()
    trained = [False, *((flagged[1:] & TRAINED) != 0).tolist()]  # nothing predicts the first token
    runs = []
    kinds = [(is_target, token in control_ids) for token, is_target in zip(ids, trained, strict=True)]
    begin = 0
    for (is_target, control), group in groupby(kinds):
        end = begin + len(list(group))
        runs.append(Run(is_target, control, pieces(ids[begin:end], decode)))
        begin = end
    return Shown(number, len(ids), sum(trained), bool(flagged[0] & CUT), runs)


def pieces(ids: list[int], decode: Callable[[list[int]], str]) -> list[Piece]:
    """Tokens and their texts, which together are the whole text; tokens that share a character stay together."""
    found: list[Piece] = []
    context = begin = 0  # one piece more is decoded: some tokenizers give a leading space only after another token
    for end in range(1, len(ids) + 1):
        text = decode(ids[context:end])[len(decode(ids[context:begin])) :]
        if text.endswith("\ufffd") and end < len(ids) and end - begin < TOKENS_PER_CHARACTER:
            continue
        found.append((text, ids[begin:end]))
        context, begin = begin, end
    whole = decode(ids)
    return found if "".join(text for text, _ in found) == whole else [(whole, ids)]


def visible(text: str) -> str:
    """Control characters as pictures, except line ends and tabs."""
    return text.translate(_PICTURES)


def as_text(shown: Shown, with_ids: bool = False, with_marks: bool = False) -> Text:
    """The text for a terminal. `with_marks` puts trained text into brackets, for terminals without colours."""
    line = Text()
    marked = False
    for run in [*shown.runs, Run(False, False, [])]:
        style = (TRAINED_STYLE if run.trained else MASKED_STYLE) + (" reverse" if run.control else "")
        if with_marks and run.trained != marked:
            line.append(TRAINED_MARKS[marked])
            marked = run.trained
        for text, ids in run.pieces if with_ids else [(run.text, [])]:
            body, end = _body_and_line_end(text.replace("\n", "⏎\n"), with_ids)
            line.append(visible(body), style)
            if with_ids:
                line.append(f"⟨{' '.join(map(str, ids))}⟩", ID_STYLE)
            line.append(end)
    return line if line.plain.endswith("\n") else line.append("\n")


def as_html(recipe_name: str, shown: Sequence[Shown], summary: Mapping[str, Any], with_ids: bool = False) -> str:
    """A whole page for a browser, which loads no files and runs no script."""
    title = html.escape(f"{recipe_name}: the first {len(shown):,} conversations as they will be trained")
    conversations = "\n".join(
        f'<section><h2>conversation {one.number:,}</h2><p class="counts">{one.counts}</p>\n'
        f'<div class="text">{"".join(_run_html(run, with_ids) for run in one.runs)}</div></section>'
        for one in shown
    )
    return _PAGE.format(
        title=title, style=_STYLE, summary=html.escape(summary_line(summary)), conversations=conversations
    )


def _run_html(run: Run, with_ids: bool) -> str:
    tag, kind = "mark" if run.trained else "span", ' class="control"' if run.control else ""
    if not with_ids:
        return f"<{tag}{kind}>{_escaped(run.text)}</{tag}>"
    body = ""
    for text, ids in run.pieces:
        inside, end = _body_and_line_end(_escaped(text), with_ids)
        body += f'<i data-ids="{" ".join(map(str, ids))}">{inside}</i>{end}'
    return f"<{tag}{kind}>{body}</{tag}>"


def _escaped(text: str) -> str:
    return html.escape(visible(text)).replace("\n", "<b></b>\n")  # the style sheet draws ⏎, so the text stays as it is


def _body_and_line_end(text: str, with_ids: bool) -> tuple[str, str]:
    """The text without its line end, and the line end, because ids are printed before the line ends."""
    body = text.removesuffix("\n") if with_ids else text
    return body, text[len(body) :]


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --masked: #57606a; --trained: #0b4f26;
  --ground: #d3f4de; --line: #d0d7de }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e3e8ee; --masked: #a3adb8; --trained: #b9f5cb;
  --ground: #15472a; --line: #3a424c } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 2rem 0 0 } p { margin: .3rem 0 }
.text { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: 6px }
mark { color: var(--trained); background: var(--ground) } span { color: var(--masked) }
.control { font-weight: bold; outline: 1px dotted; outline-offset: -1px }
b::before { content: "⏎"; font-weight: normal; opacity: .6 }
i { font-style: normal }
i::after { content: attr(data-ids); font-size: 9px; vertical-align: sub; opacity: .75; margin-right: 3px }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend"><mark>trained: these tokens are targets</mark> <span>masked: read, but not trained</span>
<span class="control">control token</span></p>
{conversations}
</body>
</html>
"""
