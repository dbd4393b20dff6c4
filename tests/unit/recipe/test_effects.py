"""Settings and flags that have no effect: what can only be a mistake is refused, what may be meant is told once."""

import json
from pathlib import Path
from typing import get_args

import pytest

from ds_slm.errors import ConfigError, RecipeError
from ds_slm.recipe import effects, loading
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.run import folder
from ds_slm.train import unused_flags
from ds_slm.train.task import Options
from tests.support.assistants import ds_slm
from tests.support.runs import TINY

HUB = 'kind = "hub"\nid = "a/b"'
WSD = 'kind = "wsd"\ndecay_start_step = 10\ndecay_steps = 10'
CL100K = 'kind = "cl100k"\nvocab_size = 100277\neos_token = "<|endoftext|>"'


def tiny(*changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> Recipe:
    """The tiny recipe with pieces of its text replaced, each of which must be there."""
    text = TINY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return loading.parse(text, list(overrides))


@pytest.mark.parametrize("name", loading.library_names())
def test_recipes_of_the_library_are_silent(name: str) -> None:
    """Oracle: recipes that are meant as they are; also once a run has recorded them, with all defaults written out."""
    recipe = loading.load(name)
    assert effects.warnings(recipe) == []
    assert effects.warnings(loading.parse(loading.to_toml(recipe), recorded=True)) == []


FILES = 'kind = "files"\npath = "CORPUS"'
MISTAKES = {
    "the only step at rate 0": ([], ["train.steps=1", "schedule.warmup_steps=1"], "the only step runs at a learning"),
    "an id under files": ([(FILES, f'{FILES}\nid = "a/b"')], [], "id = 'a/b' of source 'generated' is not read"),
    "a config under files": ([(FILES, f'{FILES}\nconfig = "c"')], [], "config = 'c' of source"),
    "a revision under files": ([(FILES, f'{FILES}\nrevision = "main"')], [], "revision = 'main' of source"),
    "a dtype under files": ([(FILES, f'{FILES}\ndtype = "uint16"')], [], "dtype = 'uint16' of source"),
    "a path under hub": ([(FILES, f'{HUB}\npath = "x"')], [], "path = 'x' of source 'generated' is not read"),
    "a path under builtin": ([(FILES, 'kind = "builtin"\npath = "x"')], [], "path = 'x'"),
    "an id beside a path": ([(FILES, 'kind = "tokens"\npath = "x"\nid = "a/b"')], [], "'tokens' beside path"),
    "a config of token files": (
        [(FILES, 'kind = "tokens"\nid = "a/b"\nconfig = "c"')],
        [],
        "config = 'c' of source 'generated' is not read under kind = 'tokens': take it out",
    ),
    "a tokenizer's path under bpe": ([], ["tokenizer.path=somewhere"], "tokenizer.path = 'somewhere' is not read"),
    "a warm-up from above": ([], ["schedule.warmup_start_lr=1.0"], "warmup_start_lr = 1.0 exceeds optimizer.lr"),
    "a Llama of odd heads": (
        [],
        ["model.hidden_size=30", "model.num_attention_heads=4", "model.qk_norm=false"],
        "hidden_size = 30 is not a",
    ),
    "an end above the peak": ([], ["optimizer.min_lr=1.0"], "min_lr = 1.0 exceeds optimizer.lr"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_can_only_be_a_mistake_is_refused(mistake: str) -> None:
    """Oracle: the field, its value and the way out, in the same error as every other problem."""
    changes, overrides, told = MISTAKES[mistake]
    with pytest.raises(RecipeError) as caught:
        tiny(*changes, overrides=(*overrides, "eval.limit=x"))
    assert told in str(caught.value) and "eval.limit" in str(caught.value)


def test_a_run_that_was_begun_with_a_mistake_goes_on(tmp_path: Path) -> None:
    """Oracle: refused without a run folder, told with one; the run folder's own recipe is read as well."""
    text = TINY.replace(FILES, f'{FILES}\nid = "a/b"')
    (tmp_path / "old.toml").write_text(text)
    run = tmp_path / "run"
    with pytest.raises(RecipeError, match="is not read"):
        loading.load(str(tmp_path / "old.toml"), run=run)
    run.mkdir()
    recorded = loading.parse(text, recorded=True)
    (run / "recipe.toml").write_text(loading.to_toml(recorded))
    loaded = loading.load(str(tmp_path / "old.toml"), run=run)
    folder.refuse_foreign(run, loaded, "auto", allow_change=False)
    assert loaded == recorded == loading.load_recorded(run)
    assert ["id = 'a/b' of source 'generated' is not read" in line for line in effects.warnings(loaded)] == [True]


TARGET = '[[targets]]\nmetric = "loss"\npublished = 1.0\nsource = "x"\nstep = {step}\n'
WARNINGS = {
    "warm-up to the end": ([], ["schedule.warmup_steps=20"], ["warmup_steps = 20 does not end before"]),
    "a start without a warm-up": ([("warmup_steps = 4", "warmup_start_lr = 1e-4")], [], ["warmup_start_lr has no"]),
    "decay under cosine": (
        [],
        ["schedule.decay_start_step=10", "schedule.decay_steps=5", "schedule.decay_shape=linear"],
        ["decay_shape = 'linear'", "decay_start_step = 10", "decay_steps = 5"],
    ),
    "decay beyond the end": ([('kind = "cosine"', WSD)], ["schedule.decay_steps=11"], ["ends at step 21, beyond"]),
    "decay never begins": ([('kind = "cosine"', WSD)], ["train.steps=10"], ["never decays"]),
    "a decay of the step behind the last": (
        [('kind = "cosine"', WSD)],
        ["schedule.decay_start_step=19", "schedule.decay_steps=1"],
        ["decay_steps = 1 from step 19 on: the last of train.steps = 20 runs at the peak of 0.003"],
    ),
    "no decay after the warm-up": ([], ["schedule.warmup_steps=19"], ["warmup_steps = 19 of train.steps = 20"]),
    "an end at the peak": ([], ["optimizer.min_lr=3e-3"], ["optimizer.min_lr = 0.003 is optimizer.lr"]),
    "a target beyond the end": (
        [("[eval]", "".join(TARGET.format(step=step) for step in (20, 21)) + "[eval]")],
        [],
        ["'loss' was measured at step 21, beyond train.steps = 20"],
    ),
    "a column of builtin text": (
        [(FILES, 'kind = "builtin"\ncolumn = "a"')], [], ["column of source 'generated' has no effect under kind = 'b"]
    ),
    "bits under adamw": ([], ["optimizer.embedding_bits=8"], ["embedding_bits = 8 has no effect"]),
    "no tasks": ([], ["eval.limit=9", "eval.every_steps=5"], ["eval.every_steps has no", "eval.limit has no"]),
    "evaluations beyond the end": ([], ["run.eval_every_steps=21"], ["run.eval_every_steps = 21 is more than"]),
    "saves beyond the end": ([], ["run.save_every_steps=21"], ["run.save_every_steps = 21 is more than"]),
    "records beyond the end": ([], ["run.log_every_steps=21"], ["run.log_every_steps = 21 is more than"]),
    "no best": ([], ["run.eval_every_steps=7", "run.save_every_steps=3"], ["run.keep_best has no effect"]),
    "a column of tokens": (
        [(FILES, 'kind = "tokens"\npath = "x"\ncolumn = "a"\nsplit = "b"')],
        ["data.held_out=draw", "data.split_seed=3"],
        ["data.held_out", "data.split_seed", "column of source", "split of source"],
    ),
    "training of a tokenizer that is not trained": (
        [("vocab_size = 320", "vocab_size = 100352"), ('kind = "bpe"\nvocab_size = 320', CL100K),
         ('special_tokens = { "<|endoftext|>" = 0, "<|pad|>" = 1 }\npad_token = "<|pad|>"', "")],
        ["tokenizer.min_frequency=3", "tokenizer.documents_per_weight=9", "data.source.0.weight=2"],
        ["weight = 2 of source", "documents_per_weight has no", "min_frequency has no"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_what_may_be_meant_is_told(case: str) -> None:
    """Oracle: one line for each key, by hand; the tiny recipe itself is silent."""
    changes, overrides, told = WARNINGS[case]
    lines = effects.warnings(tiny(*changes, overrides=tuple(overrides)))
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True)), lines
    assert effects.warnings(tiny()) == []


def test_the_last_rate_that_is_told_is_the_schedule_s() -> None:
    """Oracle: the schedule's own formula at the last step."""
    recipe = tiny(('kind = "cosine"', WSD), overrides=("schedule.decay_steps=40",))
    [line] = effects.warnings(recipe)
    assert f"at a learning rate of {learning_rate(recipe, 19):g}" in line


def test_plan_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a line for people, the same in the one JSON object."""
    assert ds_slm("plan", "demo", "--set", "eval.every_steps=5", monkeypatch=monkeypatch) == 0
    assert "warning: eval.every_steps has no effect" in capsys.readouterr().out
    assert ds_slm("plan", "demo", "--set", "eval.every_steps=5", "--json", monkeypatch=monkeypatch) == 0
    assert ["eval.every_steps" in line for line in json.loads(capsys.readouterr().out)["warnings"]] == [True]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.steps=10", "train.steps=20"], "--set train.steps: given twice, as 10 and as train.steps=20"),
        (["data.source.0.weight=2", "data.source=[]"], "--set data.source.0.weight: given twice"),
    ],
)
def test_an_override_that_another_takes_back_is_refused(overrides: list[str], told: str) -> None:
    """Oracle: both are named. The same value twice changes nothing, and is no mistake."""
    with pytest.raises(RecipeError) as caught:
        tiny(overrides=tuple(overrides))
    assert told in str(caught.value)
    assert tiny(overrides=("train.steps=30", "train.steps = 30")).train.steps == 30


def options(**given: object) -> Options:
    return Options(run_dir=Path("run"), ds_config=Path("x.json"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_steps": 21}, "--max-steps 21 has no effect"),
        ({"profile": range(19, 25)}, "--profile 19:24: this launch ends after step 20"),
        ({"max_steps": 1}, "--max-steps 1: the first step of the warm-up runs at a learning rate of 0"),
        ({"micro_batch": 5}, "--micro-batch 5: a device has no more than 4 rows of a step's 7"),
    ],
)
def test_flags_without_an_effect_are_told(given: dict[str, object], told: str) -> None:
    """Oracle: by hand, on two ranks: 20 steps of 7 rows; nothing is said of flags that have one."""
    [line] = unused_flags.warnings(tiny(), options(**given), world_size=2, keeping_hosts=1, held_out_rows=6)
    assert told in line
    used = {"max_steps": 20, "profile": range(19, 21), "micro_batch": 4}
    assert not list(unused_flags.warnings(tiny(), options(**used), world_size=2, keeping_hosts=1, held_out_rows=6))


def test_more_rows_to_evaluate_than_are_held_out_are_told() -> None:
    """Oracle: the tiny recipe asks for 6; a default that is more than there are is silent."""
    [line] = unused_flags.warnings(tiny(), options(), 1, keeping_hosts=1, held_out_rows=5)
    assert line == "run.eval_rows = 6: there are only 5 held-out rows"
    assert not list(
        unused_flags.warnings(tiny(("eval_rows = 6\n", "")), options(), 1, keeping_hosts=1, held_out_rows=5)
    )


@pytest.mark.parametrize("name", ["demo-instruct", "axiom-380m-instruct", "smol-smoltalk-packed"])
def test_recipes_of_conversations_are_silent(name: str) -> None:
    """Oracle: their columns are those of the files that `--source` puts in a built-in source's place."""
    assert effects.warnings(loading.load(name)) == []


def test_copies_that_no_host_can_keep_are_told() -> None:
    """Oracle: only where they were asked for: the default of two is silent on one host."""
    assert not list(unused_flags.warnings(tiny(), options(), 1, keeping_hosts=1, held_out_rows=6))
    recipe = tiny(overrides=("run.checkpoint_copies=3",))
    assert "only 2 hosts have" in next(unused_flags.warnings(recipe, options(), 4, keeping_hosts=2, held_out_rows=6))


@pytest.mark.parametrize("given", [{"profile": range(21, 23)}, {"profile": range(6, 8), "max_steps": 5}])
def test_a_profile_of_steps_that_are_never_taken_is_refused(given: dict[str, object]) -> None:
    """Oracle: steps beyond the recipe's end, and beyond --max-steps."""
    with pytest.raises(ConfigError, match=r"this launch ends after step (20|5)"):
        unused_flags.refuse(tiny(), options(**given))


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Oracle: the same recipe without it."""
    (tmp_path / "marked.toml").write_text(TINY, encoding="utf-8-sig")
    assert (tmp_path / "marked.toml").read_bytes().startswith(b"\xef\xbb\xbf")
    assert loading.load(str(tmp_path / "marked.toml")) == tiny()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["prepare", "demo", "--verify", "--max-tokens", "5"], "--verify only reads"),
        (["prepare", "demo", "--verify", "--source", "a=b"], "--verify only reads"),
        (["verify", "run", "--resume", "--replay", "3"], "ask for one at a time"),
        (["verify", "run", "--rows", "--replay", "3"], "ask for one at a time"),
    ],
)
def test_flags_of_which_one_would_be_ignored_are_refused(
    command: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 and the sentence."""
    assert ds_slm(*command, monkeypatch=monkeypatch) == 2
    assert told in capsys.readouterr().err


def test_every_kind_of_source_says_what_it_is_read_from() -> None:
    """Oracle: the kinds that a recipe may name."""
    assert effects.READ_FROM.keys() == set(get_args(Source.model_fields["kind"].annotation))
