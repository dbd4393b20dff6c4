"""A small set that every installation has: which words continue a sentence of the built-in documentation?

    held-out documents of the demo recipe --rows--> context, four endings: its own, and three of other documents

It shows the table without any benchmark's files: a model of 2M parameters trained for minutes is well above chance.
The text, and so its hash, changes with the versions of the packages: figures of two installations can be compared only
if the hashes are equal.
"""

import hashlib
from itertools import islice
from typing import Any

from ds_slm.data.shards.writer import split_of
from ds_slm.data.sources.builtin import read_builtin
from ds_slm.recipe import loading

VERSION = "1"
CONTEXT_WORDS, ENDING_WORDS = 16, 6
MOST_ITEMS = 200
CHOICES = 4
OTHERS = 37
"""Distance to the documents that give the other endings: neighbours come from one package, and are similar."""


def rows() -> list[dict[str, Any]]:
    """Items with `ctx`, `endings` and `label`, always the same: from the first documents that the demo recipe holds out
    and that are long enough.
    """
    data = loading.load("demo").data
    held_out = (text.split() for row, text in enumerate(read_builtin()) if split_of(text, row, data) == "val")
    long_enough = (words for words in held_out if len(words) >= CONTEXT_WORDS + ENDING_WORDS)
    chosen = [words[: CONTEXT_WORDS + ENDING_WORDS] for words in islice(long_enough, MOST_ITEMS)]
    endings = [" " + " ".join(words[CONTEXT_WORDS:]) for words in chosen]

    found = []
    for index, words in enumerate(chosen):
        label = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big") % CHOICES
        choices = [endings[(index + OTHERS * step) % len(endings)] for step in range(1, CHOICES)]
        choices.insert(label, endings[index])
        found.append({"ctx": " ".join(words[:CONTEXT_WORDS]), "endings": choices, "label": label})
    return found
