"""MODEL on a command line: run folders, checkpoints and Hugging Face folders, and everything that is none of them."""

import json
from pathlib import Path

import pytest
import torch

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.tokenizers.tokenizer import build_tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError
from ds_slm.model import decoder
from ds_slm.publish.export import export, export_run
from ds_slm.publish.models import needed_base, open_base, open_model, refuse_other_base
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support import runs
from tests.support.data_recipes import BPE, prepare, recipe, source, texts, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, list[dict[str, torch.Tensor]]]:
    """A run of two checkpoints, the first one the best; the recipe and the weights."""
    folder = tmp_path_factory.mktemp("models")
    loaded = loading.load(str(runs.write_recipe(folder)))
    text = write_jsonl(folder / "text.jsonl", texts(200))
    data = prepare(recipe(source("a", path=text), tokenizer=BPE), folder / "data")
    run = folder / "run"
    states = [dict(decoder.build(loaded.model, seed).named_parameters()) for seed in (0, 1)]
    for step, state in zip((5, 9), states, strict=True):
        writer = checkpoint_files.Writer(run, step)
        writer.add_tensors(checkpoint_files.MODEL, {name: value.detach() for name, value in state.items()})
        checkpoint = writer.commit({"step": step})
        if step == 5:
            checkpoint_files.mark_best(checkpoint)
    (run / "recipe.toml").write_text(loading.to_toml(loaded))
    (run / "tokenizer").symlink_to(data.tokenizer_folder)
    return run, loaded, [{name: value.detach() for name, value in state.items()} for state in states]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_places_in_a_run(made: tuple) -> None:
    """Oracle: the weights that were saved: newest, best, of a step."""
    run, _, states = made
    for path, state in (("", states[1]), ("checkpoints/best", states[0]), ("checkpoints/step-00000005", states[0])):
        found = open_model(run / path)
        assert same(found.read(), state)
        assert found.tokenizer_folder == run / "tokenizer"
    assert open_model(run).sha256 != open_model(run / "checkpoints" / "best").sha256


def files_needed(path: Path, loaded: Recipe) -> tuple[Path, tuple[str, ...] | None, bool]:
    found = needed_base(path, lambda: open_base(path, loaded))
    return found.path, found.files, found.is_absent


@pytest.mark.parametrize("place", ["", "checkpoints/best"])
def test_what_another_host_needs_of_a_run(made: tuple, tmp_path: Path, place: str) -> None:
    """Oracle: with these files alone another folder opens as the same model; the sign of a whole one comes last."""
    run, loaded, _ = made
    root, files, is_absent = files_needed(run / place, loaded)
    assert root == run and files is not None and files[-1].endswith("manifest.json") and not is_absent
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert open_model(tmp_path / place).sha256 == open_model(run / place).sha256


def test_what_another_host_needs_of_a_hugging_face_folder(made: tuple, tmp_path: Path) -> None:
    """Oracle: its own files but pickles, under a folder named checkpoints and beside any manifest.json, too."""
    run, loaded, states = made
    folder = tmp_path / "checkpoints" / "smol"
    export(states[0], loaded.model, run / "tokenizer", folder)
    (folder / "manifest.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    root, files, is_absent = files_needed(folder, loaded)
    assert root == folder and not is_absent and files is not None and files[-1] == "config.json"
    assert sorted(files) == sorted({path.name for path in folder.iterdir()} - {"pytorch_model.bin"})


def test_a_model_that_does_not_fit_is_not_replaced(made: tuple, tmp_path: Path) -> None:
    """Oracle: a run of another shape is neither sent nor taken for a gap; what is not there is one."""
    run, loaded, _ = made
    other = loaded.model_copy(update={"model": loaded.model.model_copy(update={"num_hidden_layers": 9})})
    assert files_needed(run, other) == (run, None, False)
    assert files_needed(tmp_path / "nothing", loaded) == (tmp_path / "nothing", None, True)


def test_another_tokenizer_in_a_run_is_refused(made: tuple, tmp_path: Path) -> None:
    """Oracle: the hash the checkpoint was saved with, and that of the tokenizer lying beside it."""
    run, loaded, states = made
    trained_with = load_tokenizer(run / "tokenizer").sha256
    (tmp_path / "recipe.toml").write_text(loading.to_toml(loaded))
    writer = checkpoint_files.Writer(tmp_path, 5)
    writer.add_tensors(checkpoint_files.MODEL, states[0])
    writer.commit({"step": 5, "tokenizer_sha256": trained_with})
    (tmp_path / "tokenizer").symlink_to(run / "tokenizer")
    assert same(open_model(tmp_path).read(), states[0])
    (tmp_path / "tokenizer").unlink()
    made_of_others = lambda source: iter(texts(200, seed=9))  # noqa: E731
    build_tokenizer(recipe(source("a", path="."), tokenizer=BPE), made_of_others).save(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=f"its model was trained with {trained_with}"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "holds no object"),
        ({"model_type": "llama", "num_attention_heads": 0, "hidden_size": 32}, "cannot be"),
        ({"model_type": "llama", "rope_scaling": 5}, "rope_type is 5"),
    ],
)
def test_odd_configurations(config: object, said: str, made: tuple, tmp_path: Path) -> None:
    """Oracle: a sentence each, where a traceback was."""
    export(made[2][0], made[1].model, made[0] / "tokenizer", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        open_model(tmp_path / "out")


def test_a_folder_that_is_called_like_a_checkpoint(made: tuple) -> None:
    """Oracle: the sentence of a path that is not a model."""
    backup = made[0] / "checkpoints" / "step-00000005.bak"
    backup.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="is not a model"):
        open_model(backup)
    backup.rmdir()


