"""A public model trained further: imported, its own text or conversations, launched, exported. As a user types it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepared import open_prepared
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.recipe import loading
from sft.prepare import prepare_conversations
from sft.rows import ConversationRows
from tests.support import assistants, runs
from tests.support.data_recipes import texts
from tests.support.public_models import save_model
from tests.support.scored_models import with_bos

SPECIALS = '"<|endoftext|>" = 0, "<|pad|>" = 1, "<|bos|>" = 2, "<|im_start|>" = 3, "<|im_end|>" = 4'
CASES = {"llama": 1, "qwen3": 2}
"""Kind of model -> ranks."""
FEW_STEPS = ["--set", "train.precision=fp32", "--set", "run.eval_every_steps=2", "--set", "run.eval_rows=100000"]


@dataclass(frozen=True)
class Public:
    """A model as others publish it, and the folder where the commands run."""

    folder: Path
    ranks: int

    @property
    def model(self) -> Path:
        """The Hugging Face folder that transformers saved."""
        return self.folder / "Small-Public"

    def command(self, *arguments: object) -> CompletedProcess[str]:
        """`ds-slm`, in a process of its own."""
        return runs.run([str(runs.BIN / "ds-slm"), *map(str, arguments)], cwd=self.folder, timeout_s=600)

    def done(self, *arguments: object) -> str:
        """What a command that must succeed printed."""
        done = self.command(*arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def loss(self, rows: PretrainRows | ConversationRows, ids: Iterable[Any], split: Any = "train") -> float:
        """The loss of the model on some rows: transformers' logits, torch's cross-entropy, the rows' own weights."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        total = weight = 0.0
        for row_id in ids:
            row = rows.read([row_id], split)
            with torch.no_grad():
                logits_TV = model(torch.from_numpy(row.input_ids).long()).logits[0].double()
            nll_T = F.cross_entropy(logits_TV, torch.from_numpy(row.target_ids[0]).long(), reduction="none")
            weights_T = torch.from_numpy(row.weights[0]).double()
            total, weight = total + float(nll_T @ weights_T), weight + float(weights_T.sum())
        return total / weight


@pytest.fixture(scope="module", params=CASES)
def public(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Public:
    """A tiny Llama whose tokenizer puts a BOS before each text, or a tiny Qwen3; imported as runs/imported."""
    folder = tmp_path_factory.mktemp(request.param)
    text = runs.TINY.replace('"<|endoftext|>" = 0, "<|pad|>" = 1', SPECIALS).replace("qk_norm = true", "")
    build_tokenizer(loading.parse(text), lambda source: iter(texts(300))).save(folder / "tokenizer")
    tokenizer = folder / "tokenizer"
    if request.param == "llama":
        tokenizer = with_bos(tokenizer, folder / "with-bos")
    made = Public(folder, CASES[request.param])
    save_model(made.model, request.param, tokenizer, torch.bfloat16)
    made.done("import", made.model, "--run-dir", "runs/imported")
    return made


@pytest.fixture(scope="module")
def continued(public: Public) -> Public:
    """The model after two steps on a text of our own, in runs/mine, by the commands that init prints."""
    runs.write_corpus(public.folder / "corpus.jsonl", documents=1_500)
    printed = public.done("init", "mine", "--from", "runs/imported", "--text", "corpus.jsonl")
    assert "ds-slm train mine.toml --devices N --base runs/imported" in printed
    train(public)
    return public


def train(public: Public, *flags: object, base: str = "runs/imported") -> None:
    """`ds-slm train` of the recipe that init wrote, for two steps unless a flag says otherwise."""
    steps = [] if "--max-steps" in flags else ["--max-steps", 2]
    public.done("train", "mine.toml", "--devices", public.ranks, "--base", base, *FEW_STEPS, *steps, *flags)


def test_begins_with_the_weights_of_a_public_model(continued: Public) -> None:
    """Oracle: transformers' loss of the model it had saved, on the rows of step 1 and on all that are held out."""
    recipe = loading.load_recorded(continued.folder / "runs" / "mine")
    rows = PretrainRows(recipe, open_prepared(recipe, continued.folder / "data" / "mine"))
    first = runs.records(continued.folder / "runs" / "mine")[0]
    before = runs.records(continued.folder / "runs" / "mine", "val")[0]

    assert first["loss"] == pytest.approx(continued.loss(rows, rows.row_ids(0)), rel=1e-5)
    assert (before["step"], before["tokens"]) == (0, 0)
    assert before["loss"] == pytest.approx(continued.loss(rows, rows.val_row_ids(None), "val"), rel=1e-5)


def test_a_continued_run_says_what_it_began_with(continued: Public) -> None:
    """Oracle: the hash that the import printed, and the name of the public model's folder."""
    run = continued.folder / "runs" / "mine"
    environment = json.loads((run / "env.json").read_text())
    manifest = continued.folder / "runs" / "imported" / "checkpoints" / "step-00000000" / "manifest.json"
    assert environment["base"] == "Small-Public"
    assert environment["base_sha256"] in manifest.read_text()
    assert Path(environment["base_folder"]).resolve() == manifest.resolve().parent

    continued.done("export", "runs/mine", "--out", "exports/mine", "--set", "card.base_model=org/Small-Public")
    card = (continued.folder / "exports" / "mine" / "README.md").read_text()
    assert "base_model: org/Small-Public" in card
    assert "trained further from `org/Small-Public`" in card and "from scratch" not in card
    assert "--base BASE" in card
    continued.done("report", "runs/mine", "--out", "report.html")
    assert "Small-Public" in (continued.folder / "report.html").read_text()


@pytest.mark.parametrize("public", ["llama"], indirect=True)
def test_resumes_with_the_same_base_alone(continued: Public, tmp_path: Path) -> None:
    """Oracle: the steps that are recorded; exit code 2 and one paragraph for another base, for none, and for itself."""
    train(continued, "--max-steps", 3)
    assert [one["step"] for one in runs.records(continued.folder / "runs" / "mine")] == [1, 2, 3]

    other = save_model(tmp_path / "other", "llama", continued.model, torch.float32)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    said = {
        ("--base", tmp_path / "other"): "was trained with base_sha256",
        (): "add --base MODEL",
        ("--base", "runs/mine"): "leave out --base to go on with that run",
    }
    program = [runs.BIN / "python", runs.ROOT / "ds_slm" / "pretrain.py", "--recipe", "mine.toml", *FEW_STEPS]
    for flags, sentence in said.items():
        refused = runs.run(list(map(str, (*program, *flags))), cwd=continued.folder)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and refused.stderr.count("error:") == 1


@pytest.mark.parametrize("public", ["llama"], indirect=True)
def test_a_base_of_another_shape_is_refused(public: Public) -> None:
    """Oracle: the two keys that --set changed, exit code 2 of the command, and no run folder."""
    changes = ["--set", "model.num_hidden_layers=3", "--set", "model.rope_theta=5e4"]
    refused = public.command("train", "demo", *changes, "--devices", public.ranks, "--base", "runs/imported",
                             "--data-root", "nothing")  # fmt: skip
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "model.num_hidden_layers is 3 in the recipe and 2 in" in refused.stderr
    assert "model.rope_theta is 50000.0 in the recipe and 2500.0 in" in refused.stderr
    assert not (public.folder / "runs" / "demo").exists() and not (public.folder / "nothing").exists()


def test_a_public_model_is_fine_tuned(public: Public) -> None:
    """Oracle: transformers' loss of the model it had saved, on the rows of step 1 with their masks."""
    assistants.write_sft(public.folder, assistants.small_talk(80))
    recipe = public.folder / "chatty.toml"
    recipe.write_text(
        """
base = "runs/imported/recipe.toml"
[card]
name = "chatty"
[data]
val_fraction = 0.1
[[data.source]]
name = "chats"
kind = "files"
column = "messages"
path = "chatty.jsonl"
[train]
global_batch_tokens = 512
steps = 2
precision = "fp32"
[schedule]
warmup_steps = 1
[sft]
packing = false
"""
    )
    public.done("sft", "chatty.toml", "--devices", public.ranks, "--base", "runs/imported")
    run = public.folder / "runs" / "chatty"
    recorded = loading.load_recorded(run)
    folder = public.folder / "runs" / "imported" / "tokenizer"
    prepared = prepare_conversations(recorded, public.folder / "data" / "chatty", folder, report=lambda line: None)
    rows = ConversationRows(recorded, prepared)
    assert np.sum(rows.read(rows.row_ids(0)).weights > 0) > 50
    assert runs.records(run)[0]["loss"] == pytest.approx(public.loss(rows, rows.row_ids(0)), rel=1e-5)
    public.done("export", "runs/chatty", "--out", "exports/chatty")
    assert "fine-tuned from `Small-Public`" in (public.folder / "exports" / "chatty" / "README.md").read_text()
