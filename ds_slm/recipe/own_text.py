"""A recipe for a user's own text: another recipe as its base, and the values that depend on the amount of text.

    base recipe, what the text holds --fit--> Fit: batch, steps, rates, each with a sentence --as_toml--> a dozen lines

Sources: up to four epochs repeated text is worth almost the same as new text (arXiv 2305.16264); 20 tokens a parameter
are enough for a model of its size (arXiv 2203.15556); the useful batch grows with about the square root of the tokens
of a run (arXiv 2410.21676); Adam's rate grows with the square root of the batch (arXiv 2205.10287).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ds_slm.errors import DataError
from ds_slm.recipe import loading
from ds_slm.recipe.counts import parameters
from ds_slm.recipe.data_sections import Tokenizer
from ds_slm.recipe.schema import Recipe

EPOCHS = 4
ENOUGH_TOKENS_PER_PARAMETER = 20
LEAST_ROWS, LEAST_STEPS = 16, 100
"""The least rows of a step, and the least steps of a run."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
EVALUATIONS = 20
"""Held-out evaluations of a run; it has half this number of checkpoints."""
SURELY_HELD_OUT = 0.9
"""This share of the held-out rows that a survey finds will be there: its sample only estimates a token's bytes."""


_WHY_ALL = "no file is named for held-out text, so all are read, also those without `train` in their names"


class TooLittleText(DataError):
    """There is less text than a base needs."""


@dataclass(frozen=True)
class Text:
    """The text to train on (`data.survey` reads it)."""

    path: str
    column: str
    documents: int
    """Number of documents that are not empty."""
    text_bytes: int
    """Bytes of the text in UTF-8."""
    learnable_ids: int
    """Size of the vocabulary that a sample of the text gives, at most the base's."""
    bytes_per_token: float
    """Mean bytes of a token in that vocabulary."""
    val_fraction: float
    """The value for `data.val_fraction`."""
    held_out_share: float
    """The share of the bytes that is held out with it."""
    beginnings: tuple[str, ...]
    """The first words of some documents."""
    held_out_documents: int = 0
    """Number of held-out documents; 0 if the end of the only document is held out."""
    split: str = "train"
    """The split that is read: "all" where the files' names are titles."""

    @property
    def train_tokens(self) -> int:
        """The approximate number of tokens to train on."""
        return int(self.text_bytes * (1 - self.held_out_share) / self.bytes_per_token)

    def __str__(self) -> str:
        documents = f"{self.documents:,} document{'s' if self.documents > 1 else ''}"
        return f"{documents}, {self.text_bytes:,} bytes, about {self.train_tokens:,} tokens to train on"


@dataclass(frozen=True)
class Fit:
    """The choices that follow from the text."""

    tokens: int
    """Tokens of the whole run."""
    epochs: float
    tokens_per_parameter: float
    rows: int
    """Rows of one optimiser step."""
    steps: int
    share: float
    """The batch as a share of the base's batch."""


def fit(base: Recipe, text: Text, tokens: int | None = None) -> Fit:
    """Choose the length and the batch of a run.

    Args:
        base: the recipe that is changed.
        text: the text to train on.
        tokens: how many to train on; None takes the base's, but reads no text more than four times.

    Raises:
        TooLittleText: the text is too little for this base.
        DataError: `tokens` are too few for a run.
    """
    asked_for = tokens
    wanted = base.train.steps * base.train.global_batch_tokens
    tokens = tokens or min(wanted, EPOCHS * text.train_tokens)

    # The batch: the base's, or a power of two below it.
    rows = base.rows_per_step
    if tokens < wanted:
        smaller = max(1.0, rows * math.sqrt(tokens / wanted))
        rows = min(rows, max(LEAST_ROWS, 2 ** round(math.log2(smaller))))
    steps = tokens // (rows * base.data.seq_len)

    problems = []
    if base.tokenizer.kind == "bpe" and text.learnable_ids < base.tokenizer.vocab_size:
        problems.append(
            f"the text gives a vocabulary of {text.learnable_ids:,} ids, and {base.tokenizer.vocab_size:,} are asked "
            "for: add text, or take a base with fewer."
        )
    if steps < LEAST_STEPS:
        cut = f"{tokens:,} tokens are {steps:,} steps of {rows} rows of {base.data.seq_len:,}"
        if asked_for and not problems:
            raise DataError(f"--tokens: {cut}: ask for {LEAST_STEPS} steps or more, or leave it out.")
        problems.append(f"{cut}: expected {LEAST_STEPS} or more.")
    if problems:
        raise TooLittleText([f"{text.path}: {text}: too little text.", *problems])

    share = rows / base.rows_per_step
    per_parameter = tokens / parameters(base.model)
    return Fit(tokens, tokens / max(text.train_tokens, 1), per_parameter, rows, steps, share)


