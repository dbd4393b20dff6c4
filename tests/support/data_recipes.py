"""Helpers for the tests of data: small recipes, generated documents, prepared folders."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import tokenizers

from ds_slm.data.shards import prepared
from ds_slm.data.shards.prepare import prepare as prepare_data
from ds_slm.data.tokenizers import tokenizer
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe

SPECIALS = '{ "<|endoftext|>" = 0, "<|pad|>" = 1, "<|im_start|>" = 2, "<|im_end|>" = 3 }'
BPE = f'kind = "bpe"\nvocab_size = 300\nspecial_tokens = {SPECIALS}\npad_token = "<|pad|>"'

CL100K = 'kind = "cl100k"\nvocab_size = 100277\npath = "RANKS"\n' + (
    'special_tokens = { "<|endoftext|>" = 100257, "<|im_start|>" = 100264, "<|im_end|>" = 100265 }'
)

TEXT = """
[card]
name = "data"
[model]
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
head_dim = 8
vocab_size = 200000
max_position_embeddings = 1024
[tokenizer]
{tokenizer}
[data]
seq_len = {seq_len}
val_fraction = {val_fraction}
split_seed = {split_seed}
{sources}
[optimizer]
lr = 1e-3
[schedule]
kind = "cosine"
[train]
global_batch_tokens = {batch_tokens}
steps = 10
seed = 3
last_batch = "{last_batch}"
"""


def source(name: str, kind: str = "files", weight: int = 1, **fields: object) -> str:
    """One [[data.source]] table."""
    lines = [f"{key} = {json.dumps(str(value))}" for key, value in fields.items()]
    return "\n".join(["[[data.source]]", f'name = "{name}"', f'kind = "{kind}"', f"weight = {weight}", *lines])


def recipe(
    *sources: str,
    tokenizer: str = BPE,
    seq_len: int = 16,
    rows_per_step: int = 7,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    last_batch: str = "wrap",
) -> Recipe:
    """A recipe whose model is never built."""
    text = TEXT.format(
        tokenizer=tokenizer,
        seq_len=seq_len,
        val_fraction=val_fraction,
        split_seed=split_seed,
        sources="\n".join(sources),
        batch_tokens=rows_per_step * seq_len,
        last_batch=last_batch,
    )
    return loading.parse(text)


def texts(count: int = 200, seed: int = 0) -> list[str]:
    """Documents of made-up words; no two are equal."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(200)]
    return [f"{seed}-{number}: " + " ".join(rng.choices(words, k=rng.randint(5, 60))) for number in range(count)]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    """A .jsonl file of documents."""
    path.write_text("".join(json.dumps({column: text, "id": place}) + "\n" for place, text in enumerate(documents)))
    return path


def two_sources(folder: Path) -> Recipe:
    """A recipe of two sources, one of two files."""
    (folder / "two").mkdir()
    write_jsonl(folder / "one.jsonl", texts(300, seed=1))
    write_jsonl(folder / "two" / "a.jsonl", texts(100, seed=2))
    write_jsonl(folder / "two" / "b.jsonl", texts(100, seed=3))
    return recipe(
        source("first", path=folder / "one.jsonl", weight=3),
        source("second", path=folder / "two"),
        val_fraction=0.2,
    )


def cl100k(ranks: Path) -> tokenizer.Tokenizer:
    """The cl100k tokenizer of a file of ranks."""
    section = CL100K.replace("RANKS", str(ranks))
    return tokenizer.build_tokenizer(recipe(source("made", path="."), tokenizer=section), lambda _: iter(()))


def prepare(made: Recipe, root: Path, **options: object) -> prepared.Prepared:
    """Prepare in silence."""
    report: Callable[[str], None] = lambda line: None  # noqa: E731
    return prepare_data(made, root / "made", **{"report": report, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but for the lock and the times of change that were seen."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def character_folder(folder: Path, characters: str) -> Path:
    """A tokenizer of single characters as a Hugging Face folder: the simplest there is."""
    vocabulary = {character: place for place, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder
