"""`ds_slm/pretrain.py` as a user runs it: one device, a whole tiny run, what it leaves behind, and what it refuses."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ds_slm.checkpoint import files as checkpoint_files
from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards import prepared
from ds_slm.engine import devices
from ds_slm.errors import ConfigError, DeviceError
from ds_slm.model import kernels
from ds_slm.publish.card.facts import read_facts
from ds_slm.publish.card.rerun import rerun
from ds_slm.recipe import loading
from tests.support import runs


def pretrain(recipe: Path | str, folder: Path, *flags: object):
    """Plain `python ds_slm/pretrain.py`, no launcher."""
    command = [runs.BIN / "python", runs.ROOT / "ds_slm" / "pretrain.py", "--recipe", recipe, *flags]
    return runs.run([str(part) for part in command], cwd=folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """The run folder of a finished run; its output is beside it."""
    done = pretrain(recipe, recipe.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (recipe.parent / "output.txt").write_text(done.stdout + done.stderr)
    return recipe.parent / "runs" / "tiny"


def test_a_run_folder_tells_the_whole_story(finished: Path) -> None:
    """Every file DESIGN promises, and numbers that agree with each other."""
    present = {path.name for path in finished.iterdir()}
    files = {"recipe.toml", "ds_config.json", "env.json", "metrics.jsonl", "done.json"}
    assert files | {"tokenizer", "checkpoints", "tb", "logs"} <= present
    done, env = json.loads((finished / "done.json").read_text()), json.loads((finished / "env.json").read_text())
    assert (done["step"], done["tokens"]) == (20, 20 * 224)
    assert done["val_loss"] == runs.records(finished, "eval")[-1]["loss"]
    assert done["data_sha256"] == env["data_sha256"]
    assert loading.load(str(finished / "recipe.toml")).identity_sha256() == done["recipe_sha256"]
    assert (env["world_size"], env["backend"], env["precision"]) == (1, "gloo", "fp32")
    assert json.loads((finished / "ds_config.json").read_text())["gradient_clipping"] == 1.0


def test_the_card_states_the_recipes_hash_as_the_launch_did(finished: Path) -> None:
    """Oracle: the start line, env.json and done.json; the recipe that the card shows has no local path, and its own."""
    shown = re.search(r"recipe ([0-9a-f]{16}), run folder", (finished.parents[1] / "output.txt").read_text())
    recipe = loading.load_recorded(finished)
    card = "\n".join(rerun(read_facts(finished, recipe, checkpoint_files.choose(finished))))
    stated = re.findall(r"^\| (recipe.*?) \| `([0-9a-f]{64})` \|$", card, re.M)
    recorded = {json.loads((finished / name).read_text())["recipe_sha256"] for name in ("env.json", "done.json")}

    assert shown and [what for what, _ in stated] == ["recipe", "recipe as shown, without local paths"]
    assert recorded == {stated[0][1]} and stated[0][1].startswith(shown[1])
    (toml,) = re.findall(r"```toml\n(.+?)\n```", card, re.S)
    assert loading.parse(toml).identity_sha256() == stated[1][1]


def test_an_eager_run_does_not_import_the_compiler(recipe: Path) -> None:
    """Oracle: the interpreter's own list of imports. torch's compiler takes as long as all of torch."""
    script = runs.ROOT / "ds_slm" / "pretrain.py"
    flags = ["--recipe", recipe, "--run-dir", "imports", "--max-steps", "1"]
    command = [runs.BIN / "python", "-X", "importtime", script, *flags]
    done = runs.run([str(part) for part in command], cwd=recipe.parent)
    assert done.returncode == 0
    assert "deepspeed.runtime.engine" in done.stderr
    assert "torch._inductor" not in done.stderr


def test_golden_losses(finished: Path) -> None:
    """Oracle: losses written down earlier; a change that means to change nothing leaves them as they are."""
    golden = json.loads((runs.ROOT / "tests" / "golden" / "tiny-fp32.json").read_text())
    losses = [record["loss"] for record in runs.records(finished)]
    assert losses == pytest.approx(golden, rel=1e-5)


def test_the_terminal_shows_progress_and_no_chatter(finished: Path) -> None:
    """Plain lines without a terminal; what DeepSpeed and torch print is in the log."""
    output = (finished.parents[1] / "output.txt").read_text()
    assert "step 20/20: loss" in output
    assert "tokens/s" in output
    assert re.search(r"\d s to the first forward: launcher [\d.]+, imports [\d.]+, data ", output)
    assert not any(word in output for word in ("Warning", "WARNING", "INFO", "[Gloo]"))
    assert (finished / "logs" / "rank-00000.log").exists()


def test_event_files_hold_every_tag(finished: Path) -> None:
    """Oracle: TensorBoard's own reader, and metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    train = {"train/loss", "train/z_loss", "train/lr", "train/grad_norm", "train/tokens"}
    perf = {"perf/tokens_per_s", "perf/mfu", "perf/step_s", "perf/peak_memory_gb"}
    val = {"val/loss", "val/perplexity", "val/bits_per_byte", "val/all_rows_loss", "val/all_rows_bits_per_byte"}
    assert train | perf | val <= set(events.Tags()["scalars"])
    written = runs.records(finished)
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 21))
    assert all(
        math.isclose(event.value, record["loss"], rel_tol=1e-6) for event, record in zip(found, written, strict=True)
    )
    assert [event.step for event in events.Scalars("val/loss")] == [10, 20]
    texts = events.Tags()["tensors"]
    assert "recipe/text_summary" in texts
    assert "samples/the cat/text_summary" in texts


