"""The model card of an export: its head as the hub reads it, its figures, its snippet, and what it never tells."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from ds_slm.data.order import Order
from ds_slm.files import write_json
from ds_slm.publish.card import header
from ds_slm.publish.card.facts import RunFacts, read_facts
from ds_slm.publish.card.page import Page, write_card
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Card
from ds_slm.run import scores
from ds_slm.run.records import Records
from ds_slm.run.report import Report
from tests.golden.facts import MADE
from tests.support import told_runs
from tests.support.cards import rows_of, section
from tests.support.told_runs import recipe_of, sha256_of, task, write_eval, write_run

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

TARGETS = """
[[targets]]
metric = "arc_challenge/acc_norm"
published = 25.0
source = "card"
[[targets]]
metric = "piqa/acc_norm"
published = 50.92
source = "card"
[[targets]]
metric = "train/loss"
published = 5.9
tolerance = 0.05
step = 4
source = "card"
[[targets]]
metric = "val/loss"
published = 2.75
source = "card"
[[targets]]
metric = "val/loss"
published = 9.0
step = 3
source = "card"
[unstated]
"train.seed" = "5: a choice | of <b>ours"
"""


def published() -> Recipe:
    """The golden recipe with published figures."""
    text = loading.to_toml(recipe_of()).replace("targets = []", "").replace("[unstated]", "")
    return loading.parse(text + TARGETS)


def read_head(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def test_the_head_is_what_the_hub_reads(tmp_path: Path, export: Any) -> None:
    """Oracle: the keys of hub-docs' modelcard.md with the values of the run; a second round trip changes nothing."""
    run = write_run(tmp_path / "run", recipe_of('card.language=["en"]'))
    card = export(run, "--set", "card.license=mit")
    head = read_head(card)
    assert head == {
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "metrics": ["perplexity"],
        "pipeline_tag": "text-generation",
        "tags": ["ds_slm", "small-language-model", "qwen3", "pretraining"],
    }
    assert ModelCard(str(ModelCard(card))).data.to_dict() == head
    assert "`mit`." in section(card, "Licence")


def test_only_datasets_that_were_read_from_the_hub_are_named(tmp_path: Path) -> None:
    """Oracle: four sources: one of the hub, one replaced by local files, one of token files, one of local text."""
    given = [
        {"name": "a", "kind": "hub", "id": "org/a"},
        {"name": "b", "kind": "hub", "id": "org/b"},
        {"name": "c", "kind": "tokens", "id": "org/c"},
        {"name": "d", "kind": "files", "path": "/secret/d"},
    ]
    tables = recipe_of().model_dump(mode="json", exclude_none=True)
    tables["data"]["source"] = given
    recipe = Recipe.model_validate(tables)
    run = write_run(tmp_path / "run", recipe, replaced_sources=["b"])
    facts = read_facts(run, recipe, run / "checkpoints" / "step-00000012")
    data = header.card_data(facts, "tiny", {}, {})
    assert data.datasets == ["org/a", "org/c"]


def test_a_fine_tuned_model_names_its_base(tmp_path: Path, export: Any) -> None:
    """Oracle: base_model and its relation where the recipe has the base's id, and neither where it has none."""
    run = write_run(tmp_path / "run", recipe_of(kind="tiny-instruct"))
    head = read_head(export(run, "--set", "card.base_model=org/base"))
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "finetune")
    other = write_run(tmp_path / "other", recipe_of(kind="tiny-instruct"))
    assert "base_model" not in read_head(export(other))