def test_an_export_opens_as_what_it_was_made_of(made: tuple, tmp_path: Path) -> None:
    """Oracle: the weights and the shape of the run, tensor by tensor."""
    run, loaded, states = made
    export(states[0], loaded.model, run / "tokenizer", tmp_path / "out")
    base = open_model(tmp_path / "out")
    refuse_other_base(loaded, base)
    base.refuse_other_parameters()
    assert same(dict(base.tensors()), states[0])


def test_another_tokenizer_in_an_export_is_refused(made: tuple, tmp_path: Path) -> None:
    """Oracle: config.json says which one it was trained with."""
    run, loaded, states = made
    export(states[0], loaded.model, run / "tokenizer", tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its model was trained with"):
        open_model(tmp_path / "out")


def test_a_base_of_another_shape(made: tuple) -> None:
    """Oracle: every field that differs is named with both values."""
    run, loaded, _ = made
    other = loaded.model_copy(update={"model": loaded.model.model_copy(update={"rope_theta": 5.0, "qk_norm": False})})
    with pytest.raises(CheckpointError) as caught:
        refuse_other_base(other, open_model(run))
    assert len(caught.value.problems) == 4
    assert f'`base = "{run}/recipe.toml"`' in caught.value.problems[-1]
    assert "model.rope_theta is 5.0 in the recipe and 10000.0" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "is not a model: expected a run folder"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "is no JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "holds no .safetensors file"),
    ],
)
def test_what_is_no_model(make: object, message: str, tmp_path: Path) -> None:
    """Oracle: the sentence."""
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "x")


def test_an_index_names_the_files_that_are_read(made: tuple, tmp_path: Path) -> None:
    """Oracle: the weights before they were parted; a stray file is not read, a path or a missing file is refused."""
    from safetensors.torch import load_file, save_file

    run, loaded, states = made
    folder = tmp_path / "hf"
    export(states[0], loaded.model, run / "tokenizer", folder)
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: whole[name] for name in some}, folder / file)
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    weight_map = {name: file for file, some in parts.items() for name in some}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(open_model(folder).read(), states[0])
    for wrong, told in (("../b.safetensors", "is a path"), (str(run), "is a path"), ("c.safetensors", "not there")):
        index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: wrong}}))
        with pytest.raises(CheckpointError, match=told):
            open_model(folder)
    for damaged in (b"", b"\xff", b"[1]", b"{}", b'{"weight_map": [1]}'):
        index.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            open_model(folder)


def test_a_run_that_is_not_there_is_told_from_a_folder_that_is_none(tmp_path: Path) -> None:
    """One mistake is a slip in a path, the other a wrong folder."""
    with pytest.raises(CheckpointError, match="none is not a run folder: there is no such folder"):
        export_run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a run folder: it holds no recipe"):
        export_run(tmp_path, tmp_path / "out")
