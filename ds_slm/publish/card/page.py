"""The model card, README.md: what the model is, what was measured, and how to make it again.

    run folder, checkpoint --describe--> README.md and its pictures
    RunFacts, eval.json    --write_card--> YAML head, glance, use, results, architecture, data, training, what the
                                           original left open, the way to make it again, limits, licence

Everything comes from the files of the run: nothing is measured here, no clock is read, and no path of the machine is
shown. A missing figure is left out, or marked as missing if there is a published one.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_slm.data.tokenizers.tokenizer import IM_END
from ds_slm.model.hf import hf_config
from ds_slm.publish.card import devices, plots, training
from ds_slm.publish.card.facts import RunFacts, read_facts
from ds_slm.publish.card.header import HubDataset, card_data
from ds_slm.publish.card.limits import limits
from ds_slm.publish.card.markdown import code, code_block, in_words, number, plain, table, times
from ds_slm.publish.card.rerun import rerun
from ds_slm.publish.card.training import OF_TRAINING
from ds_slm.publish.curves import is_number
from ds_slm.recipe.counts import parameter_counts, parameters
from ds_slm.recipe.hub_names import language_name
from ds_slm.recipe.schema import Recipe
from ds_slm.run.scores import ARITHMARK, CONFIDENCE, DOCUMENTATION, LEADERBOARD, Row, of_weights, rows_of

README = "README.md"
NEW_TOKENS = 60
"""The most new tokens for which the snippet asks."""


@dataclass(frozen=True)
class Page:
    """What a card says in addition to the facts of its run."""

    title: str
    """The model's name."""
    model_id: str
    """What the snippet loads: the folder's name, or the repository's id."""
    dtype: str = "float32"
    """The type of the stored weights."""
    scored: Mapping[str, Any] = field(default_factory=dict)
    """eval.json of these weights; empty if they were not scored."""
    datasets: Mapping[str, HubDataset] = field(default_factory=dict)
    """Benchmark -> its dataset on the hub."""
    gguf: str | None = None
    """The name of the file for llama.cpp beside the card, if there is one."""


def describe(run: Path, checkpoint: Path, recipe: Recipe, page: Page) -> dict[str, bytes]:
    """The files that describe an exported checkpoint, by name: README.md and its pictures.

    Args:
        run: the run folder.
        checkpoint: one of its checkpoints, verified.
        recipe: the run's recipe, whose card may say more than the recorded one.
        page: what the run does not say; its `scored` is read here.

    Raises:
        DataError: eval.json is damaged.
        RecipeError: a source has an id that no dataset of the hub can have.
    """
    facts = read_facts(run, recipe, checkpoint)
    page = replace(page, scored=of_weights(run, facts.weights_sha256))
    return {README: write_card(facts, page).encode(), **plots.draw(facts)}


def write_card(facts: RunFacts, page: Page) -> str:
    """The whole text of README.md.

    Raises:
        RecipeError: a source has an id that no dataset of the hub can have.
    """
    head = card_data(facts, page.title, page.scored, page.datasets).to_yaml()
    sections = {
        "": _glance(facts, page),
        "Use": _use(facts, page),
        "What it writes": _samples(facts),
        "Results": _results(facts, page),
        "Architecture": _architecture(facts),
        "Data": training.data(facts),
        "Training": [*training.training(facts), *plots.figures(facts)],
        "What the original left open": _left_open(facts),
        "Make it again": rerun(facts),
        "Limits": limits(facts, page.scored),
        "Licence": _licence(facts),
    }

    body = [f"# {plain(page.title)}"]
    for title, paragraphs in sections.items():
        body += [f"## {title}", *paragraphs] if title and paragraphs else paragraphs
    return f"---\n{head}\n---\n\n" + "\n\n".join(body) + "\n"


