"""Recipes: the library, overrides, bad input, identity, and the learning rate."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.errors import RecipeError
from ds_slm.recipe import loading, resume_rules
from ds_slm.recipe.schedule import learning_rate
from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Schedule

EXAMPLE = """
[card]
name = "example"
[model]
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 3
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 32
vocab_size = 4096
max_position_embeddings = 256
[tokenizer]
kind = "bpe"
vocab_size = 4096
special_tokens = { "<|endoftext|>" = 0, "<|pad|>" = 1 }
pad_token = "<|pad|>"
[data]
seq_len = 256
[[data.source]]
name = "documentation"
kind = "builtin"
weight = 1
[optimizer]
name = "adamw8bit"
lr = 4e-3
min_lr = 4e-4
[schedule]
kind = "wsd"
warmup_steps = 10
decay_start_step = 70
decay_steps = 30
[train]
global_batch_tokens = 16_384
steps = 100
gradient_checkpointing = true
[eval]
prompts = ["The function returns"]
"""
LIBRARY = ("demo", "ant-10m", "axiom-380m", "gpt-s-1.4m", "slm-10m", "slm-124m")


def problems_of(text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as raised:
        loading.parse(text, overrides)
    return "\n".join(raised.value.problems)


def example(*overrides: str) -> Recipe:
    return loading.parse(EXAMPLE, list(overrides))


def test_library_names() -> None:
    """Oracle: the six recipes the project promises, then those of fine-tuning."""
    assert tuple(loading.library_names()) == (*LIBRARY, "demo-instruct", "axiom-380m-instruct", "smol-smoltalk-packed")


@pytest.mark.parametrize("name", LIBRARY)
def test_round_trip_through_toml(name: str) -> None:
    """Oracle: the recipe itself; what is written reads back equal, and so does what is written again."""
    recipe = loading.load(name)
    again = loading.parse(loading.to_toml(recipe))
    assert again == recipe
    assert again.identity_sha256() == recipe.identity_sha256()
    assert loading.to_toml(again) == loading.to_toml(recipe)


@pytest.mark.parametrize(
    ("name", "tokens_per_step", "steps", "tokens"),
    [
        ("slm-10m", 32 * 16 * 1024, 47_683, 25e9),
        ("gpt-s-1.4m", 256 * 384 * 3, 20_345, 6e9),
        ("ant-10m", 2424 * 1024, 1200, 2_979_215_382),
        ("slm-124m", 256 * 1024, 37_920, 9_940_492_288),
        ("axiom-380m", 320 * 1024, 24_414, 8e9),
    ],
)
def test_batches_are_the_cards(name: str, tokens_per_step: int, steps: int, tokens: float) -> None:
    """Oracle: batch, steps and tokens as the cards state them, to a step's worth of tokens and 0.05 %."""
    recipe = loading.load(name)
    assert recipe.train.global_batch_tokens == tokens_per_step
    assert recipe.train.steps == steps
    assert recipe.train.steps * recipe.train.global_batch_tokens == pytest.approx(tokens, rel=5e-4)


@pytest.mark.parametrize("name", LIBRARY)
def test_every_number_has_a_source(name: str) -> None:
    """Oracle: the design; what is published says where, what is not says why."""
    recipe = loading.load(name)
    assert all(target.source for target in recipe.targets)
    if name != "demo":
        sections = {place.partition(".")[0] for place in (*recipe.card.sources, *recipe.unstated)}
        assert sections >= {"model", "tokenizer", "data", "optimizer", "schedule", "train"}
        assert recipe.targets


def test_alternative_mix_of_slm_10m() -> None:
    """Oracle: 78.8 / 16.2 / 2.5 / 2.5 %, what the authors' loader drew; the flags are the ones the recipe prints."""
    flags = re.findall(r"--set (data\.source\.\S+)", loading.recipe_path("slm-10m").read_text(encoding="utf-8"))
    weights = [source.weight for source in loading.load("slm-10m", flags).data.source]
    assert [weight / sum(weights) for weight in weights] == [0.788, 0.162, 0.025, 0.025]
    assert [source.weight for source in loading.load("slm-10m").data.source] == [55, 25, 10, 10]


