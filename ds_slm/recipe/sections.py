"""The sections of a recipe, typed, and what each must satisfy by itself (beside the others: consistency.py).

    one table of the TOML file --> one Section (of what is read: data_sections.py); all of them --> schema.Recipe

Field names of the model are Hugging Face's. The string under a field is its description: unit, meaning of the default.
A new one is marked NEWER: section.py says why.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ds_slm.recipe.hub_names import is_language, is_repo_id, license_problem
from ds_slm.recipe.section import NEWER, Section, raise_together

Std = Annotated[float, Field(gt=0, le=100)]
Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]


class Card(Section):
    """What the recipe reproduces."""

    name: str
    """The published model's name."""
    reproduces: str = ""
    """Which card, or why the recipe exists."""
    params: int | None = None
    """Parameters as published; None where nothing is published."""
    sources: dict[str, str] = {}
    """Where each group of numbers is published: section or section.field -> place."""
    license: Annotated[str | None, NEWER] = None
    """Of the exported model, by the hub's name; None states none."""
    license_name: Annotated[str | None, NEWER] = None
    """With license = "other": what it is called."""
    license_link: Annotated[str | None, NEWER] = None
    """With license = "other": where its text is."""
    language: Annotated[list[str], NEWER] = []
    """Of the text it is trained on: ISO 639 codes."""
    base_model: Annotated[str | None, NEWER] = None
    """Fine-tuning: the base's id, once it is on the hub."""

    @model_validator(mode="after")
    def _the_hub_knows_these(self) -> Self:
        problem = license_problem(self.license) if self.license is not None else None
        problems = [f"license = {problem}, or use 'other'"] if problem else []
        problems += [
            f"{key} is for license = 'other': leave it out"
            for key in ("license_name", "license_link")
            if getattr(self, key) is not None and self.license != "other"
        ]
        problems += [
            f"language: {code!r} is not a code of ISO 639: write 'en' for English"
            for code in self.language
            if not is_language(code)
        ]

        if self.base_model is not None and not is_repo_id(self.base_model):
            problems.append(f"base_model = {self.base_model!r} is not a model's id on the hub: expected ORG/NAME")
        raise_together(problems)
        return self


class Model(Section):
    """The decoder's shape, in Hugging Face's field names."""

    hidden_size: PositiveInt
    """Components of a token's vector."""
    intermediate_size: PositiveInt
    """Components within a feed-forward."""
    num_hidden_layers: PositiveInt
    """Blocks."""
    num_attention_heads: PositiveInt
    """Query heads of a block."""
    num_key_value_heads: PositiveInt
    """Key and value heads; query heads share them in equal groups."""
    head_dim: PositiveInt
    """Components of a head; an even number."""
    vocab_size: PositiveInt
    """Rows of the embedding: at least the tokenizer's ids."""
    max_position_embeddings: PositiveInt
    """Longest sequence, in tokens."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary embedding's wavelengths."""
    rms_norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square before its root."""
    tie_word_embeddings: bool = True
    """The head is the embedding."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before RoPE (exports as Qwen3)."""
    exclusive_attention: bool = False
    """Remove from each head's output its component along the token's own value (arXiv 2603.09078)."""
    init_std: Std = 0.02
    """Standard deviation of the normal initialisation of every matrix."""
    embedding_init_std: Std | None = None
    """The same for the embedding (and a tied head); None means init_std."""
    scaled_residual_init: bool = False
    """o_proj and down_proj start at init_std / sqrt(2 * layers)."""

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads = {self.num_attention_heads} does not divide into num_key_value_heads = "
                f"{self.num_key_value_heads} groups: make the first a multiple of the second"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim} is odd: rotary embeddings turn pairs, choose an even number")
        raise_together(problems)
        return self


class Optimizer(Section):
    """AdamW, with 32-bit or 8-bit states."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the states of matrices in 8 bits (bitsandbytes)."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of tensors of two or more dimensions; norms have none."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    embedding_bits: Literal[8, 32] = 32
    """adamw8bit: bits of the embedding's states; tensors under two dimensions always keep 32."""