def what_fits(text: Text) -> str:
    """A sentence on the largest recipe of the library for which this text is enough."""
    tokens = EPOCHS * text.train_tokens
    sizes = {
        name: parameters(recipe.model) for name in loading.library_names() if (recipe := loading.load(name)).sft is None
    }

    fitting = [name for name, size in sizes.items() if size * ENOUGH_TOKENS_PER_PARAMETER <= tokens]
    smallest = min(sizes, key=lambda name: sizes[name])
    if fitting:
        best = max(fitting, key=lambda name: sizes[name])
        return f"With this much text, read {EPOCHS} times, --from {best} ({sizes[best]:,} parameters) fits."

    needed = sizes[smallest] * ENOUGH_TOKENS_PER_PARAMETER // EPOCHS
    return (
        f"The smallest recipe, --from {smallest} ({sizes[smallest]:,} parameters), asks for some {needed:,} tokens, "
        f"read {EPOCHS} times, to be trained well; fewer give a model that knows its text by heart."
    )


def with_tokenizer_of(run: Path, recipe: Recipe) -> Recipe:
    """A run's recipe for another text, with the tokenizer of its model, which is not trained again."""
    ours = recipe.tokenizer
    tokenizer = Tokenizer(
        kind="hf",
        vocab_size=ours.vocab_size,
        eos_token=ours.eos_token,
        pad_token=ours.pad_token,
        path=str(run / "tokenizer"),
    )
    return recipe.model_copy(update={"tokenizer": tokenizer})


