"""Conversations that every installation already has: a docstring answers what a function, class or module does.

    sources --ast--> definitions, imports --> the names that users know --> docstrings' first sentences --> answers
    answers --a hash of each name--> question, system turn, company --> conversations, in the order of another hash

Nothing is imported. An object gets the name under which users find it: `json.JSONEncoder`, not
`json.encoder.JSONEncoder`, as far as a package's `from ... import` says so. Choices depend on hashes of names, so one
changed docstring changes one conversation. Every object is in only one conversation: held-out conversations ask about
objects that were not trained.

Known gaps: objects written in C come only from `builtins`, and an object written in C and in Python has the latter's
docstring; definitions under `if` and `try` are not seen; the text changes with the versions of Python and of the
packages, like the built-in corpus.
"""

import ast
import builtins
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_slm.data.sources.builtin import PLAIN_WORD, module_files, package_folder

PACKAGES = ("numpy", "networkx")
"""Packages that are read beside the standard library: they are well documented, and every installation has them."""
_SKIPPED = (
    "antigravity conftest distutils encodings ensurepip idlelib msilib ntpath nturl2path popen_spawn_win32 this "
    "turtledemo windows_events windows_utils"
)
SKIPPED_MODULES = frozenset(_SKIPPED.split())
"""Modules that exist on one system only, are gone from later Pythons, or hold nothing that users call."""
KNOWN_AS = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "genericpath": "os.path",
    "posixpath": "os.path",
}
"""Modules that users import by another name."""

MAX_NAME_CHARACTERS = 56
MIN_ANSWER_CHARACTERS, MAX_ANSWER_CHARACTERS = 20, 220
SHORT_ANSWER_CHARACTERS = 60
"""If the first sentence is shorter than this, the second one is added."""
MAX_EQUAL_ANSWERS = 3
MIN_WORDS = 4
MIN_PLAIN_WORDS = 0.65
"""Least share of words that are letters and punctuation only."""

SYSTEM_SHARE = 1 / 6
THREE_OBJECTS, TWO_OBJECTS, WHICH_MODULE = 0.03, 0.08, 0.17
"""Conversations whose draw is below one of these numbers have that form; the others have one question."""

SYSTEM_TURNS = (
    "You answer questions about Python in a sentence or two.",
    "You explain Python in plain words.",
    "You are a helpful assistant for Python programmers.",
    "Answer briefly.",
)
QUESTIONS = {
    "function": ("What does {} do?", "Explain {}.", "What is {} for?", "Describe the function {}."),
    "method": ("What does {} do?", "Explain {}.", "What is {} for?", "Describe the method {}."),
    "property": ("What is {}?", "Explain {}.", "Describe the property {}."),
    "class": ("What is {}?", "Explain {}.", "What is {} for?", "Describe the class {}."),
    "module": ("What is the module {}?", "Explain the module {}.", "What is the module {} for?"),
}
NEXT_QUESTIONS = ("And {}?", "What about {}?")
MODULE_QUESTIONS = ("Which module is it in?", "Where is it?")

_ROLE = re.compile(r":(?:\w+:)+(?=`)")
_QUOTED = re.compile(r"(`{1,2})~?([^`<]+?)(?: <[^`]*>)?\1_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*)\1(?![\w*])")
_NO_PROSE = re.compile(r"""[^ -~]|\w_(?!\w)|[`*=<>{}\[\]|\\#$@^~]|::|: - |--|\.\.|://|\b(?:TODO|XXX|FIXME)\b""")
_NO_ANSWER = re.compile(r"(?:See|Usage|Examples?|Note|Internal|Private|Deprecated)\b")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'][.])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)\s+(?=[A-Z])")

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Entry:
    """An object that can be asked about."""

    name: str
    kind: str
    module: str
    answer: str

    @property
    def place(self) -> str:
        """The class, module or package that holds it; empty for modules like `json`."""
        return self.name.rpartition(".")[0] or ("" if self.kind == "module" else self.module)


@dataclass(frozen=True)
class _Definition:
    kind: str
    docstring: str


@dataclass
class _Module:
    docstring: str
    definitions: dict[str, _Definition] = field(default_factory=dict)
    """Definitions by name inside the module, such as `JSONEncoder.encode`."""
    imports: list[tuple[str, str, str]] = field(default_factory=list)
    """(module, name there or *, name here)."""
    listed: set[str] | None = None
    """`__all__`, if it can be read."""


def conversations() -> list[Conversation]:
    """All conversations, messages of "role" and "content", in an order that depends only on what is installed."""
    return conversations_about(entries())