def test_the_model_index_holds_whole_sets_and_says_what_else_differs(tmp_path: Path, export: Any) -> None:
    """Oracle: of a published, a limited, an altered and an unknown set the first and the last, by their names."""
    run = write_run(tmp_path / "run", recipe_of())
    tasks = {"arc_challenge": task(), "piqa": task(limited=True), "sciq": task(published=False),
             "blimp": task(published=None)}  # fmt: skip
    write_eval(run, sha256_of(run), tasks)
    (entry,) = read_head(export(run))["model-index"]
    found = {
        (result["dataset"]["type"], result["dataset"].get("config")): [metric["name"] for metric in result["metrics"]]
        for result in entry["results"]
    }
    names = ["acc_norm", "answer_bits_per_byte"]
    assert found == {
        ("allenai/ai2_arc", "ARC-Challenge"): names,
        ("blimp", None): [f"{name} (rows unchecked)" for name in names],
    }
    accuracy = entry["results"][0]["metrics"][0]
    assert (accuracy["type"], accuracy["value"]) == ("accuracy", 41.5)


def test_texts_of_a_recipe_are_no_markup(tmp_path: Path, export: Any) -> None:
    """A heading, a table or a comment in the recipe's words stays words, on one line."""
    forged = "X.\n\n## Results\n\n| benchmark | this model |\n| --- | --- |\n| hellaswag | 99 |\n\n<!--"
    recipe = recipe_of().model_copy(update={"card": Card(name="m <!--", reproduces=forged)})
    card = export(write_run(tmp_path / "run", recipe))
    assert "# m \\<!--" in card
    assert card.count("\n## Results\n") == 1 and "\n| hellaswag" not in card and "\n<!--" not in card


def test_a_loss_of_some_held_out_rows_says_so(tmp_path: Path, export: Any) -> None:
    """A checkpoint before the last was evaluated on eval_rows rows, not on all."""
    run = write_run(tmp_path / "run", recipe_of())
    (run / "done.json").unlink()
    card = export(run)
    assert f"on {recipe_of().run.eval_rows:,} held-out rows at most" in card


def test_published_stands_beside_ours_with_its_error_and_chance(tmp_path: Path, export: Any) -> None:
    """Oracle: 1.96 x 1.25 = 2.45; 41.5 - 25 = 16.5; what nobody scored says so."""
    run = write_run(tmp_path / "run", published())
    write_eval(run, sha256_of(run), {"arc_challenge": task(), "sciq": task(limited=True, items=5)})
    found = rows_of(section(export(run), "Results"))
    assert found["arc_challenge"] == ["acc_norm", "25.00", "41.50", "2.45", "25.00", "1.625", "1,172",
                                      "differs by +16.50"]  # fmt: skip
    assert found["sciq"][-1] == "first 5"
    assert found["piqa"][:3] == ["acc_norm", "50.92", "not evaluated"]


def test_figures_of_other_weights_are_not_this_models(tmp_path: Path, export: Any) -> None:
    """Oracle: an eval.json with another hash, and that of the checkpoint by its own name."""
    run = write_run(tmp_path / "run", published())
    write_eval(run, "another", {"arc_challenge": task()})
    card = export(run)
    assert "not evaluated" in section(card, "Results") and "41.50" not in card and "model-index" not in read_head(card)

    named = write_run(tmp_path / "named", published())
    write_eval(named, "another", {"arc_challenge": task(figures={})})
    write_eval(named / "eval" / "step-00000012", sha256_of(named), {"arc_challenge": task()})
    assert "41.50" in section(export(named), "Results")


def test_what_was_left_open_is_no_markup(tmp_path: Path, export: Any) -> None:
    """Oracle: the recipe's words, with every sign that would be HTML or a table spelled out."""
    card = export(write_run(tmp_path / "run", published()))
    assert "| `train.seed` | 5: a choice \\| of \\<b\\>ours |" in card


def test_published_losses_stand_beside_those_of_the_same_step(tmp_path: Path, export: Any) -> None:
    """Oracle: the run's losses by hand: 6 - 4 / 100, done.json's 2.5, and a step at which nothing was evaluated."""
    lines = section(export(write_run(tmp_path / "run", published())), "Training").splitlines()
    assert "| train/loss | 4 | 5.9 | 5.9600 | differs by +0.06 |" in lines
    assert "| val/loss | 12 | 2.75 | 2.5000 |  |" in lines
    assert "| val/loss | 3 | 9 | not measured |  |" in lines


