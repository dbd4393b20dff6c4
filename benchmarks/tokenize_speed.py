"""How fast text becomes shards, compared with `tokenizers`' encode_batch and `datasets.map` on the same text and cores.

    text --> bpe trained on it, cl100k if its ranks are given --> three ways in turn, ROUNDS times --> MB/s, ratios

python benchmarks/tokenize_speed.py [FILE or FOLDER] [--ranks cl100k_base.tiktoken] [--rounds 3] [--max-mb 25]

encode_batch   tokenizers.Tokenizer.encode_batch over everything at once: only ids in memory
shards         ds_slm.data.shards.writer.write_documents: split, ids, hashes and files, synchronised
datasets.map   one row at a time through the folder as transformers loads it

Each round runs all three, so that other work on the machine affects all of them; ratios are medians over the rounds.
Without a file the text is the built-in corpus. No time includes reading it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from rich.console import Console
from rich.table import Table

from ds_slm.data.shards.journal import ShardsInProgress, id_dtype
from ds_slm.data.shards.progress import Amount, Progress
from ds_slm.data.shards.writer import Destination, write_documents
from ds_slm.data.sources import documents
from ds_slm.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from ds_slm.errors import run_program
from ds_slm.recipe import loading
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.data_sections import Tokenizer as TokenizerSection

KINDS = {
    "bpe-8192": ("bpe", 8_192, {"<|endoftext|>": 0, "<|pad|>": 1}, "<|pad|>"),
    "cl100k": ("cl100k", 100_277, {}, "<|endoftext|>"),
}


def read_texts(place: Path | None, max_bytes: float) -> list[str]:
    """The documents of a file or folder, or of the built-in corpus, up to `max_bytes`."""
    source = Source(name="text", kind="builtin", weight=1)
    texts, size_bytes = [], 0
    for text in filter(None, documents.documents(source, place)):
        texts.append(text)
        size_bytes += len(text.encode())
        if size_bytes >= max_bytes:
            break
    return texts


def make_tokenizer(kind: str, texts: Sequence[str], ranks: Path | None, folder: Path) -> Tokenizer:
    """A tokenizer as preparing makes it, saved and loaded."""
    kind, vocab_size, special_tokens, pad_token = KINDS[kind]
    recipe = loading.load("demo")
    section = TokenizerSection(
        kind=kind,
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        pad_token=pad_token,
        path=str(ranks) if kind == "cl100k" else None,
    )
    recipe = recipe.model_copy(update={"tokenizer": section})
    build_tokenizer(recipe, lambda _: iter(texts)).save(folder)
    return load_tokenizer(folder)


def with_encode_batch(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The number of tokens by the library's own method."""
    encodings = tokenizer._encoder.encode_batch(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)


def with_shards(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The number of tokens written into shards, without the EOS of each document."""
    data, dtype = loading.load("demo").data, id_dtype(tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardsInProgress(Path(folder), dtype, {})
        progress = Progress("text", Amount(float("inf"), None), lambda line: None, bar=False)
        to = Destination("text", shards, tokenizer, data, float("inf"), progress)
        write_documents(
            to, lambda position: documents.DocumentStream({}, lambda mark: ((text, 0) for text in texts), 0)
        )
        size_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
    return size_bytes // dtype.itemsize - len(texts)


def with_map(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The number of tokens by `datasets.map`, a row at a time."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        theirs = AutoTokenizer.from_pretrained(folder)
        rows = datasets.Dataset.from_dict({"text": texts})
        mapped = rows.map(
            lambda row: {"ids": theirs(row["text"], split_special_tokens=True)["input_ids"]},
            remove_columns=["text"],
            keep_in_memory=True,
            new_fingerprint="ids",
        )
        return sum(len(ids) for ids in mapped["ids"])


WAYS: dict[str, Callable[[Tokenizer, list[str]], int]] = {
    "encode_batch": with_encode_batch,
    "shards": with_shards,
    "datasets.map": with_map,
}


def measure(tokenizer: Tokenizer, texts: list[str], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way in each round, and the number of tokens, which must be the same for all."""
    elapsed_s: dict[str, list[float]] = {name: [] for name in WAYS}
    tokenizer.encode_batch(["what is made on first use"])
    counts = set()
    for _ in range(rounds):
        for name, way in WAYS.items():
            begin_s = time.perf_counter()
            counts.add(way(tokenizer, texts))
            elapsed_s[name].append(time.perf_counter() - begin_s)
    assert len(counts) == 1, f"the ways differ in their tokens: {counts}"
    return elapsed_s, counts.pop()


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, help="a file or folder of text (default: the built-in corpus)")
    parser.add_argument("--ranks", type=Path, help="cl100k_base.tiktoken; without it cl100k is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-mb", type=float, default=25.0, help="text to read at most (default 25)")
    given = parser.parse_args()

    texts = read_texts(given.text, given.max_mb * 1e6)
    size_mb = sum(len(text.encode()) for text in texts) / 1e6
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    title = f"{len(texts):,} documents, {size_mb:.1f} MB, {cores} cores, load {load:.1f}, {given.rounds} rounds"
    table = Table("tokenizer", "way", "MB/s", "tokens/s", "to encode_batch", title=title)

    for kind in KINDS:
        if kind == "cl100k" and given.ranks is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = make_tokenizer(kind, texts, given.ranks, Path(folder))
            elapsed_s, tokens = measure(tokenizer, texts, given.rounds)

        for name, seconds in elapsed_s.items():
            median_s = statistics.median(seconds)
            ratios = [base / own for base, own in zip(elapsed_s["encode_batch"], seconds, strict=True)]
            speed = f"{size_mb / median_s:.2f}", f"{tokens / median_s:,.0f}", f"{statistics.median(ratios):.2f}"
            table.add_row(kind, name, *speed)

    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