def conversations_about(asked: Iterable[Entry]) -> list[Conversation]:
    """Conversations about these entries, whose order does not matter."""
    places: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(asked, key=lambda entry: _draw("company", entry.name)):
        places[entry.place].append(entry)
    made = [conversation for company in places.values() for conversation in _conversations_of(company)]
    return [conversation for _, conversation in sorted(made, key=lambda named: _draw("order", named[0]))]


def entries() -> list[Entry]:
    """All objects with an answer, each name once; at most MAX_EQUAL_ANSWERS of them have the same answer."""
    found: dict[str, Entry] = {}
    for name, kind, module, docstring in (*_builtins(), *_objects(_read_modules())):
        if len(name) <= MAX_NAME_CHARACTERS and name not in found and (answer := answer_of(docstring)):
            found[name] = Entry(name, kind, module, answer)
    uses: Counter[str] = Counter()
    kept = []
    for entry in sorted(found.values(), key=lambda entry: _draw("equal", entry.name)):
        uses[entry.answer] += 1
        if uses[entry.answer] <= MAX_EQUAL_ANSWERS:
            kept.append(entry)
    return kept


def answer_of(docstring: str) -> str:
    """The first sentence of a docstring without markup, or two short ones; empty if that is not plain English."""
    lines = inspect.cleandoc(docstring).partition("\n\n")[0]
    paragraph = _QUOTED.sub(r"\2", _ROLE.sub("", " ".join(lines.split())))
    paragraph = _EMPHASIS.sub(r"\2", paragraph)
    if paragraph and paragraph[-1].isalnum():
        paragraph += "."
    sentences = _SENTENCE_END.split(paragraph)
    answer = sentences[0]
    if len(answer) < SHORT_ANSWER_CHARACTERS and len(sentences) > 1 and _is_answer(sentences[1]):
        answer += " " + sentences[1]
    return answer if _is_answer(answer) else ""


def _is_answer(text: str) -> bool:
    words = text.split(" ")
    return (
        MIN_ANSWER_CHARACTERS <= len(text) <= MAX_ANSWER_CHARACTERS
        and len(words) >= MIN_WORDS
        and text[0].isupper()
        and text.endswith(".")
        and text.count("(") == text.count(")")
        and text.count('"') % 2 == 0
        and not _NO_PROSE.search(text)
        and not _NO_ANSWER.match(text)
        and len(PLAIN_WORD.findall(text)) >= MIN_PLAIN_WORDS * len(words)
    )


def _conversations_of(company: Sequence[Entry]) -> Iterator[tuple[str, Conversation]]:
    """Conversations about the entries of one place, each entry in one, with the name of the conversation's first."""
    place = 0
    while place < len(company):
        first = company[place]
        form = _draw("form", first.name)
        wanted = 3 if form < THREE_OBJECTS else 2 if form < TWO_OBJECTS else 1
        asked = company[place : place + wanted]
        place += len(asked)

        turns: list[tuple[str, str]] = []
        if _draw("system", first.name) < SYSTEM_SHARE:
            turns.append(("system", _choice(SYSTEM_TURNS, "system turn", first.name)))
        for entry in asked:
            templates = QUESTIONS[entry.kind] if entry is first else NEXT_QUESTIONS
            turns.append(("user", _choice(templates, "question", entry.name).format(entry.name)))
            turns.append(("assistant", entry.answer))

        if form < WHICH_MODULE and len(asked) == 1 and first.kind != "module":
            turns.append(("user", _choice(MODULE_QUESTIONS, "where", first.name)))
            turns.append(("assistant", f"It is in {first.module}."))

        yield first.name, [{"role": role, "content": content} for role, content in turns]


def _draw(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends only on the two words."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {name}".encode()).digest()[:6]) / 2**48


def _choice(options: Sequence[str], purpose: str, name: str) -> str:
    return options[int(_draw(purpose, name) * len(options))]


def _builtins() -> Iterator[tuple[str, str, str, str]]:
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or getattr(thing, "__module__", "") not in ("builtins", "io", "_io"):
            continue
        if inspect.isbuiltin(thing):
            yield name, "function", "builtins", thing.__doc__ or ""
        elif inspect.isclass(thing) and thing.__name__ == name:
            yield name, "class", "builtins", thing.__doc__ or ""
            for inner, member in sorted(vars(thing).items()):
                if not inner.startswith("_"):
                    kind = "method" if callable(member) or isinstance(member, classmethod) else "property"
                    yield f"{name}.{inner}", kind, "builtins", member.__doc__ or ""