def test_the_card_is_markdown_with_whole_tables(tmp_path: Path, export: Any) -> None:
    """Oracle: markdown-it with GitHub's tables: every row of a table has as many cells as its head."""
    run = write_run(tmp_path / "run", published())
    write_eval(run, sha256_of(run), {"arc_challenge": task()})
    text = export(run).split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert re.findall(r"<h[12]>(.+?)</h", page)[1:] == re.findall(r"^## (.+)$", text, re.M)
    tables = re.findall(r"<table>.+?</table>", page, re.S)
    assert len(tables) == len(re.findall(r"^\| ?-", text, re.M)) >= 7
    for one in tables:
        assert len({len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.+?</tr>", one, re.S)}) == 1
    assert "<p>|" not in page and page.count("<img") == 3
    assert "5: a choice | of &lt;b&gt;ours" in page


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("tiny", "the cat sat ``` | down"), ("tiny-instruct", "user: the cat\nassistant: sat ``` | down")],
)
def test_samples_of_the_same_step_are_shown(tmp_path: Path, export: Any, kind: str, expected: str) -> None:
    """Oracle: what the run's own report wrote at its last step, in a block that its backticks do not end."""
    recipe = recipe_of(kind=kind)
    run = write_run(tmp_path / "run", recipe)
    report = Report(sys.stdout, Records(run, print), total_steps=12)
    last = " sat ``` | down" + ("<|im_end|>" if recipe.sft else "")
    report.record("samples", recipe.train.steps - 1, {"continuations": {"the cat": " an earlier one"}})
    report.record("samples", recipe.train.steps, {"continuations": {"the cat": last, "another": " one"}})
    report.close()
    text = section(export(run), "What it writes")
    assert f"````text\n{expected}\n````" in text and "one" not in text


def test_the_conversations_of_a_fine_tuning_are_counted(tmp_path: Path, export: Any) -> None:
    """Oracle: the counts of the run's rows, and the target tokens of its state: 6 steps of 512."""
    card = export(write_run(tmp_path / "run", recipe_of(kind="tiny-instruct")))
    counts = "40 conversations to train on, 5 held out, 2 left out because they could not be used, 3 cut to the length"
    assert counts in section(card, "Data") and "25% of the 4,000 tokens are targets" in section(card, "Data")
    assert "fine-tuned from a base model on 40 conversations" in card
    assert rows_of(card)["Training"] == ["6 steps, 3,072 target tokens"]
    assert "the base model's" in section(card, "Data") and "operations" not in card


def test_an_earlier_checkpoint_is_described_as_one(tmp_path: Path, export: Any) -> None:
    """Oracle: steps, tokens, hours and the last loss up to its step alone: 6 x 224 tokens, 6 x 0.5 s x 2 devices."""
    recipe = recipe_of()
    run = write_run(tmp_path / "run", recipe)
    told_runs.add_checkpoint(run, recipe, 6)
    card = export(run, "--step", "6")
    assert "after step 6; the recipe takes 12" in card
    assert rows_of(card)["Training"] == ["6 steps, 1,344 tokens"]
    assert "6 device seconds" in rows_of(card)["Hardware"][0]
    assert "to 5.9400 nats" in card and "--max-steps 6" in section(card, "Make it again")
    assert "ledger-6" in card and "ledger-12" not in card


