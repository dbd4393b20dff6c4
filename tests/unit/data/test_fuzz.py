"""Damaged source files, at random with a fixed seed: refused by name, or read; nothing else may happen."""

import io
import random
from pathlib import Path

import pytest

from ds_slm.data.sources.readers import READERS, TextFile, read_documents
from ds_slm.errors import DataError
from tests.support.data_recipes import texts
from tests.support.source_files import WRITERS, write_parquet

CASES = 600
MADE = texts(20)
CHECKSUMMED = (".jsonl.gz", ".jsonl.zst")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to five of: cut short, a bit turned over, a range removed, or doubled, or garbage behind the end."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(found)) if found else 0
        end = min(len(found), place + rng.randint(1, 40))
        kind = rng.choice(("cut", "flip", "remove", "double", "append"))
        if kind == "cut":
            del found[place:]
        elif kind == "flip" and found:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == "remove":
            del found[place:end]
        elif kind == "double":
            found[place:place] = found[place:end]
        else:
            found += rng.randbytes(rng.randint(1, 40))
    return bytes(found)


def read(content: bytes, suffix: str) -> list[str]:
    """The documents of a file that holds these bytes."""
    file = TextFile(f"damaged{suffix}", lambda: io.BufferedReader(io.BytesIO(content)))  # type: ignore[arg-type]
    return [text for text, _ in read_documents(file, "text")]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("suffix", READERS)
def test_damage_is_told_or_harmless(suffix: str, tmp_path: Path) -> None:
    """Oracle: a DataError that names the file, or documents; of a file with checksums exactly the ones written.

    Any other exception fails the test, a hang its timeout. Nearly all damage to a format with structure must be told.
    """
    path = tmp_path / f"made{suffix}"
    WRITERS[suffix](path, MADE[:1] if suffix == ".txt" else MADE)
    content = path.read_bytes()
    rng = random.Random(suffix)
    refused = 0
    for case in range(CASES):
        try:
            found = read(damaged(content, rng), suffix)
        except DataError as error:
            assert f"damaged{suffix}" in str(error), case
            refused += 1
        else:
            assert suffix not in CHECKSUMMED or found == MADE, case
            assert all(isinstance(text, str) for text in found), case
    assert refused > {".txt": 0.2, ".jsonl": 0.5}.get(suffix, 0.9) * CASES


@pytest.mark.parametrize("suffix", CHECKSUMMED)
def test_every_bit_of_a_header_and_a_trailer(suffix: str, tmp_path: Path) -> None:
    """Oracle: each single bit turned over is refused, or harmless (a gzip header's time): the documents written."""
    path = tmp_path / f"made{suffix}"
    WRITERS[suffix](path, MADE)
    content = path.read_bytes()
    refused = 0
    places = [*range(24), *range(len(content) - 12, len(content))]
    for bit in range(8 * len(places)):
        changed = bytearray(content)
        changed[places[bit // 8]] ^= 1 << bit % 8
        try:
            assert read(bytes(changed), suffix) == MADE
        except DataError:
            refused += 1
    assert refused > 4 * len(places)


def test_a_parquet_footer_loses_no_rows(tmp_path: Path) -> None:
    """Oracle: whichever bits of a file without checksums flip, it is refused or has as many rows as before."""
    path = tmp_path / "made.parquet"
    write_parquet(path, MADE, write_page_checksum=False)
    content = path.read_bytes()
    footer_bytes = int.from_bytes(content[-8:-4], "little") + 8
    rng = random.Random(5)
    refused = 0
    for case in range(3 * CASES):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 2)):
            changed[-rng.randint(1, footer_bytes)] ^= 1 << rng.randrange(8)
        try:
            assert len(read(bytes(changed), ".parquet")) == len(MADE), case
        except DataError as error:
            assert "damaged.parquet" in str(error), case
            refused += 1
    assert refused > CASES