class Schedule(Section):
    """The learning rate over steps; see ds_slm.recipe.schedule for the formulas."""

    kind: Literal["cosine", "wsd"]
    """cosine: from the peak to min_lr over all steps; wsd: warmup, stable, decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises in a straight line."""
    warmup_start_lr: float = Field(0.0, ge=0)
    """Learning rate at step 0 where there is a warmup."""
    decay_start_step: int | None = Field(None, ge=0)
    """wsd: the step at which the decay begins."""
    decay_steps: PositiveInt | None = None
    """wsd: steps from the peak to min_lr."""
    decay_shape: Literal["cosine", "linear"] = "cosine"
    """wsd: the decay's curve."""

    @model_validator(mode="after")
    def _wsd_is_whole(self) -> Self:
        problems = []
        if self.kind == "wsd" and (self.decay_start_step is None or self.decay_steps is None):
            problems.append("kind = 'wsd' needs decay_start_step and decay_steps: add them, or use kind = 'cosine'")
        if self.decay_start_step is not None and self.decay_start_step < self.warmup_steps:
            problems.append(
                f"decay_start_step = {self.decay_start_step} comes before warmup_steps = {self.warmup_steps} is over: "
                "start the decay later or warm up for fewer steps"
            )
        raise_together(problems)
        return self


class Train(Section):
    """The batch, the length and the numerics."""

    global_batch_tokens: PositiveInt
    """Targets of one optimiser step over all devices, in tokens."""
    steps: PositiveInt
    """Optimiser steps of the whole run."""
    last_batch: Literal["wrap", "keep", "drop"] = "wrap"
    """At the end of finite data: go on with the next epoch, take one short step, or leave the rest."""
    seed: int = 0
    """Seeds the initialisation and the order of the data."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of forward and backward; the weights that are trained are fp32."""
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of mean(logsumexp^2)."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass; changes memory and speed, not the result."""


class Run(Section):
    """Bookkeeping of a run: not part of the result, never hashed."""

    eval_every_steps: PositiveInt = 500
    """Steps between two evaluations on held-out rows."""
    eval_rows: PositiveInt = 256
    """Held-out rows of each evaluation during training, always the same ones; the last evaluation takes all."""
    save_every_steps: PositiveInt = 500
    """Steps between two checkpoints."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    checkpoint_copies: PositiveInt = 2
    """Hosts that keep every checkpoint."""
    log_every_steps: PositiveInt = 1
    """Steps between two records of a training step."""
    layers_every_steps: PositiveInt | None = None
    """Steps whose norms of weights and gradients are recorded layer by layer; None: never."""


class Eval(Section):
    """Benchmarks run during training."""

    tasks: list[str] = []
    """Names of benchmarks, as `ds-slm eval --tasks` takes them."""
    every_steps: PositiveInt | None = None
    """None: only after training."""
    limit: Annotated[PositiveInt | None, NEWER] = None
    """Items of each task that are scored, from its beginning; None scores all."""
    bench_dir: Annotated[str | None, NEWER] = None
    """Where the benchmarks' files lie, on the host of rank 0; None reads the hub."""
    prompts: list[str] = []
    """Texts continued at each evaluation, shown in TensorBoard."""


class Sft(Section):
    """Supervised fine-tuning on conversations."""

    mask: Literal["assistant", "last", "card", "all"] = "assistant"
    """What is trained: content and terminator of every assistant turn; of the last one alone; whole assistant turns,
    header included, each conversation weighing 1; every token."""
    packing: bool = True
    """Several conversations in a row, each seeing itself alone; else one padded row for each."""
    system_turns: Literal["keep", "drop"] = "keep"
    """What becomes of a conversation's system turns."""
    invalid: Literal["drop", "refuse"] = "drop"
    """Conversations with unknown roles, content that is no text or turns that do not alternate (sft.forms says which
    forms are read): left out and counted, or an error."""
    max_rows: PositiveInt | None = None
    """Rows of each source that are read, from its beginning."""


class Target(Section):
    """One published figure to set ours beside."""

    metric: str
    """Task and metric, e.g. 'hellaswag/acc_norm'. The first target of a recipe is its headline."""
    published: float
    """The published figure; accuracies in percent."""
    tolerance: float | None = None
    """How far ours may be away and still count as reproduced; None where the figure is only shown."""
    step: int | None = Field(None, ge=1)
    """Optimiser steps done when it was measured; None: the finished model."""
    source: str
    """Where it is published."""
    note: str = ""
    """What else a reader should know of it."""