def _objects(modules: Mapping[str, _Module]) -> Iterator[tuple[str, str, str, str]]:
    """For each object: the name that users know, its kind, the module that users know, its docstring."""
    doors = _doors(modules)
    for path, module in modules.items():
        known = KNOWN_AS.get(path, path)
        if _is_public(known) and (known == path or known not in modules):
            yield known, "module", known, module.docstring
        for inner, definition in module.definitions.items():
            outermost, dot, rest = inner.partition(".")
            if door := doors.get(f"{path}.{outermost}"):
                yield door + dot + rest, definition.kind, door.rpartition(".")[0], definition.docstring


def _doors(modules: Mapping[str, _Module]) -> dict[str, str]:
    """For each function and class outside of classes, by the place of its definition, its shortest name for users.

    It has a name where it is defined, and one in every enclosing package that exports it, unless a part is private.
    """
    doors: dict[str, str] = {}
    exports: dict[str, dict[str, str]] = {}
    for path in modules:
        known = KNOWN_AS.get(path, path)
        if not _is_public(known):
            continue
        for name, origin in _exports(path, modules, exports).items():
            door = f"{known}.{name}"
            if origin.startswith(path + ".") and (origin not in doors or _length(door) < _length(doors[origin])):
                doors[origin] = door
    return doors


def _length(name: str) -> tuple[int, int, str]:
    return name.count("."), len(name), name


def _exports(path: str, modules: Mapping[str, _Module], found: dict[str, dict[str, str]]) -> dict[str, str]:
    """The public functions and classes that a module has, by name: where each is defined."""
    if path in found:  # or is being found: modules that import each other
        return found[path]
    names = found[path] = {}
    names |= {name: f"{path}.{name}" for name in modules[path].definitions if "." not in name}
    for source, name, name_here in modules[path].imports:
        if source not in modules:
            continue
        theirs = _exports(source, modules, found)
        if name == "*":
            listed = modules[source].listed
            names |= {each: origin for each, origin in theirs.items() if listed is None or each in listed}
        elif name in theirs and not name_here.startswith("_"):
            names[name_here] = theirs[name]
    return names


def _is_public(path: str) -> bool:
    return not any(part.startswith("_") for part in path.split("."))


def _roots() -> list[tuple[Path, Path]]:
    """Folders to read, and the folder below which their modules' names begin."""
    library = Path(sysconfig.get_path("stdlib"))
    return [(library, library), *((folder, folder.parent) for folder in map(package_folder, PACKAGES) if folder)]


def _read_modules() -> dict[str, _Module]:
    """All modules by dotted name."""
    modules = {}
    for root, above in _roots():
        for file in module_files(root):
            parts = file.relative_to(above).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            parts = parts[:-1] if is_package else parts
            if not all(map(str.isidentifier, parts)) or SKIPPED_MODULES & {*parts} or parts[-1] == "__main__":
                continue
            path = ".".join(parts)
            if (module := _read_module(path, is_package, file)) is not None:
                modules[path] = module
    return modules


def _read_module(path: str, is_package: bool, file: Path) -> _Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # no module of this Python
        return None

    module = _Module(ast.get_docstring(tree, clean=False) or "")
    for statement in tree.body:
        match statement:
            case ast.ImportFrom():
                source = _source(statement, path, is_package)
                module.imports += [(source, alias.name, alias.asname or alias.name) for alias in statement.names]
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List() | ast.Tuple() as names):
                module.listed = {name.value for name in names.elts if isinstance(name, ast.Constant)}  # type: ignore

    module.definitions.update(_definitions(tree.body, ""))
    return module


def _source(statement: ast.ImportFrom, path: str, is_package: bool) -> str:
    """The module from which names are imported; each dot except the first goes up one package."""
    if not statement.level:
        return statement.module or ""
    up = statement.level - is_package
    package = path.split(".")[:-up] if up else path.split(".")
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, _Definition]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(map(ast.unparse, statement.decorator_list))
            if statement.name.startswith("_") or decorators.endswith((".setter", ".deleter")):
                continue
            name = prefix + statement.name
            kind = "class" if isinstance(statement, ast.ClassDef) else "method" if prefix else "function"
            if "property" in decorators:
                kind = "property"
            yield name, _Definition(kind, ast.get_docstring(statement, clean=False) or "")
            if isinstance(statement, ast.ClassDef):
                yield from _definitions(statement.body, name + ".")
