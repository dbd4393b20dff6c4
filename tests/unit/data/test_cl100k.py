"""cl100k: tiktoken's ids, of text and with control tokens, before and after transformers has saved the folder."""

import gzip
import json
import random
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_slm.data.tokenizers import tokenizer as tokenizers
from ds_slm.errors import DataError
from tests.support.data_recipes import CL100K, cl100k, prepare, recipe, source, texts, write_jsonl

CONTROLS = {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265, "<|endofprompt|>": 100276}
UNUSED = [100256, 100261, 100262, 100263, *range(100266, 100276)]
SLICE_CHARACTERS = 100_000

PARTS = [
    *"0123456789", *"   \n\n\r\t\u3000\x85\xa0\u2028\x00", *"aZé_-'’!?.,#{}", *"日本語한국어ไทย", *"😀👨‍👩‍👧🇪🇸",
    "\r\n", "    ", " \n", "\t\t", "12345", "٣٤٥", "½", "Ⅷ", "the", " the", "ing", "Ǆ", "e\u0301", "\u200d", "\ufeff",
    *CONTROLS, "<|fim_prefix|>", "<|unused_100256|>", "<|", "|>", "<|im_", "endoftext",
    *(mark + ending for mark in ("'", " '", "''") for ending in ("s", "S", "ſ", "T", "re", "Re", "rE", "VE", "ve")),
    *("'" + ending for ending in ("ll", "LL", "lL", "m", "M", "d", "D", "K", "k", "ß", "ﬆ", "ı", "İ")),
]  # fmt: skip
"""What the patterns tell apart, odd foldings of case among it."""


def generated_strings(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def ours(cl100k_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.load_tokenizer(cl100k_folder)


@pytest.fixture(scope="module")
def oracle(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tiktoken, with the two chat tokens that it does not know."""
    import tiktoken

    cache = tmp_path_factory.mktemp("cache")
    shutil.copy(test_data / "cl100k_base" / "cl100k_base.tiktoken", cache / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        base = tiktoken.get_encoding("cl100k_base")
    return tiktoken.Encoding(
        "cl100k_chat",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens=base._special_tokens | CONTROLS,
    )


def vectors(test_data: Path) -> list[tuple[str, list[int], list[int]]]:
    """Texts with their ids as ordinary text and with control tokens: golden ones, and those of another library."""
    found = []
    for line in (test_data / "cl100k_base" / "golden_vectors.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        found.append((row["text"], row["ids_ordinary"], row["ids_allow_special"]))
    plans = (test_data / "cl100k_base" / "gpt-tokenizer_TestPlans.txt").read_text(encoding="utf-8")
    samples = re.findall(r"EncodingName: cl100k_base\nSample: (.*?)\nEncoded: (\[.*?\])", plans, re.DOTALL)
    assert len(samples) == 64
    return found + [(text, json.loads(ids), json.loads(ids)) for text, ids in samples]


def strings(value: Any) -> Iterator[str]:
    """Every string within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def all_texts(test_data: Path) -> Iterator[str]:
    """Prose, conversations and benchmarks: every string of a JSON row, any other file whole."""
    for name in ("prose", "chat", "benchmarks"):
        for path in sorted((test_data / name).rglob("*")):
            if path.is_file():
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                if ".jsonl" in path.suffixes:
                    for line in content.splitlines():
                        yield from strings(json.loads(line))
                else:
                    yield content.decode()


def assert_same(ours: tokenizers.Tokenizer, oracle: Any, texts: list[str]) -> None:
    """Both of our encoders: the saved tokenizer's own, and the one for bulk."""
    found = [encoding.ids for encoding in ours._encoder.encode_batch_fast(texts, add_special_tokens=False)]
    assert found == oracle.encode_ordinary_batch(texts) == ours.encode_batch(texts)
    assert [ours.decode(ids) for ids in found] == texts


def test_golden_vectors(ours: tokenizers.Tokenizer, cl100k_folder: Path, test_data: Path) -> None:
    """Oracle: ids on file, of tiktoken and of a JavaScript library."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(cl100k_folder)
    for text, ordinary, with_controls in vectors(test_data):
        assert ours.encode(text) == ordinary
        if "<|im_" not in text:  # tiktoken's own encoding has no chat tokens
            assert theirs(text).input_ids == with_controls


def test_generated_strings(ours: tokenizers.Tokenizer, oracle: Any) -> None:
    """Oracle: tiktoken's ids, and the string itself."""
    assert_same(ours, oracle, generated_strings(2_000, seed=1))


@settings(max_examples=300)
@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("'sStTlLvVeErR \n1")), max_size=40)
)
def test_any_text(ours: tokenizers.Tokenizer, oracle: Any, text: str) -> None:
    """Oracle: tiktoken's ids, and the text itself."""
    assert_same(ours, oracle, [text])


