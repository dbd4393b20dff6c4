"""`ds-slm import`: public models as run folders, and back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ds_slm.errors import CheckpointError
from ds_slm.model.decoder import build
from ds_slm.publish.export import export, export_run
from ds_slm.publish.importing import import_model, readable_by_both
from ds_slm.publish.models import INDEX, open_model, refuse_other_base
from ds_slm.recipe import loading
from tests.support.assistants import small_talk, write_base, write_sft
from tests.support.data_recipes import texts
from tests.support.faults import fail_at
from tests.support.public_models import KINDS, save_model
from tests.support.runs import TINY
from tests.support.scored_models import with_bos, write_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.usefixtures("one_thread")

VERSIONS = {"as transformers 5 saves it": False, "as transformers 4 wrote it": True}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained byte-level BPE that puts a BOS before each text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return with_bos(write_tokenizer(folder / "plain", texts(300)), folder / "with-bos")


def write_as_version_4(folder: Path) -> None:
    """Change a folder that transformers 5 has saved to what transformers 4 wrote."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config |= {"rope_scaling": None, "transformers_version": "4.51.0"}
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(readable_by_both(json.loads(path.read_text()), "<|endoftext|>")))


@pytest.mark.parametrize(
    ("kind", "version", "dtype"),
    [
        *((kind, version, torch.bfloat16) for kind in KINDS for version in VERSIONS),
        ("llama", "as transformers 5 saves it", torch.float32),
        ("qwen3", "as transformers 5 saves it", torch.float16),
    ],
    ids=str,
)
def test_an_export_after_an_import_is_the_same_model(
    kind: str, version: str, dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Oracle: every tensor bit for bit in its dtype, and transformers' logits from both folders."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(tmp_path / "hf", kind, tokenizer_folder, dtype)
    if VERSIONS[version]:
        write_as_version_4(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    run = open_model(tmp_path / "run")
    export(run.read(), run.shape, run.tokenizer_folder, tmp_path / "out", dtype=dtype)

    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name

    ids_BT = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf", "out"))
    assert type(first) is type(again) and again.dtype == dtype
    with torch.no_grad():
        expected = first(ids_BT).logits
        assert expected.std() > 0.1 and torch.equal(again(ids_BT).logits, expected)
    text = "the cat <|bos|> is 5."
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "out")]
    assert tokenizers[0](text).input_ids[0] == 2
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_a_folder_of_several_files_is_imported(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: the tensors that transformers parted over the files of an index."""
    saved = save_model(tmp_path / "hf", "llama-untied", tokenizer_folder, torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2 and (tmp_path / "hf" / INDEX).is_file()
    import_model(tmp_path / "hf", tmp_path / "run")
    found = open_model(tmp_path / "run").read()
    for name, parameter in saved.named_parameters():
        assert torch.equal(found[name], parameter.float()), name


@pytest.fixture(scope="module")
def made(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama, its card beside it. Only read it."""
    folder = tmp_path_factory.mktemp("made") / "Small-Llama"
    save_model(folder, "llama", tokenizer_folder, torch.bfloat16)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    return folder


def test_the_commands_take_what_was_imported(made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit codes and what is printed: verify finds one whole checkpoint, an export has the model's own card."""
    run = tmp_path / "run"
    printed = ds_slm("import", made, "--run-dir", run, "--json")
    assert printed.returncode == 0 and json.loads(printed.stdout)["dtypes"] == ["BF16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert ds_slm("verify", run).stdout == "step-00000000: whole\n"
    assert ds_slm("export", run, "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "README.md").read_bytes() == (made / "README.md").read_bytes()
    assert ds_slm("rank", run, "the cat", " is 5.", " sits").returncode == 0
    assert ds_slm("chat", run, "--continue", "--prompt", "the", "--max-new-tokens", 3).returncode == 0
    assert ds_slm("plan", run / "recipe.toml").returncode == 0
    refused = ds_slm("export", run, "--out", tmp_path / "other", "--set", "card.license=mit")
    assert refused.returncode == 2 and "keeps its own model card" in refused.stderr


def test_a_recipe_says_what_a_model_does_not_tell(made: Path, tmp_path: Path) -> None:
    """Oracle: the parts of a recipe that are neither shape nor tokenizer; reading it back."""
    import_model(made, tmp_path / "run")
    recipe = loading.load_recorded(tmp_path / "run")
    assert recipe.card.name == "Small-Llama" and recipe.model == open_model(made).shape
    assert {place.partition(".")[0] for place in recipe.unstated} == {"data", "optimizer", "schedule", "train"}
    assert recipe.tokenizer.path == str(tmp_path / "run" / "tokenizer")
    assert loading.load(str(tmp_path / "run" / "recipe.toml")).identity_sha256() == recipe.identity_sha256()


def test_a_model_without_a_card_says_so(made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the words of the card that stands in for it."""
    shutil.copytree(made, tmp_path / "hf")
    (tmp_path / "hf" / "README.md").unlink()
    assert ds_slm("import", tmp_path / "hf", "--run-dir", tmp_path / "run").returncode == 0
    assert ds_slm("export", tmp_path / "run", "--out", tmp_path / "out").returncode == 0
    assert "without any training" in (tmp_path / "out" / "README.md").read_text()


def test_other_buffers_and_a_tied_head_are_left_out(made: Path, tmp_path: Path) -> None:
    """Oracle: the parameters of the model; a head that differs from the embedding is refused."""
    shutil.copytree(made, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path)
    import_model(tmp_path / "hf", tmp_path / "run")
    assert open_model(tmp_path / "run").read().keys() == load_file(made / "model.safetensors").keys()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"another lm_head\.weight"):
        import_model(tmp_path / "hf", tmp_path / "again")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "runs the code in it"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"holds no tokenizer\.json"),
    "half a tokenizer": (lambda folder: halve(folder / "tokenizer.json"), "holds no whole tokenizer"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "half a config": (lambda folder: halve(folder / "config.json"), "is no JSON"),
    "half a file": (lambda folder: halve(folder / "model.safetensors"), "cannot be read"),
    "a tensor is missing": (lambda folder: rewrite(folder, lambda found: found.pop(NORM)), f"{NORM} is missing"),
    "a bias": (
        lambda folder: rewrite(folder, lambda found: found.update({"model.layers.0.bias": torch.ones(2)})),
        "belongs to no part"),
    "another shape": (
        lambda folder: rewrite(folder, lambda found: found.update({NORM: torch.ones(5)})), r"is \(5,\)"),
    "eight bits": (
        lambda folder: rewrite(folder, lambda found: found.update({NORM: torch.ones(32, dtype=torch.int8)})),
        "is stored as I8"),
    "a smaller vocabulary": (
        lambda folder: (
            change_json(folder / "config.json", vocab_size=100),
            rewrite(folder, lambda found: found.update({"model.embed_tokens.weight": torch.ones(100, 32)}))),
        "ids, the model 100"),
    "a run folder": (lambda folder: (folder / "recipe.toml").write_text(""), "is a run folder already"),
    "no folder": (shutil.rmtree, "is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_bad_input_is_one_paragraph(what: str, made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2, the sentence, and nothing written."""
    damage, said = DAMAGES[what]
    folder = tmp_path / "hf"
    shutil.copytree(made, folder)
    damage(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    printed = ds_slm("import", folder, "--run-dir", tmp_path / "run")
    assert printed.returncode == 2 and "Traceback" not in printed.stderr
    assert printed.stderr.startswith("error: ")
    with pytest.raises(Exception, match=said):
        import_model(folder, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


FOREIGN = {
    "model_type": "mistral", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "partial_rotary_factor": 0.5,
    "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 16,
    "quantization_config": {"quant_method": "gptq"}, "head_dim": 15,
}  # fmt: skip
SAID_AS = {"rope_scaling": "rope_type", "use_sliding_window": "sliding_window"}


def test_what_the_decoder_cannot_be_is_told_at_once(made: Path, tmp_path: Path) -> None:
    """Oracle: every field of the configuration that was changed."""
    shutil.copytree(made, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | FOREIGN))
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        import_model(tmp_path / "hf", tmp_path / "run")
    told = str(caught.value)
    assert not [name for name in FOREIGN if SAID_AS.get(name, name) not in told]
    assert "tokenizer.json" in told


def test_rope_scaling_counts_as_in_transformers(made: Path, tmp_path: Path) -> None:
    """Oracle: transformers' configuration of a folder that has both spellings, of which it takes rope_scaling."""
    shutil.copytree(made, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters["rope_type"] == "linear"
    with pytest.raises(CheckpointError, match="rope_type is 'linear', expected 'default'"):
        import_model(tmp_path / "hf", tmp_path / "run")


def test_a_llama_that_transformers_refuses_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Oracle: the sentence that refuses such a recipe: 32 components do not divide among 3 heads."""
    shape = loading.parse(TINY, ["model.qk_norm=false"]).model.model_copy(
        update={"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 32, "vocab_size": 512}
    )
    export(dict(build(shape, 0).state_dict()), shape, tokenizer_folder, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="hidden_size = 32 is not a multiple of num_attention_heads = 3"):
        import_model(tmp_path / "hf", tmp_path / "run")


def test_its_licence_goes_with_it(made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: the bytes that came; a card that is not UTF-8 is refused before anything is asked of the hub."""
    shutil.copytree(made, tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_bytes(b"Do as you like.")
    (tmp_path / "hf" / "README.md").write_bytes("# Modèle".encode("latin-1"))
    assert ds_slm("import", tmp_path / "hf", "--run-dir", tmp_path / "run").returncode == 0
    assert ds_slm("export", tmp_path / "run", "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"Do as you like."
    done = ds_slm("export", tmp_path / "run", "--out", tmp_path / "other", "--validate")
    assert done.returncode == 2 and "README.md, is not UTF-8" in done.stderr and not (tmp_path / "other").exists()


def test_a_run_that_exists_is_left_alone(made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2, the flag's name, and the same single file."""
    (tmp_path / "work").write_text("precious")
    printed = ds_slm("import", made, "--run-dir", tmp_path)
    assert printed.returncode == 2 and f"--run-dir {tmp_path} is not an empty folder" in printed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize("point", ["begun@0", "model.safetensors@0", "manifest@0", "renamed@0", "replacing", "syncing"])
def test_a_full_disk_leaves_nothing(point: str, made: Path, tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2 and an empty folder, wherever the disk was full."""
    with fail_at(point):
        printed = ds_slm("import", made, "--run-dir", tmp_path / "run")
    assert printed.returncode == 2 and "No space left" in printed.stderr
    assert not list(tmp_path.iterdir())


def test_what_transformers_5_writes_is_readable_by_4(made: Path, tmp_path: Path) -> None:
    """Oracle: the words of tokenizer_config.json that transformers 4 refuses, in the saved folder and in ours."""
    import_model(made, tmp_path / "run")
    theirs = json.loads((made / "tokenizer_config.json").read_text())
    ours = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert theirs["tokenizer_class"] == "TokenizersBackend" and ours["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(ours.get("extra_special_tokens"), list)
    listed = readable_by_both({"extra_special_tokens": ["<a>"], "tokenizer_class": "Qwen2Tokenizer"}, "<e>")
    expected = {"additional_special_tokens": ["<a>"], "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>"}
    assert listed == expected


def test_an_assistant_keeps_its_ends(made: Path, tmp_path: Path) -> None:
    """Oracle: the ids of the model's own generation_config.json, in the run and in its export."""
    shutil.copytree(made, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    change_json(tmp_path / "hf" / "generation_config.json", eos_token_id=[7, 0], temperature=0.6)
    import_model(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [7, 0] and found["temperature"] == 0.6
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_an_imported_base_is_prepared_for_fine_tuning(tmp_path: Path) -> None:
    """Oracle: the recipe it was a base of: its shape, its tokenizer's ids of the conversations, its weights."""
    from sft.prepare import prepare_conversations

    base = write_base(tmp_path)
    import_model(base, tmp_path / "run")
    recipe = loading.load(str(write_sft(tmp_path, small_talk(40))))
    opened = open_model(tmp_path / "run")
    refuse_other_base(recipe, opened)
    opened.refuse_other_parameters()
    ours, theirs = (
        prepare_conversations(recipe, tmp_path / name / "chatty", folder, report=lambda line: None)
        for name, folder in (("ours", opened.tokenizer_folder), ("theirs", base))
    )
    assert ours.sha256 == theirs.sha256
    with safe_open(base / "model.safetensors", "pt") as stored:
        assert all(torch.equal(tensor, stored.get_tensor(name)) for name, tensor in opened.tensors())