def test_overrides() -> None:
    """Oracle: TOML's own reading of the value; a bare word is a string."""
    recipe = example(
        "train.precision=fp32",
        "optimizer.lr=1e-3",
        "optimizer.betas=[0.8, 0.9]",
        "eval.prompts=['a=b']",
        "sft.packing=false",
        "tokenizer.special_tokens.<|im_start|>=2",
    )
    assert recipe.tokenizer.special_tokens["<|im_start|>"] == 2
    assert recipe.train.precision == "fp32"
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.eval.prompts == ["a=b"]
    assert recipe.sft is not None
    assert not recipe.sft.packing


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stpes=3", "the nearest is 'train.steps'"),
        ("train.lr=3", "the nearest is 'optimizer.lr'"),
        ("modle.hidden_size=3", "the nearest is 'model.hidden_size'"),
        ("data.source.0.wieght=3", "the nearest is 'data.source.weight'"),
        ("data.source.7.weight=3", "no table data.source.7"),
        ("data.source.weight=3", "no table data.source"),
        ("train.steps.more=3", "no such field"),
        ("steps=3", "expected section.key=value"),
        ("train.steps", "expected section.key=value"),
        ("train.steps=many", "got 'many'; input should be a valid integer"),
        ("train.steps=-1", "greater than 0"),
        ("train.steps=true", "valid integer"),
        ("optimizer.lr=nan", "finite"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1"),
        ("train.precision=fp8", "'bf16', 'fp16' or 'fp32'"),
        ("data.source.0.path=caf\udce9", "no UTF-8"),
    ],
)
def test_bad_overrides(override: str, expected: str) -> None:
    """Oracle: the message names the field and the way out."""
    assert expected in problems_of(EXAMPLE, [override])


def test_all_problems_at_once() -> None:
    """Oracle: seven independent mistakes, each told once, none of them hiding another."""
    text = EXAMPLE
    for good, bad in {
        "[model]": "[modle]",
        "hidden_size = 192": "hiden_size = 192",
        "num_key_value_heads = 2": "num_key_value_heads = 4",
        "global_batch_tokens = 16_384": "global_batch_tokens = 16_385",
        "weight = 1\n": "wieght = 1\n",
        "lr = 4e-3": 'lr = "4e-3"',
        "steps = 100": "steps = 100\nlearning_speed = 1",
    }.items():
        assert good in text
        text = text.replace(good, bad)
    problems = problems_of(text).splitlines()
    assert "modle: unknown key; the nearest is 'model'." in problems
    assert "model.hiden_size: unknown key; the nearest is 'model.hidden_size'." in problems
    assert "data.source.0.wieght: unknown key; the nearest is 'data.source.weight'." in problems
    assert any("num_attention_heads = 6" in problem and "num_key_value_heads = 4" in problem for problem in problems)
    assert any("16385 cannot be split" in problem and "use 16384 or 16640" in problem for problem in problems)
    assert any(problem.startswith("optimizer.lr: got '4e-3'") for problem in problems)
    assert "train.learning_speed: unknown key." in problems
    assert len(problems) == 8  # and the heading


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ("head_dim = 32", "head_dim = 33", "head_dim = 33 is odd"),
        ("seq_len = 256", "seq_len = 512", "longer than model.max_position_embeddings = 256"),
        ("vocab_size = 4096", "vocab_size = 257", "too small for byte-level BPE"),
        ('"<|pad|>" = 1', '"<|pad|>" = 0', "two tokens have the same id"),
        ('"<|pad|>" = 1', '"<|pad|>" = 4096', "lies outside 0..4095"),
        ('pad_token = "<|pad|>"', 'pad_token = "<|padding|>"', "none of special_tokens"),
        ("decay_steps = 30\n", "", "needs decay_start_step and decay_steps"),
        ("warmup_steps = 10", "warmup_steps = 99", "comes before warmup_steps = 99 is over"),
        ("min_lr = 4e-4", "min_lr = 4e-2", "exceeds optimizer.lr"),
        ('kind = "builtin"', 'kind = "hub"', "names no id"),
        ('name = "documentation"', 'name = "The Docs"', "data.source.0.name"),
        ('name = "documentation"', 'name = "tokenizer"', "the tokenizer's folder"),
        ('name = "documentation"', 'name = "tokenizer.tmp"', "the tokenizer's folder"),
        ('name = "documentation"', 'name = "docs"\nsplit = ""', "data.source.0.split"),
        ("[eval]", '[unstated]\n"model.theta" = "why"\n[eval]', "the nearest is 'model.rope_theta'"),
        ("[card]", "[card", "is not TOML"),
    ],
)
def test_bad_recipes(good: str, bad: str, expected: str) -> None:
    """Oracle: the message names what is wrong."""
    assert good in EXAMPLE
    assert expected in problems_of(EXAMPLE.replace(good, bad))