def test_real_text(ours: tokenizers.Tokenizer, oracle: Any, test_data: Path) -> None:
    """Oracle: tiktoken's ids of a slice of every kind of real text."""
    texts = [text[:SLICE_CHARACTERS] for place, text in enumerate(all_texts(test_data)) if place % 97 == 0]
    assert_same(ours, oracle, texts)


@pytest.mark.slow
def test_all_real_text_and_many_strings(
    ours: tokenizers.Tokenizer, oracle: Any, cl100k_folder: Path, test_data: Path
) -> None:
    """Oracle: tiktoken's ids of every text there is, of 20,000 strings, and of those with control tokens."""
    from transformers import AutoTokenizer

    batch: list[str] = []
    for text in all_texts(test_data):
        batch.append(text)
        if len(batch) == 1_000:
            assert_same(ours, oracle, batch)
            batch = []
    assert_same(ours, oracle, batch)
    many = generated_strings(20_000, seed=2)
    assert_same(ours, oracle, many)
    assert AutoTokenizer.from_pretrained(cl100k_folder)(many).input_ids == oracle.encode_batch(
        many, allowed_special="all"
    )


@pytest.mark.slow
def test_every_character(ours: tokenizers.Tokenizer, oracle: Any) -> None:
    """Oracle: tiktoken's ids of each of Unicode's characters where the pattern decides by its kind."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    frame = "a{}b 1{}2  {} x\n{}\n!{}! '{} 'l{} '{}e{}"
    for begin in range(0, len(characters), 50_000):
        assert_same(ours, oracle, [frame.replace("{}", letter) for letter in characters[begin : begin + 50_000]])


def test_ids_survive_transformers(cl100k_folder: Path, oracle: Any, tmp_path: Path) -> None:
    """Oracle: tiktoken with control tokens allowed, after loading, saving and loading again."""
    from transformers import AutoTokenizer

    texts = generated_strings(2_000, seed=3)
    expected = oracle.encode_batch(texts, allowed_special="all")
    loaded = AutoTokenizer.from_pretrained(cl100k_folder)
    loaded.save_pretrained(tmp_path)
    for theirs in (loaded, AutoTokenizer.from_pretrained(tmp_path)):
        assert theirs(texts).input_ids == expected
        assert (len(theirs), theirs.eos_token_id) == (100277, 100257)
        assert {token: theirs.convert_tokens_to_ids(token) for token in CONTROLS} == CONTROLS
        assert theirs.convert_ids_to_tokens(list(CONTROLS.values())) == list(CONTROLS)
        assert theirs(texts, split_special_tokens=True).input_ids == oracle.encode_ordinary_batch(texts)
    again = tokenizers.load_tokenizer(tmp_path)
    assert again.encode_batch(texts) == oracle.encode_ordinary_batch(texts)
    assert (again.vocab_size, again.eos_id) == (100277, 100257)


def test_unused_ids(ours: tokenizers.Tokenizer) -> None:
    """Oracle: the ids OpenAI left free, and those a padded model has beyond them."""
    assert ours.unused_ids(100277) == UNUSED
    assert ours.unused_ids(100280) == [*UNUSED, 100277, 100278, 100279]


def test_prepared_shards_hold_its_ids(test_data: Path, oracle: Any, tmp_path: Path) -> None:
    """Oracle: tiktoken's ids of every document with the end of text behind each, in four bytes."""
    ranks = test_data / "cl100k_base" / "cl100k_base.tiktoken"
    made_up = texts(60)
    path = write_jsonl(tmp_path / "one.jsonl", made_up)
    section = CL100K.replace("RANKS", str(ranks))
    prepared = prepare(recipe(source("first", path=path), tokenizer=section, val_fraction=0.2), tmp_path / "data")
    assert prepared.manifests["first"]["dtype"] == "uint32"
    assert len(prepared.tokens("train")) == 1
    found = [*np.asarray(prepared.tokens("train")[0]), *np.asarray(prepared.tokens("val")[0])]
    documents = [list(group) for is_end, group in groupby(found, lambda token: token == 100_257) if not is_end]
    assert sorted(documents) == sorted(oracle.encode_ordinary_batch(made_up))
    assert found.count(100_257) == 60


def test_damaged_ranks(tmp_path: Path) -> None:
    """Oracle: the error names both hashes, before anything is made of the file."""
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_text("IQ== 0\n")
    with pytest.raises(DataError, match="223921b76ee99bde"):
        cl100k(ranks)
    with pytest.raises(DataError, match="does not exist"):
        cl100k(tmp_path / "none")


def test_bulk_is_tiktoken(ours: tokenizers.Tokenizer) -> None:
    """Oracle: there is an encoder for bulk, of the folder that was saved."""
    assert ours._bulk is not None