def as_toml(name: str, base_name: str, base: Recipe, text: Text, chosen: Fit, continued: Path | None = None) -> str:
    """The recipe's file: the values that differ from the base, each with its reason.

    Args:
        name: the new recipe's name.
        base_name: the name of the recipe from which it takes the rest.
        base: that recipe; for a run that is continued, `with_tokenizer_of` it.
        text: the text to train on.
        chosen: the choices that follow from it.
        continued: the run folder whose model is trained further; None: a model is trained from scratch.
    """
    batch_tokens = chosen.rows * base.data.seq_len
    smaller = f": {base_name}'s {base.rows_per_step:,}, fewer as the run is shorter" if chosen.share < 1 else ""
    epochs = f"{chosen.epochs:.1f} times over" if chosen.epochs > 1 else f"{chosen.epochs:.0%} of the text"
    every = max(1, chosen.steps // EVALUATIONS)
    prompts = ", ".join(map(_quoted, text.beginnings))
    held_out = f"of the documents' hashes: {text.held_out_share:.1%} of the text, never trained on"

    lines = [
        f"# {text}. What is not said here is {base_name}'s: `ds-slm plan {name}.toml` lists it.",
        f"base = {_quoted(base_name)}",
        "",
        "[card]",
        f'name = "{name}"',
        "",
        *(_same_tokenizer(base, continued) if continued else _special_tokens(base)),
        "[data]",
        f"val_fraction = {text.val_fraction:g}  # {held_out}",
        *(['held_out = "hash"'] if base.data.held_out != "hash" else []),
        "[[data.source]]",
        'name = "text"',
        'kind = "files"',
        f"path = {_quoted(text.path)}",
        *([f"column = {_quoted(text.column)}"] if text.column != "text" else []),
        *([f"split = {_quoted(text.split)}  # {_WHY_ALL}"] if text.split != "train" else []),
        "",
        "[train]",
        f"global_batch_tokens = {batch_tokens:_}  # {chosen.rows} rows{smaller}",
        f"steps = {chosen.steps:_}  # {chosen.steps * batch_tokens:,} tokens: {epochs}",
        "",
        *_rates(base, chosen),
        "",
        "[run]",
        f"eval_every_steps = {every}",
        *_evaluated_rows(base_name, base, text),
        f"save_every_steps = {2 * every}",
        *(["", "[eval]", f"prompts = [{prompts}]  # continued at each evaluation, for TensorBoard"] if prompts else []),
    ]
    return "\n".join(lines) + "\n"


def _evaluated_rows(base_name: str, base: Recipe, text: Text) -> list[str]:
    """The rows of an evaluation, where the text holds out fewer than the base evaluates."""
    held_out_tokens = text.text_bytes * text.held_out_share / text.bytes_per_token
    rows = max(1, int(SURELY_HELD_OUT * held_out_tokens / base.data.seq_len))
    if rows >= base.run.eval_rows:
        return []
    return [f"eval_rows = {rows}  # of {base_name}'s {base.run.eval_rows}: the text holds out hardly more"]


def _rates(base: Recipe, chosen: Fit) -> list[str]:
    """The learning rates for a smaller batch, and the base's schedule over another number of steps."""
    optimizer, schedule = base.optimizer, base.schedule
    scale, stretch = math.sqrt(chosen.share), chosen.steps / base.train.steps
    warmup_steps = max(1, round(schedule.warmup_steps * stretch)) if schedule.warmup_steps else 0

    lines = [
        "[optimizer]  # the rate goes with the square root of the batch",
        f"lr = {_rounded(optimizer.lr * scale)}",
        f"min_lr = {_rounded(optimizer.min_lr * scale)}",
        "",
        "[schedule]  # the same shares of the run",
        f"warmup_steps = {warmup_steps}",
    ]
    if schedule.warmup_start_lr:
        lines.append(f"warmup_start_lr = {_rounded(schedule.warmup_start_lr * scale)}")
    if schedule.kind == "wsd":
        assert schedule.decay_steps is not None
        decay_steps = max(1, round(schedule.decay_steps * stretch))
        lines += [f"decay_start_step = {chosen.steps - decay_steps}", f"decay_steps = {decay_steps}"]
    return lines


def _special_tokens(base: Recipe) -> list[str]:
    """ChatML's tokens for a vocabulary that is trained without them, so that the model can be fine-tuned."""
    specials = base.tokenizer.special_tokens
    missing = [token for token in CHATML_TOKENS if token not in specials]
    if base.tokenizer.kind != "bpe" or not missing:
        return []
    free = (number for number in range(base.tokenizer.vocab_size) if number not in specials.values())
    added = ", ".join(f'"{token}" = {number}' for token, number in zip(missing, free, strict=False))
    return ["[tokenizer]", f"special_tokens = {{ {added} }}  # so that it can be fine-tuned on conversations", ""]


def _same_tokenizer(base: Recipe, run: Path) -> list[str]:
    """The section of the tokenizer with which a model was trained."""
    ours = base.tokenizer
    return [
        f"[tokenizer]  # that of the model to train further: launch with --base {_quoted(str(run))}",
        'kind = "hf"',
        f"vocab_size = {ours.vocab_size}",
        f"eos_token = {_quoted(ours.eos_token)}",
        f"pad_token = {_quoted(ours.pad_token)}",
        f"path = {_quoted(str(ours.path))}",
        "",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rounded(rate: float) -> str:
    return f"{rate:.3g}" if rate else "0.0"