def test_unknown_recipe(tmp_path: Path) -> None:
    """Oracle: the nearest name in the library, and all of them."""
    with pytest.raises(RecipeError, match=r"the nearest is 'slm-10m'.*gpt-s-1\.4m"):
        loading.load("slm10m")
    with pytest.raises(RecipeError, match="no such recipe"):
        loading.load(str(tmp_path / "missing.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        loading.load(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    "override",
    ["run.keep_last=9", "eval.prompts=['x']", "train.gradient_checkpointing=false", "card.name='x'"],
)
def test_identity_ignores_what_changes_no_result(override: str) -> None:
    """Oracle: the design's list of what is never hashed."""
    assert example(override).identity_sha256() == example().identity_sha256()


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=216",
        "model.rope_theta=2500.0",
        "tokenizer.min_frequency=3",
        "data.split_seed=1",
        "data.source.0.weight=2",
        "optimizer.lr=1e-3",
        "optimizer.name=adamw",
        "schedule.decay_start_step=71",
        "train.steps=101",
        "train.seed=1",
        "train.last_batch=drop",
        "sft.mask=card",
    ],
)
def test_identity_follows_the_result(override: str) -> None:
    """Oracle: the design; any of these trains another model."""
    assert example(override).identity_sha256() != example().identity_sha256()


def test_changes_on_resume() -> None:
    """Oracle: the design's list of what may change when a run is resumed."""
    old = example()
    free = ["train.steps=200", "schedule.decay_start_step=170", "run.keep_last=9", "optimizer.name=adamw"]
    assert resume_rules.refused_changes(old, example(*free), allow_change=False) == []
    new = example("optimizer.lr=1e-3", "train.seed=1", "data.source.0.weight=2", "sft.mask=card")
    sft = {"sft.mask", "sft.packing", "sft.system_turns", "sft.invalid"}
    assert set(resume_rules.changes(old, new)) == {"optimizer.lr", "train.seed", "data.source", *sft}
    refused = "\n".join(resume_rules.refused_changes(old, new, allow_change=False))
    assert "optimizer.lr was 0.004 and is now 0.001 (--allow-change permits it)." in refused
    permitted = "\n".join(resume_rules.refused_changes(old, new, allow_change=True))
    assert "optimizer.lr" not in permitted
    assert "train.seed" in permitted
    assert "data.source was [{'name': " in refused and "'id': None" not in refused
    assert "data.source" in permitted


def test_schedule_of_slm_124m() -> None:
    """Oracle: the card's last learning rate, 1.086e-12; further digits from (1 - cos pi x) / 2 = (pi x / 2)^2."""
    recipe = loading.load("slm-124m")
    assert learning_rate(recipe, 37_919) == pytest.approx(1.08609e-12, rel=1e-5)
    assert learning_rate(recipe, 37_919) == pytest.approx(6e-4 * (math.pi / 36_920 / 2) ** 2, rel=1e-6)
    assert learning_rate(recipe, 0) == 0.0
    assert learning_rate(recipe, 500) == pytest.approx(3e-4)


