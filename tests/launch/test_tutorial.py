"""The tutorial, typed as it stands: every command of docs/tutorial.md, on text that every installation has."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from ds_slm.data.sources.builtin import builtin_documents
from tests.support import runs

TEXT_BYTES = 300_000


def commands() -> list[str]:
    """The lines of the page's shell blocks."""
    page = (runs.ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_works(tmp_path: Path) -> None:
    """Each ends with exit code 0, in the order of the page; what they promise lies there."""
    folder, size_bytes = tmp_path / "my" / "texts", 0
    folder.mkdir(parents=True)
    for number, text in enumerate(builtin_documents()):
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
        if (size_bytes := size_bytes + len(text.encode())) > TEXT_BYTES:
            break

    assert len(commands()) > 10
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=runs.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    assert (tmp_path / "runs" / "mine" / "done.json").is_file()
    assert (tmp_path / "mine.html").is_file()
    for name in ("mine", "mine-instruct"):
        card = (tmp_path / "exports" / name / "README.md").read_text(encoding="utf-8")
        assert json.loads((tmp_path / "runs" / name / "done.json").read_text())["step"] > 0
        assert "model-index" in card or name == "mine-instruct"
    assert (tmp_path / "exports" / "mine-instruct" / "mine-instruct-q8_0.gguf").is_file()


def test_the_page_names_real_verbs() -> None:
    """Oracle: the verbs with examples. A cheap guard of a slow test."""
    from ds_slm.cli.examples import EXAMPLES

    for command in commands():
        program, verb, *_ = command.split()
        assert (program, verb in EXAMPLES) == ("ds-slm", True), command
