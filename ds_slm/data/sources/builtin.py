"""The built-in corpus: real English text that every installation already has, for runs without other data.

    help topics, packages' sources --> docstrings --> paragraphs --> prose only, each once --> documents

A document is what remains of one docstring: its prose paragraphs, each on a line of its own, blank lines between them.
Nothing is imported. A pattern finds the triple-quoted strings that begin a line, skipping comments and other strings,
and `ast` evaluates them: several times faster than parsing whole modules, most of whose text is code. So a text
handed to a function like `add_docstr` is found as well, and the prose test keeps templates of code out.

A paragraph occurs once in the whole corpus, compared by its letters alone. So no paragraph is on both sides, however
documents are split afterwards.

Known gaps: the text changes with the versions of the packages (its hash is recorded, and hosts compare theirs);
paragraphs that differ only in a class name all stay.
"""

import ast
import importlib.util
import inspect
import os
import re
import string
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("numpy", "torch", "transformers", "deepspeed", "datasets", "huggingface_hub", "pydantic", "tensorboard",
            "pandas", "sympy", "networkx")  # fmt: skip
"""The requirements, direct or not, with the most documentation; one that is not installed is left out."""

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}

MIN_DOCSTRING_CHARACTERS = 40
MIN_WORDS = 6
MIN_PLAIN_WORDS = 0.65
"""Least share of words that are letters and punctuation only."""
MIN_FUNCTION_WORDS = 0.15
"""Least share of words from FUNCTION_WORDS: English has about a third, code and tables almost none."""
MAX_SYMBOLS = 0.04
"""Largest share of characters from SYMBOLS."""

_FUNCTION_WORDS = (
    "the a an of to is in and for that it be are this with as on by or if from not at can which will when use used has "
    "have its but must may you one only all then each"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
SYMBOLS = "=_{}[]<>|\\/#$%^&@~+*"
CODE_MARKS = (">>>", "---", "===", "+--", "```")

_TRIPLE_QUOTED = r'"""(?:[^"\\]++|\\.|"(?!""))*+"""|' + r"'''(?:[^'\\]++|\\.|'(?!''))*+'''"
_STRINGS = re.compile(rf"""#[^\n]*+|{_TRIPLE_QUOTED}|"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+'""", re.DOTALL)
"""Comments and strings. Each branch begins with a plain character, which makes the search fast."""
_PREFIXES = ("", "r", "R", "u", "U")
_BLANK_LINES = re.compile(r"\n\s*\n")
_BULLET = re.compile(r"\s*(?:[-*•+]|\d+[.)]|\(\w\))\s+")
PLAIN_WORD = re.compile(r"""(?<!\S)[("'`*]*[A-Za-z]+(?:['’-][A-Za-z]+)*[,.;:!?)"'`*]*(?!\S)""")
_NO_LETTERS = (string.punctuation + string.digits + string.whitespace).encode()


@cache
def builtin_documents() -> tuple[str, ...]:
    """All documents, in an order that depends on the installed packages only."""
    return tuple(read_builtin())


def read_builtin() -> Iterator[str]:
    """The same one after another, for callers that need only the first ones."""
    seen: set[bytes] = set()
    yield from (document for docstring in _docstrings() if (document := _document(docstring, seen)))


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    yield from _topics(library / "pydoc_data" / "topics.py")
    for root in [library, *filter(None, map(package_folder, PACKAGES))]:
        for path in module_files(root):
            yield from _docstrings_of(path)


def _topics(path: Path) -> Iterator[str]:
    """The texts of `help()`: one big dictionary in a module of the standard library."""
    if not path.exists():
        return
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            yield from ast.literal_eval(statement.value).values()


def package_folder(name: str) -> Path | None:
    """The folder of a package's sources, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def module_files(root: Path) -> Iterator[Path]:
    """All Python sources under a folder in a fixed order, without tests."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (
            Path(folder, file) for file in sorted(files) if file.endswith(".py") and not file.startswith("test_")
        )


def _docstrings_of(path: Path) -> list[str]:
    module = path.read_bytes().decode("utf-8", errors="ignore")
    with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
        return [_value(literal) for literal in _literals(module) if len(literal) >= MIN_DOCSTRING_CHARACTERS]


def _literals(module: str) -> Iterator[str]:
    """Triple-quoted strings that begin a line."""
    for match in _STRINGS.finditer(module):
        if match[0].startswith(('"""', "'''")):
            line_begin = module.rfind("\n", 0, match.start()) + 1
            prefix = module[line_begin : match.start()].strip()
            if prefix in _PREFIXES:
                yield prefix + match[0]


def _value(literal: str) -> str:
    try:
        return ast.literal_eval(literal)
    except (SyntaxError, ValueError):  # no string of this Python: a template, or a test of the parser
        return ""


def _document(docstring: str, seen: set[bytes]) -> str:
    kept = []
    for lines in _paragraphs(inspect.cleandoc(docstring)):
        paragraph = " ".join(" ".join(lines).split())
        if bullet := _BULLET.match(paragraph):
            paragraph = paragraph[bullet.end() :]
        if _is_prose(paragraph) and (letters := _letters(paragraph)) not in seen:
            seen.add(letters)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _letters(paragraph: str) -> bytes:
    return paragraph.lower().encode().translate(None, _NO_LETTERS)


def _paragraphs(docstring: str) -> Iterator[list[str]]:
    """Blocks between blank lines, divided where a list item begins or the indentation changes.

    So the description under an argument's name stands apart from the name and its type.
    """
    for block in _BLANK_LINES.split(docstring):
        if ">>>" in block:
            continue
        lines: list[str] = []
        expected: int | None = None
        for line in block.split("\n"):
            indentation = len(line) - len(line.lstrip())
            item = _BULLET.match(line)
            if lines and (item or expected not in (None, indentation)):
                yield lines
                lines = []
            lines.append(line)
            expected = None if item else indentation  # an item's second line hangs wherever it likes
        yield lines


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split(" ")
    return (
        len(words) >= MIN_WORDS
        and (paragraph[0].isupper() or paragraph[0] in "\"'`(")
        and paragraph[-1] in ".!?:)\"'`"
        and not any(mark in paragraph for mark in CODE_MARKS)
        and sum(map(paragraph.count, SYMBOLS)) <= MAX_SYMBOLS * len(paragraph)
        and sum(map(FUNCTION_WORDS.__contains__, words)) >= MIN_FUNCTION_WORDS * len(words)
        and len(PLAIN_WORD.findall(paragraph)) >= MIN_PLAIN_WORDS * len(words)
    )
