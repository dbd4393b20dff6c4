"""The house rules that a machine can check: one-way imports, short files, declared dependencies, no private paths."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.shape import ROOT, code_lines, functions, imports, layer_of, python_files

BELOW_TRAIN = {"recipe", "data", "model", "distributed", "run", "engine", "checkpoint"}

ALLOWED = {
    "errors": set(),
    "files": set(),
    "pulse": set(),
    "recipe": set(),
    "data": {"recipe"},
    "model": {"recipe"},
    "distributed": set(),
    "run": {"recipe", "data", "model", "distributed"},
    "engine": {"recipe", "data", "model", "distributed", "run"},
    "checkpoint": {"recipe", "data", "model", "distributed", "run", "engine"},
    "train": BELOW_TRAIN,
    "publish": {"recipe", "data", "model", "checkpoint.files", "checkpoint.tensor_file", "run"},
    "evaluate": {"recipe", "data", "model", "distributed", "checkpoint.files", "run", "publish.models"},
    "cluster": {"recipe", "data", "checkpoint.files", "run"},
    "pretrain": {*BELOW_TRAIN, "train", "publish", "evaluate", "cluster.hostfile", "cli.flags"},
    "sft": {*BELOW_TRAIN, "train", "pretrain", "sft"},
    "sft.train": {*BELOW_TRAIN, "train", "pretrain", "sft", "publish", "evaluate", "cluster.hostfile", "cli.flags"},
    "cli": {*BELOW_TRAIN, "train", "publish", "evaluate", "cluster", "pretrain", "sft", "cli"},
}
"""What each layer may import besides itself, errors, files and pulse, as docs/architecture.md draws it."""

HEAVY = {"torch", "deepspeed", "transformers", "numpy", "datasets", "bitsandbytes"}
HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/")


def breaches(layer: str, imported: str) -> str | None:
    """Why a layer may not import a name, or None."""
    package, *parts = imported.split(".")
    if package == "deepspeed" and layer != "engine":
        return "only engine may import deepspeed"
    if package in HEAVY and layer in ("recipe", "errors", "files", "pulse"):
        return "pure data imports nothing heavy"
    if package == "sft":
        return None if "sft" in ALLOWED[layer] else "ds_slm never imports sft"
    if package != "ds_slm" or not parts or parts[0].startswith("_"):
        return None
    target, child = parts[0], ".".join(parts[:2])
    if target in (layer, "errors", "files", "pulse") or target in ALLOWED[layer] or child in ALLOWED[layer]:
        return None
    return f"{layer} may not import {target}"


@pytest.mark.parametrize("path", python_files(ROOT, "ds_slm", "sft"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    """Oracle: the design's list of who may import whom."""
    layer = layer_of(path)
    if layer == "__init__":
        layer = "errors"
    assert layer in ALLOWED, f"{layer} is a new layer: say in the design what it may import"
    found = {imported: problem for imported in imports(path) if (problem := breaches(layer, imported))}
    assert not found


@pytest.mark.parametrize(
    ("layer", "imported"),
    [
        ("recipe", "torch.nn"),
        ("recipe", "ds_slm.data.rows"),
        ("model", "ds_slm.data.rows"),
        ("data", "ds_slm.model.decoder"),
        ("checkpoint", "deepspeed"),
        ("engine", "ds_slm.checkpoint.manager"),
        ("train", "ds_slm.publish.score"),
        ("train", "ds_slm.cli.main"),
        ("publish", "ds_slm.engine.engine"),
        ("cluster", "ds_slm.model.decoder"),
        ("pretrain", "ds_slm.cluster.doctor"),
        ("sft", "ds_slm.publish.generate"),
        ("model", "sft.chatml"),
    ],
)
def test_breaches_are_found(layer: str, imported: str) -> None:
    """Oracle: forbidden imports, made up."""
    assert breaches(layer, imported)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Oracle: Python's own sorter of dependencies, which refuses a circle; imports for types alone count, too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in python_files(ROOT, "ds_slm", "sft")
    }
    needs = {
        module: {name if name in files else name.rpartition(".")[0] for name in imports(path)} & files.keys()
        for module, path in files.items()
    }
    assert set(TopologicalSorter(needs).static_order()) == files.keys()