@pytest.mark.parametrize("skipped", [[], [[3, 9]], [[0, 4], [60, 1_000]]])
def test_the_mix_is_the_one_that_was_drawn(tmp_path: Path, skipped: list[list[int]]) -> None:
    """Oracle: Order's row at every position of the run but those that were left out, counted one by one."""
    recipe = recipe_of()
    weights = [source.weight for source in recipe.data.source]
    assert len(set(weights)) == 2
    run = write_run(tmp_path / "run", recipe)
    facts = read_facts(run, recipe, run / "checkpoints" / "step-00000012")
    facts = replace(facts, state={**facts.state, "skipped_rows": skipped})
    order = Order(recipe.train.seed, [5, 11], weights)
    left_out = {place for first, end in skipped for place in range(first, end)}
    drawn = [order.sample(place).source for place in range(12 * recipe.rows_per_step) if place not in left_out]
    assert facts.rows_drawn() == [drawn.count(source) for source in range(2)]


def test_each_source_tells_how_often_it_was_read(tmp_path: Path, export: Any) -> None:
    """Oracle: by hand, of the rows drawn from each source; one of them is small, and comes again and again."""
    recipe = recipe_of()
    first, second = (source.name for source in recipe.data.source)
    rows = {"train": {"tokens": 10_000, "rows": {first: 7, second: 1_000}}, "val": {"tokens": 77}}
    found = rows_of(section(export(write_run(tmp_path / "run", recipe, rows=rows)), "Data"))
    for name, there in ((first, 7), (second, 1_000)):
        *_, drawn, passes = found[name]
        assert float(passes) == pytest.approx(int(drawn) / there, rel=5e-3)


def test_the_card_tells_nothing_of_the_machine(tmp_path: Path, export: Any) -> None:
    """Oracle: no path, host or folder that the run's files hold; the recipe below keeps the files' name alone."""
    recipe = recipe_of("data.source.1.path=/secret/place/corpus.jsonl", "eval.bench_dir=/secret/benchmarks")
    card = export(write_run(tmp_path / "run", recipe))
    for secret in ("/secret", "secret-host", str(tmp_path)):
        assert secret not in card
    assert 'path = "corpus.jsonl"' in section(card, "Make it again")


@pytest.mark.parametrize("name", loading.library_names())
def test_every_recipe_of_the_library_has_a_card(name: str) -> None:
    """Oracle: the schedule's rates, batch and unstated choices of the recipe stand in it; nothing says None or nan."""
    recipe = loading.load(name)
    facts = RunFacts(recipe, recipe.train.steps, "", {}, {"recipe_name": name}, (), {}, {})
    card = write_card(facts, Page(recipe.card.name, name))
    assert f"{recipe.train.global_batch_tokens:,} tokens" in card
    assert all(f"`{place}`" in card for place in recipe.unstated)
    assert not re.search(r"\b(None|nan|inf)\b", card.replace("None of these", "").replace("None is stated", ""))
    evaluated = [target for target in recipe.targets if target.metric.partition("/")[0] not in ("val", "train")]
    assert card.count("not evaluated") == len(evaluated)


def test_a_folder_of_an_earlier_version_gets_a_card(tmp_path: Path, export: Any) -> None:
    """Oracle: the golden run, unfinished and skipping rows, and the same without all that can be missing."""
    whole = shutil.copytree(MADE / "run", tmp_path / "whole")
    card = export(whole)
    assert "after step 8; the recipe takes 12" in card and "launched 2 times" in card
    bare = shutil.copytree(MADE / "run", tmp_path / "bare")
    for name in ("env.json", "metrics.jsonl", "changes.jsonl"):
        (bare / name).unlink()
    assert "Hardware" not in export(bare)
    damaged = shutil.copytree(MADE / "run", tmp_path / "damaged")
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 8, "loss": NaN, "lr": "x"}\n{"kind": [], "step": 1}\nnot json\n')
    assert "## Training" in export(damaged)


