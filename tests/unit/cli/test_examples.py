"""The examples that end each verb's --help."""

import shlex

import pytest
import typer.main
from typer.testing import CliRunner

from ds_slm.cli import flags, launching, main, preview
from ds_slm.cluster import limits, runner_flags
from ds_slm.recipe import loading

VERBS = list(typer.main.get_group(main.app).commands)
PROGRAMS = {
    "train": lambda words: launching.read(flags.of_pretraining("ds-slm train"), words),
    "sft": lambda words: launching.read(flags.of_fine_tuning("ds-slm sft"), words, preview.add_flags),
}
"""The verbs whose flags are a training program's."""


def recipe_of(verb: str, words: list[str]) -> str | None:
    """Parses what stands behind a verb, without doing it; returns the name of its recipe."""
    if verb in PROGRAMS:
        return PROGRAMS[verb](words).recipe
    context = typer.main.get_group(main.app).commands[verb].make_context(verb, words)
    assert not context.args
    return context.params["name"] if verb in ("plan", "prepare") else None


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_two_examples_that_parse(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the verb's own parser takes what its help shows, and the recipes it names are in the library."""
    monkeypatch.delenv("RANK", raising=False)
    printed = CliRunner().invoke(main.app, [verb, "--help"]).stdout
    _, found, examples = printed.partition("Examples:\n")
    lines = examples.strip().splitlines()
    assert found and len(lines) == 2

    for line in lines:
        command, named, *words = shlex.split(line)
        assert (command, named) == ("ds-slm", verb)
        recipe = recipe_of(verb, words)
        assert recipe is None or loading.load(recipe)


@pytest.mark.parametrize("example", ["slm-10m --no-such-flag", ""])
@pytest.mark.parametrize("verb", ["plan", "sft"])
def test_a_wrong_example_would_be_found(verb: str, example: str) -> None:
    """A mutation: a flag that does not exist, and a recipe that is missing."""
    with pytest.raises(Exception, match=r"no-such-flag|required: RECIPE|(?i:missing)"):
        recipe_of(verb, example.split())


def test_no_description_is_cut_or_missing_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the lists of verbs and of flags as a terminal of 80 columns shows them; an ellipsis ends a cut one."""
    monkeypatch.setenv("COLUMNS", "80")
    listed = CliRunner().invoke(main.app, ["--help"], terminal_width=80).output
    verbs = listed.partition("Commands:")[2].splitlines()
    assert len(verbs) >= len(VERBS) and [line for line in verbs if line.endswith("...")] == []

    for parser in (flags.of_pretraining(), flags.of_fine_tuning()):
        runner_flags.add_runner_flags(parser)
        limits.add_flags(parser)
        assert [action.option_strings for action in parser._actions if not action.help] == []
    for verb, command in typer.main.get_group(main.app).commands.items():
        assert [(verb, one.name) for one in command.params if not getattr(one, "help", None)] == []