def test_bits_per_byte_counts_every_held_out_token(finished: Path, recipe: Path) -> None:
    """Oracle: transformers, on the exported model, over the held-out tokens as one list."""
    import torch
    from transformers import AutoModelForCausalLM

    out = finished.parents[1] / "export"
    done = runs.run([str(runs.BIN / "ds-slm"), "export", str(finished), "--out", str(out)], cwd=out.parent)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    loaded = loading.load(str(recipe))
    data = prepared.open_prepared(loaded, finished.parents[1] / "data" / "tiny")
    rows, nll, tokens = PretrainRows(loaded, data), 0.0, 0
    for row_id in rows.val_row_ids(None):
        row = rows.read([row_id], "val")
        with torch.no_grad():
            logits = model(torch.from_numpy(row.input_ids)).logits[0].double()
        counted = torch.from_numpy(row.weights[0] > 0)
        targets = torch.from_numpy(row.target_ids[0])[counted]
        nll += float(torch.nn.functional.cross_entropy(logits[counted], targets, reduction="sum"))
        tokens += len(targets)
    assert tokens == data.val_tokens == len(data.tokens("val")[0])
    expected = nll / math.log(2) / len(data.val_text().encode())
    assert json.loads((finished / "done.json").read_text())["val_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_says_so(finished: Path, recipe: Path) -> None:
    """Exit code 0, nothing overwritten."""
    before = (finished / "metrics.jsonl").read_bytes()
    done = pretrain(recipe, finished.parents[1])
    assert (done.returncode, "is finished" in done.stdout) == (0, True), done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def lacking(done: subprocess.CompletedProcess[str], *parts: str) -> list[str]:
    """What a refusal lacks: exit code 2, no traceback, the parts named on stderr; with what was printed instead."""
    lacks = [repr(part) for part in parts if part not in done.stderr]
    lacks += ["exit code 2"] if done.returncode != 2 else []
    lacks += ["no traceback"] if "Traceback" in done.stdout + done.stderr else []
    return [*lacks, done.stdout + done.stderr] if lacks else []


def test_a_run_of_another_recipe_is_refused(finished: Path, recipe: Path) -> None:
    """Model and seed may not change on resume; nothing is overwritten."""
    before = (finished / "recipe.toml").read_bytes()
    done = pretrain(recipe, finished.parents[1], "--set", "train.seed=6", "--set", "optimizer.lr=0.1")
    assert not lacking(done, "train.seed", "optimizer.lr", "--allow-change", "another --run-dir")
    assert (finished / "recipe.toml").read_bytes() == before


def test_resume_never_refuses_a_folder_in_use(finished: Path, recipe: Path) -> None:
    """The user asked for a fresh start in a folder that is not empty."""
    assert not lacking(pretrain(recipe, finished.parents[1], "--resume", "never"), "not empty", "name another folder")


def test_a_damaged_shard_is_refused(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """A token shard cut short, before anything is written."""
    import shutil

    shutil.copytree(finished.parents[1] / "data", tmp_path / "data")
    shard = tmp_path / "data" / "tiny" / "generated" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert not lacking(pretrain(recipe, tmp_path, "--data-root", tmp_path / "data"), "train-00000.bin", "cut short")
    assert not (tmp_path / "runs").exists()


def test_ids_beyond_the_vocabulary_are_refused(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """The shard and the position are named; where its time of change gives it away, before any row is read."""
    shutil.copytree(finished.parents[1] / "data", tmp_path / "data")
    shard = tmp_path / "data" / "tiny" / "generated" / "train-00000.bin"
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    runs.hide_change(shard)
    assert not lacking(
        pretrain(recipe, tmp_path, "--data-root", tmp_path / "data"), "train-00000.bin", "65535", "position"
    )
    os.utime(shard)
    assert not lacking(pretrain(recipe, tmp_path, "--data-root", tmp_path / "data"), "train-00000.bin was changed")


MISTAKES = {
    "unknown recipe": ((), "slm-10n", ("slm-10n", "slm-10m")),
    "misspelt key": (("--set", "train.stpes=3"), None, ("train.stpes", "train.steps")),
    "heads": (("--set", "model.num_attention_heads=3"), None, ("num_attention_heads", "num_key_value_heads")),
    "batch": (("--set", "train.global_batch_tokens=225"), None, ("global_batch_tokens", "seq_len", "224")),
    "source": (("--source", "generated"), None, ("NAME=PATH",)),
    "empty source": (("--source", "generated="), None, ("NAME=PATH",)),
    "micro-batch": (("--micro-batch", "0"), None, ("--micro-batch",)),
    "steps": (("--max-steps", "0"), None, ("--max-steps",)),
    "flag": (("--max-step", "3"), None, ("--max-step",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_paragraph(recipe: Path, tmp_path: Path, mistake: str) -> None:
    """What was got, and the way out; nothing is written."""
    flags, name, parts = MISTAKES[mistake]
    assert not lacking(pretrain(name or recipe, tmp_path, *flags), *parts)
    assert not any(tmp_path.iterdir())


def test_must_resume_something(recipe: Path, tmp_path: Path) -> None:
    """--resume must where there is nothing leaves nothing behind."""
    assert not lacking(
        pretrain(recipe, tmp_path, "--resume", "must"), "--resume must", "no host has a whole checkpoint"
    )
    assert not (tmp_path / "runs").exists()


def test_conflicts_with_the_ds_config_are_refused(recipe: Path, tmp_path: Path) -> None:
    """Everything that belongs to the recipe, unknown keys and stage 0, at once."""
    config = {"optimizer": {}, "gradient_clipping": 1, "zero_optimisation": {}, "zero_optimization": {"stage": 0}}
    (tmp_path / "bad.json").write_text(json.dumps(config))
    done = pretrain(recipe, tmp_path, "--ds-config", tmp_path / "bad.json")
    assert not lacking(
        done, "'optimizer' belongs to the recipe", "optimizer.grad_clip", "zero_optimisation", "stage = 0"
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_precision_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """fp16 on a CPU without fp16 products, whatever this CPU has; a CPU computes in the other two in any case."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    if precision == "fp16":
        with pytest.raises(
            DeviceError, match=r"'fp16'.* use --set train\.precision=fp32 or --set train\.precision=bf16"
        ):
            devices.refuse_missing_precision(precision)
    else:
        devices.refuse_missing_precision(precision)


def test_products_in_unknown_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the refusal, before anything is prepared."""
    monkeypatch.setenv(kernels.PRODUCTS_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="DS_SLM_HALF_PRODUCTS=fast: expected native, upcast, or unset"):
        devices.refuse_missing_precision("fp32")


def test_a_recipe_of_fine_tuning_is_refused(tmp_path: Path) -> None:
    """Oracle: exit code 2 and the program that is meant, before anything is prepared."""
    command = [str(runs.BIN / "python"), str(runs.ROOT / "ds_slm" / "pretrain.py"), "--recipe", "demo-instruct"]
    done = runs.run(command, cwd=tmp_path)
    assert done.returncode == 2
    assert "launch sft/train.py --recipe demo-instruct --base MODEL" in done.stderr
    assert not list(tmp_path.iterdir())