WRONG = {
    "a licence": (("card.license=gpl-9",), ("'gpl-9'",)),
    "several": (("card.license=gpl-9", 'card.language=["xx"]', "card.base_model=a//b"), ("'gpl-9'", "'xx'", "'a//b'")),
    "not of the card": (("train.steps=3", "cards.license=mit"), ("train.steps=3", "cards.license=mit")),
    "another licence without a name": (("card.license=other",), ("card.license_name",)),
    "a name of a licence that has one": (("card.license=mit", "card.license_name=x"), ("license_name", "'other'")),
    "no such key": (("card.licence=mit",), ("license",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_card_that_would_be_wrong_is_refused(tmp_path: Path, ds_slm: Any, case: str) -> None:
    """Oracle: exit code 2, every problem in one message without a traceback, and nothing written."""
    flags, words = WRONG[case]
    run = write_run(tmp_path / "run", recipe_of())
    done = ds_slm("export", run, "--out", tmp_path / "out", *(word for flag in flags for word in ("--set", flag)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_record_of_scores_is_refused(tmp_path: Path, ds_slm: Any) -> None:
    """Oracle: exit code 2, the file's name, and nothing written."""
    run = write_run(tmp_path / "run", recipe_of())
    (run / scores.EVAL_FILE).write_text("{")
    done = ds_slm("export", run, "--out", tmp_path / "out")
    assert done.returncode == 2 and str(run / scores.EVAL_FILE) in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_metric_may_be_negative_where_its_range_is_not_known(tmp_path: Path, export: Any) -> None:
    """Oracle: the figure in the head: a correlation goes from -1 to 1."""
    run = write_run(tmp_path / "run", recipe_of())
    write_eval(
        run, sha256_of(run), {"cola": task(published=None, figures={"mcc": {**told_runs.FIGURE, "value": -0.2}})}
    )
    assert read_head(export(run))["model-index"][0]["results"][0]["metrics"][0]["value"] == -0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 150.0, -3.0])
def test_a_figure_that_cannot_be_is_refused(tmp_path: Path, ds_slm: Any, value: float) -> None:
    """Oracle: exit code 2, the figure's name, and nothing written: the hub would show it as a result."""
    run = write_run(tmp_path / "run", recipe_of())
    write_eval(run, sha256_of(run), {"piqa": task(figures={"acc_norm": {**told_runs.FIGURE, "value": value}})})
    done = ds_slm("export", run, "--out", tmp_path / "out")
    assert done.returncode == 2 and f"piqa/acc_norm is {value}, expected 0 to 100" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_is_the_same_bytes_twice(tmp_path: Path, ds_slm: Any) -> None:
    """Oracle: all files of two exports of a run, in folders of the same name."""
    run = write_run(tmp_path / "run", recipe_of())
    for place in ("a", "b"):
        assert ds_slm("export", run, "--out", tmp_path / place / "out").returncode == 0
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / place / "out").iterdir()} for place in "ab")
    assert first == second


def test_incidents_are_told(tmp_path: Path, export: Any) -> None:
    """Oracle: a change of the steps by the second launch, and none of what changes no result."""
    run = write_run(tmp_path / "run", recipe_of(), generation=2)
    change = {"generation": 2, "changes": {"train.steps": [8, 12], "run.keep_last": [1, 2]}}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    text = section(export(run), "Training")
    assert "- Launch 2 changed train.steps from 8 to 12." in text and "keep_last" not in text


def test_pictures_need_matplotlib_and_nothing_else_does() -> None:
    """Oracle: the modules that a process has imported after everything around them."""
    code = (
        "import sys, ds_slm.publish.card.page, ds_slm.cli.publishing, ds_slm.publish.models, ds_slm.cli.main;"
        "assert not [name for name in sys.modules if name.startswith('matplotlib')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_done_json_of_another_recipe_does_not_count(tmp_path: Path) -> None:
    """Oracle: the held-out loss of the step's own evaluation, 6.25 - 12 / 100."""
    run = write_run(tmp_path / "run", recipe_of())
    write_json(run / "done.json", {"step": 12, "recipe_sha256": "another", "val_loss": 0.1})
    facts = read_facts(run, recipe_of(), run / "checkpoints" / "step-00000012")
    assert facts.held_out["loss"] == pytest.approx(6.13)
