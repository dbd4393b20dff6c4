"""Tokenizers whose padding, truncation or dropout an older version left on, and hashed: its data and runs go on.

Oracle throughout: what that version hashed, the tokenizer.json as it was given.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.checkpoint import resume
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers import tokenizer as tokenizers
from ds_slm.errors import CheckpointError, DataError
from ds_slm.model import decoder
from ds_slm.publish.export import export_run
from ds_slm.publish.models import open_model
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support import runs
from tests.support.data_recipes import BPE, contents, prepare, recipe, source, texts, write_jsonl
from tests.unit.data.test_tokenizer import LAST_USE, byte_level_folder

SETTINGS = ["BPE dropout of 0.3", "truncation", "padding"]
ALONE: Any = SimpleNamespace(
    leads_host=True, rank=0, hosts=["here"], gather=lambda value: [value], broadcast=lambda value, source: value
)


def raw_sha256(folder: Path) -> str:
    """The hash of a tokenizer.json as it stands in a file."""
    content = json.loads((folder / "tokenizer.json").read_text())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prepare_as_before(made: Recipe, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepared, dict[str, str]]:
    """Data of a version that switches nothing off and knows of no older hashes; and what it called them."""
    with monkeypatch.context() as before:
        before.setattr(tokenizers, "_leftovers", lambda backend: [])
        before.setattr(tokenizers, "_switch_off", lambda backend: None)
        prepared = prepare(made, root)
        hashes = {"tokenizer_sha256": prepared.tokenizer_sha256, "data_sha256": prepared.sha256}
    path = prepared.tokenizer_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["older_sha256"]
    path.write_text(json.dumps(manifest))
    return prepared, hashes


def given(folder: Path, setting: str, **changes: object) -> Recipe:
    """A recipe of a tokenizer with such a setting."""
    blocks: dict[str, Any] = {block: {**values, **changes} for block, values in LAST_USE[setting].items()}  # type: ignore[dict-item]
    given = byte_level_folder(folder / "given", **blocks)
    text = write_jsonl(folder / "one.jsonl", texts(100))
    return recipe(source("first", path=text), tokenizer=BPE.replace('"bpe"', f'"hf"\npath = "{given}"'))


@pytest.mark.parametrize("setting", SETTINGS)
def test_older_data_are_read_and_their_runs_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """They are told of, no byte of them changes, and a checkpoint that names the older hashes is found."""
    made = given(tmp_path, setting)
    _, older = prepare_as_before(made, tmp_path / "data", monkeypatch)
    assert older["tokenizer_sha256"] == raw_sha256(tmp_path / "given")
    before, told = contents(tmp_path / "data"), []
    opened = prepare(made, tmp_path / "data", report=told.append)
    assert contents(tmp_path / "data") == before and opened.older_sha256s == older
    assert any("older version" in line and setting in line for line in told)

    run = tmp_path / "run"
    checkpoint_files.Writer(run, 3).commit({"step": 3, **older})
    monkeypatch.setattr(checkpoint_files, "verify", lambda checkpoint, read=True: [])
    identity = {"tokenizer_sha256": opened.tokenizer_sha256, "data_sha256": opened.sha256}
    assert older["data_sha256"] != identity["data_sha256"]
    found = resume.find(ALONE, run, identity, opened.older_sha256s)
    assert found is not None and found.content["step"] == 3
    with pytest.raises(CheckpointError, match="was trained with data_sha256"):
        resume.find(ALONE, run, {**identity, "data_sha256": "other"}, {})


def test_data_that_were_removed_and_prepared_again_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are shorter than the truncation: the new shards are the older ones, and so are both older hashes."""
    made = given(tmp_path, "truncation", max_length=100_000)
    prepared, older = prepare_as_before(made, tmp_path / "before", monkeypatch)
    again = prepare(made, tmp_path / "data")
    assert again.manifests["first"]["shards"] == prepared.manifests["first"]["shards"]
    assert again.older_sha256s == older and again.tokenizer_sha256 != older["tokenizer_sha256"]


def test_a_source_that_is_added_to_older_data_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One manifest holds the older hash and the other the present one: both are that tokenizer's; another is not."""
    made = given(tmp_path, "padding")
    prepare_as_before(made, tmp_path / "data", monkeypatch)
    text = write_jsonl(tmp_path / "two.jsonl", texts(100, seed=2))
    both = recipe(
        source("first", path=tmp_path / "one.jsonl"),
        source("second", path=text),
        tokenizer=BPE.replace('"bpe"', f'"hf"\npath = "{tmp_path / "given"}"'),
    )
    prepared = prepare(both, tmp_path / "data")
    assert len({manifest["tokenizer_sha256"] for manifest in prepared.manifests.values()}) == 2
    path = prepared.folder / "second" / "manifest.json"
    path.write_text(path.read_text().replace(prepared.tokenizer_sha256, "f00d"))
    with pytest.raises(DataError, match="was made with the tokenizer f00d"):
        prepare(both, tmp_path / "data")


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_older_run_is_exported_and_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """Its checkpoint names the raw hash: it is exported, opened as a base, and so is an export that names it."""
    data, older = prepare_as_before(given(tmp_path, setting), tmp_path / "data", monkeypatch)
    loaded = loading.load(str(runs.write_recipe(tmp_path)))
    run = tmp_path / "run"
    writer = checkpoint_files.Writer(run, 5)
    state = decoder.build(loaded.model, 0).named_parameters()
    writer.add_tensors(checkpoint_files.MODEL, {name: value.detach() for name, value in state})
    writer.commit({"step": 5, **older})
    (run / "recipe.toml").write_text(loading.to_toml(loaded))
    (run / "tokenizer").symlink_to(data.tokenizer_folder)

    assert open_model(run).tokenizer_folder == run / "tokenizer"
    assert export_run(run, tmp_path / "out")["step"] == 5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tokenizer_sha256"] == open_export(tmp_path / "out").sha256
    older_export = tmp_path / "out" / "config.json"
    (tmp_path / "out" / "tokenizer.json").write_text((run / "tokenizer" / "tokenizer.json").read_text())
    older_export.write_text(json.dumps(config | {"tokenizer_sha256": older["tokenizer_sha256"]}))
    open_model(tmp_path / "out")


def open_export(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of an export, which must open as a base."""
    open_model(folder)
    return tokenizers.load_tokenizer(folder)
