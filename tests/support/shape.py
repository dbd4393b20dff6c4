"""The code's shape: how long files and functions are, and which package imports which.

    FOLDER/{ds_slm,sft,benchmarks,tests}/**/*.py --> a table of packages, their long functions, who imports whom

python -m tests.support.shape [FOLDER]

`tests/unit/test_house.py` holds the code to limits, counted as here.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
MOST_PARAMETERS = 6
WALL_LINES = 15
"""Code lines of a body that should have a blank line somewhere."""


@dataclass(frozen=True)
class Function:
    """A function of a file."""

    name: str
    parameters: int
    """Without self and cls."""
    lines: list[str]
    """Of the body, without the docstring."""
    code_lines: int
    """Of the body."""

    @property
    def is_wide(self) -> bool:
        """Whether it takes so many parameters that an object is missing."""
        return self.parameters > MOST_PARAMETERS

    @property
    def is_wall(self) -> bool:
        """Whether a long body has no blank line."""
        return self.code_lines >= WALL_LINES and all(map(str.strip, self.lines))


def python_files(folder: Path, *names: str) -> list[Path]:
    """The Python files below some folders of a folder."""
    return sorted(path for name in names for path in (folder / name).rglob("*.py"))


def code_lines(path: Path) -> int:
    """Lines of a file that hold code: blank lines, comments and docstrings are free."""
    return len(_code_line_numbers(path.read_text(encoding="utf-8")))


def comment_lines(path: Path) -> int:
    """Lines of a file that hold a comment and nothing else."""
    readline = io.StringIO(path.read_text(encoding="utf-8")).readline
    comments = [token for token in tokenize.generate_tokens(readline) if token.type == tokenize.COMMENT]
    return sum(not token.line[: token.start[1]].strip() for token in comments)


def functions(path: Path) -> Iterator[Function]:
    """The functions of a file, methods and inner ones among them."""
    text = path.read_text(encoding="utf-8")
    numbers = _code_line_numbers(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        begin, end = (body[0].lineno, body[-1].end_lineno or 0) if body else (1, 0)
        yield Function(
            node.name, len([name for name in names if name not in ("self", "cls")]),
            text.splitlines()[begin - 1 : end], len(numbers & set(range(begin, end + 1))),
        )  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at its top or inside a function: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path, folder: Path = ROOT) -> str:
    """The layer a file of ds_slm or sft belongs to: a folder of ds_slm, or a module beside them."""
    parts = path.relative_to(folder).with_suffix("").parts
    if parts[0] == "sft":
        return "sft.train" if parts[1:] == ("train",) else "sft"
    return parts[1]


def table(folder: Path) -> Table:
    """One line a package: its files, their lines, and what is long or wide in it."""
    made = Table()
    made.add_column("package")
    for title in ("files", "code lines", "comments", "longest file", "wide", "walls"):
        made.add_column(title, justify="right")

    packages: dict[str, list[Path]] = defaultdict(list)
    for path in python_files(folder, "ds_slm", "sft"):
        packages[layer_of(path, folder)].append(path)
    for path in python_files(folder, "benchmarks", "tests"):
        packages["/".join(path.parent.relative_to(folder).parts[:2])].append(path)
    for name, paths in packages.items():
        made.add_row(name, *_row(paths))
    everything = [path for paths in packages.values() for path in paths]
    if everything:
        made.add_section()
        made.add_row("all", *_row(everything))
    return made


def notable(folder: Path) -> Iterator[str]:
    """Each wide function and each wall, outside the tests."""
    for path in python_files(folder, "ds_slm", "sft", "benchmarks"):
        for function in functions(path):
            place = f"{path.relative_to(folder)}: {function.name}"
            if function.is_wide:
                yield f"wide: {place} takes {function.parameters} parameters"
            if function.is_wall:
                yield f"wall: {place} has {function.code_lines} code lines"


def importers(folder: Path) -> dict[str, set[str]]:
    """Of each layer of ds_slm and sft, the other layers that it imports."""
    layers = {path: layer_of(path, folder) for path in python_files(folder, "ds_slm", "sft")}
    found: dict[str, set[str]] = {layer: set() for layer in layers.values()}
    for path, layer in layers.items():
        for imported in imports(path):
            package, *parts = imported.split(".")
            target = "sft" if package == "sft" else parts[0] if package == "ds_slm" and parts else layer
            if target in found:
                found[layer] |= {target} - {layer}
    return found


@cache
def _code_line_numbers(text: str) -> set[int]:
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    numbers = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            numbers -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def _row(paths: list[Path]) -> list[str]:
    """The cells behind a package's name."""
    lines = {path: code_lines(path) for path in paths}
    comments = sum(map(comment_lines, paths))
    longest = max(paths, key=lambda path: lines[path])
    found = [function for path in paths for function in functions(path)]
    return [
        str(len(paths)), f"{sum(lines.values()):,}",
        f"{comments / max(comments + sum(lines.values()), 1):.1%}",
        f"{longest.name} {lines[longest]}",
        str(sum(function.is_wide for function in found)), str(sum(function.is_wall for function in found)),
    ]  # fmt: skip


def main() -> None:
    """Print the table, what is long in it, and the imports."""
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT
    console = Console(width=120, highlight=False)
    console.print(table(folder))
    console.print(
        f"comments: lines of comments alone, of those and code lines; wide: functions above {MOST_PARAMETERS} "
        f"parameters; walls: bodies of {WALL_LINES} code lines or more without a blank line\n"
    )
    for line in notable(folder):
        console.print(line)
    console.print()
    for layer, targets in importers(folder).items():
        console.print(f"{layer:<12} -> {', '.join(sorted(targets)) or '-'}")


if __name__ == "__main__":
    main()
