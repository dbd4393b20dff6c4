"""`ds-slm export --dtype`: weights in 16 bits, as transformers, the card, MODEL and `ds-slm import` take them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.publish.models import open_model
from tests.support.told_runs import recipe_of, write_run
from tests.unit.publish.test_snippet import run_snippet, snippet_of

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("overrides", [(), ("model.qk_norm=false",)], ids=["qwen3", "llama"])
@pytest.mark.parametrize("name", DTYPES)
def test_transformers_loads_the_rounded_weights(
    name: str, overrides: tuple[str, ...], tmp_path: Path, ds_slm: Callable[..., Any]
) -> None:
    """Oracle: torch's rounding of the checkpoint; transformers' dtype and logits, beside those of our decoder."""
    from transformers import AutoModelForCausalLM

    run = write_run(tmp_path / "run", recipe_of(*overrides))
    printed = ds_slm("export", run, "--out", tmp_path / "out", "--dtype", name, "--json")
    assert printed.returncode == 0, printed.stderr
    dtype, state = DTYPES[name], open_model(run).read()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == dtype and json.loads(printed.stdout)["dtype"] == str(dtype).removeprefix("torch.")
    for parameter, value in theirs.named_parameters():
        assert torch.equal(value, state[parameter].to(dtype)), parameter
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")

    ids_BT = torch.randint(2, config["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
    ours = open_model(tmp_path / "out").decoder(torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BT), theirs.float()(ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_an_export_in_bf16_is_imported_again(tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: every tensor bit for bit after import and export in the same type."""
    run = write_run(tmp_path / "run", recipe_of())
    assert ds_slm("export", run, "--out", tmp_path / "out", "--dtype", "bf16").returncode == 0
    assert ds_slm("import", tmp_path / "out", "--run-dir", tmp_path / "again").returncode == 0
    assert ds_slm("export", tmp_path / "again", "--out", tmp_path / "twice", "--dtype", "bf16").returncode == 0
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "twice"))
    assert once.keys() == twice.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, twice[key]) for key, tensor in once.items())


def test_the_card_says_what_is_stored(tmp_path: Path, export: Any) -> None:
    """Oracle: transformers, run by the card's own snippet; the words of its first table."""
    card = export(write_run(tmp_path / "run", recipe_of()), "--dtype", "bf16")
    assert "stored in bfloat16" in card and 'dtype="auto"' in snippet_of(card)
    assert run_snippet(card, tmp_path / "exports" / "run-out").startswith("the")
    assert "dtype" not in snippet_of(export(write_run(tmp_path / "other", recipe_of())))


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: torch's largest float16; exit code 2, the parameter's name, and nothing written; bf16 holds it."""
    run = write_run(tmp_path / "run", recipe_of())
    state = open_model(run).read()
    state["model.norm.weight"][3] = -torch.finfo(torch.float16).max - 32
    writer = checkpoint_files.Writer(run, 13)
    writer.add_tensors(checkpoint_files.MODEL, state)
    writer.commit({"step": 13})

    refused = ds_slm("export", run, "--out", tmp_path / "out", "--dtype", "fp16")
    assert refused.returncode == 2 and "model.norm.weight holds 65536" in refused.stderr
    assert "65,504" in refused.stderr and "--dtype bf16" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert ds_slm("export", run, "--out", tmp_path / "out", "--dtype", "bf16").returncode == 0


def test_another_type_is_refused(tmp_path: Path, ds_slm: Callable[..., Any]) -> None:
    """Oracle: exit code 2 and the names that there are."""
    run = write_run(tmp_path / "run", recipe_of())
    refused = ds_slm("export", run, "--out", tmp_path / "out", "--dtype", "int8")
    assert refused.returncode == 2 and "expected one of fp32, bf16, fp16" in refused.stderr