def test_schedule_of_ant_10m() -> None:
    """Oracle: the card's peak, 4e-4 at step 200. Its other printed rates fit no linear warmup and cosine."""
    recipe = loading.load("ant-10m")
    rates = [learning_rate(recipe, step) for step in range(recipe.train.steps)]
    assert max(rates) == rates[200] == 4e-4
    assert learning_rate(recipe, recipe.train.steps) == pytest.approx(4e-5)


def axiom_instruct(decay_steps: int) -> Recipe:
    """The published fine-tuning's schedule on the base model's recipe."""
    return loading.load(
        "axiom-380m",
        [
            "optimizer.lr=3e-4",
            "optimizer.min_lr=3e-5",
            "schedule.warmup_steps=51",
            "schedule.warmup_start_lr=1.5e-4",
            "schedule.decay_start_step=539",
            f"schedule.decay_steps={decay_steps}",
            "train.steps=641",
        ],
    )


def test_schedule_of_axiom_380m_instruct() -> None:
    """Oracle: the published log, 2.99937e-4 at step 540 and 3.02511e-5 at 640; 102 decay steps would not fit."""
    recipe = axiom_instruct(103)
    assert learning_rate(recipe, 0) == 1.5e-4
    assert learning_rate(recipe, 51) == learning_rate(recipe, 538) == 3e-4
    assert learning_rate(recipe, 540) == pytest.approx(2.99937e-4, abs=5e-10)
    assert learning_rate(recipe, 640) == pytest.approx(3.02511e-5, abs=5e-11)
    assert learning_rate(axiom_instruct(102), 640) != pytest.approx(3.02511e-5, abs=5e-11)


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("slm-10m", 500, 1.5e-3),
        ("slm-10m", 1000, 3e-3),
        ("slm-10m", 40_531, 3e-3),
        ("slm-10m", 40_531 + 7152 // 2, 1.65e-3),
        ("slm-10m", 47_683, 3e-4),
        ("gpt-s-1.4m", 16_276, 3.5e-3),
        ("gpt-s-1.4m", 16_276 + 4069 / 4, 3.5e-3 * 3 / 4),
        ("gpt-s-1.4m", 20_345, 0.0),
        ("axiom-380m", 21_973, 3e-4),
        ("axiom-380m", 24_414, 1e-5),
        ("axiom-380m", 99_999, 1e-5),
    ],
)
def test_warmup_stable_decay(name: str, step: int, rate: float) -> None:
    """Oracle: the peaks, floors and corners the cards state, and the middle of each shape by hand."""
    assert learning_rate(loading.load(name), step) == pytest.approx(rate, rel=1e-9)


@given(
    kind=st.sampled_from(get_args(Schedule.model_fields["kind"].annotation)),
    shape=st.sampled_from(["cosine", "linear"]),
    warmup=st.integers(0, 30),
    stable=st.integers(0, 30),
    decay=st.integers(1, 40),
)
def test_any_schedule_rises_then_falls(kind: str, shape: str, warmup: int, stable: int, decay: int) -> None:
    """Oracle: what every such schedule is; up to the peak, never above it, down to the floor, and never jumping."""
    start, steps = warmup + stable, warmup + stable + decay
    overrides = [f"schedule.kind={kind}", f"schedule.decay_shape={shape}", f"schedule.warmup_steps={warmup}"]
    overrides += [f"schedule.decay_start_step={start}", f"schedule.decay_steps={decay}", f"train.steps={steps}"]
    recipe = example(*overrides)
    peak, floor = recipe.optimizer.lr, recipe.optimizer.min_lr
    rates = [learning_rate(recipe, step) for step in range(steps + 2)]
    assert max(rates) == rates[warmup] == peak
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == rates[-2] == pytest.approx(floor)
    falling = decay if kind == "wsd" else stable + decay
    assert all(one - two <= (peak - floor) * 1.6 / falling for one, two in pairwise(rates[warmup:]))