def _glance(facts: RunFacts, page: Page) -> list[str]:
    """What the model is, in one paragraph and one table."""
    recipe, count = facts.recipe, parameters(facts.recipe.model)
    size = f"{in_words(count)} parameters"
    base = code(facts.base_name) if facts.base_name else "a base model"
    if recipe.sft is None:
        begun = f"trained further from {base}" if facts.has_base else "trained from scratch"
        what = f"A language model of {size}, {begun} on {in_words(facts.tokens)} tokens"
    else:
        count_told = (facts.environment.get("rows") or {}).get("train", {}).get("conversations")
        conversations = f"{count_told:,} conversations" if count_told else "conversations"
        what = f"A chat model of {size}, fine-tuned from {base} on {conversations}"
    is_from_recipe_alone = recipe.sft is not None or not facts.has_base
    reproduces = recipe.card.reproduces.rstrip(".") if is_from_recipe_alone else ""
    about = f" It reproduces {plain(reproduces)}." if reproduces else ""
    text = (
        f"{what} with ds_slm.{about} Every figure on this page was read from the files of its run; what was not "
        "measured says so."
    )

    held_out = facts.held_out
    losses = {"loss": "{:.4f} nats a token", "perplexity": "perplexity {:.4g}", "bits_per_byte": "{:.4f} bits per byte"}
    told = [form.format(held_out[key]) for key, form in losses.items() if is_number(held_out.get(key))]
    rows = {
        "Parameters": f"{count:,}, stored in {page.dtype}",
        "Context": f"{recipe.model.max_position_embeddings:,} tokens",
        "Vocabulary": f"{recipe.tokenizer.vocab_size:,} tokens",
        "Language": ", ".join(map(language_name, recipe.card.language)),
        "Training": f"{facts.step:,} steps, {facts.tokens:,} {'tokens' if recipe.sft is None else 'target tokens'}",
        "Held-out loss": ", ".join(filter(None, [*told, facts.of_held_out if told else ""])),
        "Hardware": devices.hardware(facts),
    }
    glance = table(("", ""), [row for row in rows.items() if row[1]])

    if facts.is_finished:
        return [text, glance]
    return [
        text,
        f"> These are the weights after step {facts.step:,}; the recipe takes {recipe.train.steps:,}.",
        glance,
    ]