def test_nothing_that_ships_imports_the_tests() -> None:
    """Oracle: tests may import the benchmarks' helper, never the reverse."""
    files = python_files(ROOT, "ds_slm", "sft", "benchmarks")
    assert not {str(path.relative_to(ROOT)) for path in files for name in imports(path) if name.startswith("tests.")}


@pytest.mark.parametrize("path", python_files(ROOT, "ds_slm", "sft"), ids=lambda path: str(path.relative_to(ROOT)))
def test_long_functions_have_paragraphs(path: Path) -> None:
    """Oracle: a body of 15 lines of code or more without a blank line is a wall."""
    assert not [function.name for function in functions(path) if function.is_wall]


TOO_MANY = {
    "plan_recipe": 10, "verify_run": 7, "evaluate": 8,  # verbs of the command line: a parameter for each flag
    "prepare": 7, "chat": 11, "export": 10,
}  # fmt: skip
"""Functions that take more: none may join them."""


def test_functions_take_few_parameters() -> None:
    """Oracle: more than six parameters are an object that is missing."""
    found: dict[str, int] = {}
    for path in python_files(ROOT, "ds_slm", "sft"):
        for function in functions(path):
            if function.is_wide:
                found[function.name] = max(found.get(function.name, 0), function.parameters)
    assert found == TOO_MANY


def test_files_are_short() -> None:
    """Oracle: a file of more than 300 lines of code is two files."""
    files = [*python_files(ROOT, "ds_slm", "sft", "tests", "benchmarks"), ROOT / "setup.py"]
    lines = {str(path.relative_to(ROOT)): code_lines(path) for path in files}
    assert not {name: count for name, count in lines.items() if count > 300}


def test_documents_fit_the_screen() -> None:
    """Oracle: 120 characters a line, tables aside; the README is a door, of 120 lines of 100 characters."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) <= 120
    assert not [line for line in readme if len(line) > 100]
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        lines = document.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if len(line) > 120 and not line.startswith("|")], document.name


def test_documents_link_to_what_is_there() -> None:
    """Oracle: every relative link of a document names a file of the project."""
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_modules_say_what_they_do() -> None:
    """Oracle: every module begins with a docstring."""
    files = python_files(ROOT, "ds_slm", "sft", "tests", "benchmarks")
    undocumented = [path for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not undocumented


def test_tests_name_their_oracle() -> None:
    """Oracle: CONTRIBUTING.md: a test's docstring says what makes its expected value right."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in python_files(ROOT, "tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


def test_dependencies_are_declared_and_pinned() -> None:
    """Oracle: setup.py names what the package imports, and constraints.txt pins what setup.py names."""
    strings = {
        node.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    declared = {match[1].lower() for text in strings if (match := re.match(r"([\w-]+)(?:\[\w+\])?>=", text))}
    imported = {name.partition(".")[0] for path in python_files(ROOT, "ds_slm", "sft") for name in imports(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"ds_slm", "sft"}
    assert {name.replace("_", "-").lower() for name in third_party} <= declared
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in constraints if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.partition("==")[0].replace("_", "-").lower() for pin in pins}
    assert declared - {"python", "setuptools"} <= pinned


def test_no_private_paths() -> None:
    """Oracle: no file that ships names a folder of somebody's home."""
    folders = ("ds_slm", "sft", "tests", "benchmarks", "ds_configs", "hostfiles", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    texts = {
        path: path.read_text(encoding="utf-8", errors="ignore") for path in files if "__pycache__" not in path.parts
    }
    assert not [str(path.relative_to(ROOT)) for path, text in texts.items() if HOME.search(text)]
