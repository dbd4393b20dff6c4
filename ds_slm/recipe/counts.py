"""Parameters of the decoder, by part, and how a step's rows are divided.

Model --> parameter_counts --> ParameterCounts: the shapes of ds_slm.model.decoder counted
Recipe, world size, micro-batch --> batch --> Batch
"""

from dataclasses import dataclass

from ds_slm.recipe.schema import Recipe
from ds_slm.recipe.sections import Model


@dataclass(frozen=True)
class Batch:
    """How one optimiser step is divided."""

    rows_per_step: int
    """Rows of the recipe's global batch."""
    rows_per_rank: int
    """Rows of the busiest rank, without filler rows."""
    micro_batch: int
    """Rows of one forward on one device."""
    accumulation_steps: int
    """Forwards and backwards of one rank in one optimiser step."""
    filler_rows: int
    """Rows of weight 0, over all ranks, that make every rank run the same number of forwards."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part; a tied head adds none."""

    embedding: int
    head: int
    attention: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.head + self.attention + self.mlp + self.norms


def parameter_counts(shape: Model) -> ParameterCounts:
    """Parameters of each part of the decoder."""
    by_part = _by_part(shape)
    return ParameterCounts(**{part: sum(size * count for size, count in kinds) for part, kinds in by_part.items()})


def parameter_sizes(shape: Model) -> list[tuple[int, int]]:
    """(values, number of parameters of that size) pairs; a size can occur twice."""
    return [kind for kinds in _by_part(shape).values() for kind in kinds]


def _by_part(shape: Model) -> dict[str, list[tuple[int, int]]]:
    hidden, table, layers = shape.hidden_size, shape.vocab_size * shape.hidden_size, shape.num_hidden_layers
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "embedding": [(table, 1)],
        "head": [(table, 0 if shape.tie_word_embeddings else 1)],
        "attention": [(hidden * queries, 2 * layers), (hidden * keys, 2 * layers)],
        "mlp": [(hidden * shape.intermediate_size, 3 * layers)],
        "norms": [(hidden, 2 * layers + 1), (shape.head_dim, 2 * layers if shape.qk_norm else 0)],
    }


def parameters(shape: Model) -> int:
    """Number of the decoder's parameters; tied ones are counted once."""
    return parameter_counts(shape).total


def batch(recipe: Recipe, world_size: int, micro_batch: int) -> Batch:
    """Divide a step into as few forwards of at most `micro_batch` rows as possible, then with the fewest fillers."""
    rows_per_rank = -(-recipe.rows_per_step // world_size)
    accumulation_steps = -(-rows_per_rank // micro_batch)
    size = -(-rows_per_rank // accumulation_steps)
    filler_rows = size * accumulation_steps * world_size - recipe.rows_per_step
    return Batch(recipe.rows_per_step, rows_per_rank, size, accumulation_steps, filler_rows)