def _use(facts: RunFacts, page: Page) -> list[str]:
    """A snippet that runs unchanged."""
    recipe = facts.recipe
    prompt = next((one for one in recipe.eval.prompts if one.strip()), "Once upon a time")
    most = min(NEW_TOKENS, recipe.model.max_position_embeddings // 2)
    remote = ", trust_remote_code=True" if recipe.model.exclusive_attention else ""
    as_stored = ', dtype="auto"' if page.dtype != "float32" else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {_literal(page.model_id)}  # this folder, or its name on the hub",
        f"tokenizer = AutoTokenizer.from_pretrained(name{remote})",
        f"model = AutoModelForCausalLM.from_pretrained(name{remote}{as_stored})",
        "",
    ]

    if recipe.sft is None:
        lines += [
            f'inputs = tokenizer({_literal(prompt)}, return_tensors="pt", return_token_type_ids=False)',
            f"output = model.generate(**inputs, max_new_tokens={most}, do_sample=True, temperature=0.7, top_p=0.9)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        lines += [
            f'messages = [{{"role": "user", "content": {_literal(prompt)}}}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
            f"output = model.generate(**inputs, max_new_tokens={most})",
            'answer = output[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    told = [code_block("\n".join(lines), "python")]
    if page.gguf:
        told += [
            "The same model and tokenizer as one file, for llama.cpp and the programs that are built on it:",
            code_block(_llama_command(page.gguf, recipe, prompt), "bash"),
        ]
    return told


def _llama_command(file: str, recipe: Recipe, prompt: str) -> str:
    """The command of llama.cpp for a conversation with an assistant, or for a text that a base continues."""
    if recipe.sft is not None:
        return f"llama-cli -m {shlex.quote(file)}"
    return f"llama-completion -m {shlex.quote(file)} -p {shlex.quote(prompt)}"


def _samples(facts: RunFacts) -> list[str]:
    """The run's samples with these weights, which nobody selected."""
    if not facts.samples:
        return []
    if facts.recipe.sft is None:
        texts = [f"{prompt}{text}" for prompt, text in facts.samples.items()]
    else:
        texts = [
            f"user: {prompt}\nassistant: {text.removesuffix(IM_END).strip()}" for prompt, text in facts.samples.items()
        ]
    return [
        "Sampled by the run itself with these weights, and not selected.",
        *(code_block(text, "text") for text in texts),
    ]


def _literal(text: str) -> str:
    """A string of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _results(facts: RunFacts, page: Page) -> list[str]:
    """Published beside ours, for the benchmarks."""
    recipe, scored = facts.recipe, page.scored
    rows = rows_of(scored, recipe) if scored else []

    # Figures that the original publishes and that nobody has scored for this model.
    shown = {f"{row.task}/{row.metric}" for row in rows} | {LEADERBOARD for row in rows if row.task == "leaderboard"}
    missing = [
        target
        for target in recipe.targets
        if target.metric.partition("/")[0] not in OF_TRAINING and target.metric not in shown
    ]
    if not rows and not missing:
        return ["This model was not scored on any benchmark."]

    cells = [_result_cells(row) for row in rows]
    for target in missing:
        task, _, metric = target.metric.partition("/")
        cells.append([task, metric, _figure(target.published), "not evaluated", "", "", "", "", ""])
    header = ("benchmark", "metric", "published", "this model", "±", "chance", "bits per byte", "items", "")
    notes = [_how_scored(page, rows)] if rows else ["None of these was scored with this model."]
    return [table(header, cells, right=range(2, 8)), *notes]


def _result_cells(row: Row) -> list[str]:
    figures = (row.published, row.ours, row.plus_minus, row.chance)
    bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
    items = "" if row.items is None else f"{row.items:,}"
    return [row.task, row.metric, *map(_figure, figures), bits, items, row.what]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 1e6 else f"{value:.4g}"


def _how_scored(page: Page, rows: list[Row]) -> str:
    text = (
        f"Accuracies in percent. ± is {CONFIDENCE} standard errors of this model's figure, chance is what guessing "
        "gives, and bits per byte is what the right answers cost this model, in bits for each byte of their text."
    )

    text += " Scored in float32, without examples in the prompt"
    version = page.scored.get("lm_eval")
    text += f", with the tasks of lm-evaluation-harness {version}." if version and _has_harness(rows) else "."
    if any(row.task == DOCUMENTATION for row in rows):
        text += (
            " The questions of `documentation` are made from the documentation of the machine that scores: figures of "
            "two machines do not compare."
        )
    if page.dtype != "float32":
        text += f" The weights of this folder are these, rounded to {page.dtype}."
    return text


def _has_harness(rows: list[Row]) -> bool:
    """Whether a row is of a task of lm-evaluation-harness."""
    return any(row.task not in (DOCUMENTATION, "leaderboard") and ARITHMARK not in row.task for row in rows)


def _architecture(facts: RunFacts) -> list[str]:
    """The decoder's shape."""
    shape, counts = facts.recipe.model, parameter_counts(facts.recipe.model)
    architecture = hf_config(shape, eos_id=None, dtype="float32")["architectures"][0]
    parts = {"embedding": counts.embedding, "head": counts.head, "attention": counts.attention, "MLP": counts.mlp}

    heads = f"{times(shape.num_attention_heads, 'query head')}, {times(shape.num_key_value_heads, 'key-value head')}"
    attention = [f"{heads} of {shape.head_dim}"]
    attention += ["QK-norm"] if shape.qk_norm else []
    attention += ["exclusive (arXiv 2603.09078)"] if shape.exclusive_attention else []

    head = "also the output head" if shape.tie_word_embeddings else "and an output head of its own"
    rows = {
        "Class": f"`{architecture}` {'in this folder' if shape.exclusive_attention else 'of transformers'}",
        "Layers": f"{shape.num_hidden_layers}, of width {shape.hidden_size:,}",
        "Attention": ", ".join(attention),
        "Feed-forward": f"SwiGLU of width {shape.intermediate_size:,}",
        "Positions": f"rotary, θ = {number(shape.rope_theta)}",
        "Normalisation": f"RMSNorm before each part, ε = {number(shape.rms_norm_eps)}",
        "Embedding": f"{shape.vocab_size:,} × {shape.hidden_size:,}, {head}",
        "Parameters": f"{counts.total:,}: " + ", ".join(f"{name} {part:,}" for name, part in parts.items() if part),
    }
    if facts.recipe.card.params is not None:
        rows["Published parameters"] = f"{facts.recipe.card.params:,}"
    return [table(("", ""), list(rows.items()))]


def _left_open(facts: RunFacts) -> list[str]:
    """What the published card does not say, and what the recipe chose."""
    if not facts.recipe.unstated:
        return []
    rows = [(f"`{place}`", plain(choice)) for place, choice in facts.recipe.unstated.items()]
    return ["The published card does not say these; the recipe chose them.", table(("setting", "choice"), rows)]


def _licence(facts: RunFacts) -> list[str]:
    card = facts.recipe.card
    if card.license_name:
        return [f"{plain(card.license_name)}{f': {plain(card.license_link)}' if card.license_link else ''}."]
    return [f"`{card.license}`."] if card.license else ["None is stated."]
