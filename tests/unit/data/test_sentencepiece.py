"""SentencePiece models: the library's own ids, before and after saving; what cannot be exact is refused."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as protobuf

from ds_slm.data.tokenizers import tokenizer as tokenizers
from ds_slm.errors import DataError
from tests.support.data_recipes import recipe, source, texts

EXACT = {
    "model_type": "bpe",
    "vocab_size": 600,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "hard_vocab_limit": False,
    "minloglevel": 2,
}
VARIANTS = {"llama": {}, "no-prefix": {"add_dummy_prefix": False}, "mixed": {"split_by_whitespace": False}}
LITERALS = [
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "  ",
    "     ",
    " ab",
    "\u2581",
    "\n\n",
    "\x00",
    "é",
    "日本",
    "😀",
    "</",
    "s>",
]
TEXT = st.lists(st.one_of(st.sampled_from(LITERALS), st.text("abcdefghij  \n0", max_size=9), st.text(max_size=3)))


def write_model(path: Path, **options: Any) -> Path:
    """A small model, trained on made-up words; its runs of spaces share one score, as in Mistral's."""
    written = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(texts(150)), model_writer=written, **(EXACT | options))
    model = protobuf.ModelProto.FromString(written.getvalue())
    for length in (2, 4, 8, 5, 3, 7, 6):
        if "\u2581" * length not in {piece.piece for piece in model.pieces}:
            model.pieces.add(piece="\u2581" * length, score=-1e9)
    path.write_bytes(model.SerializeToString())
    return path


def build(model: Path, vocab_size: int, eos_token: str = "</s>") -> tokenizers.Tokenizer:
    section = (
        f'kind = "hf"\nvocab_size = {vocab_size}\neos_token = "{eos_token}"\npad_token = "<unk>"\npath = "{model}"'
    )
    return tokenizers.build_tokenizer(recipe(source("made", path="."), tokenizer=section), lambda _: iter(()))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, Any]:
    """A conversion, saved and loaded again, and the library with the same model."""
    folder = tmp_path_factory.mktemp("model")
    path = write_model(folder / "tokenizer.model", **VARIANTS[request.param])
    oracle = SentencePieceProcessor(model_file=str(path))
    build(path, oracle.vocab_size()).save(folder / "saved")
    return tokenizers.load_tokenizer(folder / "saved"), oracle


@settings(max_examples=300)
@given(parts=TEXT)
def test_ids_are_those_of_sentencepiece(pair: tuple[tokenizers.Tokenizer, Any], parts: list[str]) -> None:
    """Oracle: the sentencepiece library; the text comes back, but for U+2581, which is a space to both."""
    ours, oracle = pair
    text = "".join(parts)
    ids = ours.encode(text)
    assert ids == oracle.encode(text)
    assert ours.encode_batch([text, ""]) == [ids, []]
    assert ours.decode(ids) == ours.decode(ids, skip_special=True) == oracle.decode(ids) == text.replace("\u2581", " ")


def test_transformers_has_the_same_ids(tmp_path: Path) -> None:
    """Oracle: the sentencepiece library; control tokens are parsed by transformers' default alone."""
    from transformers import AutoTokenizer

    oracle = SentencePieceProcessor(model_file=str(write_model(tmp_path / "tokenizer.model")))
    build(tmp_path, oracle.vocab_size()).save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    for theirs in (loaded, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in [*texts(20, seed=4), " a  b ", "\n\n    a", "é日😀", "     "]:
            assert theirs(text).input_ids == oracle.encode(text)
            assert theirs.decode(oracle.encode(text)) == text
        assert theirs("a</s>").input_ids[-1] == theirs.eos_token_id == 2


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    """Oracle: the reason in the error, for every kind of model that is not known; several at once."""
    path = tmp_path / "tokenizer.model"
    refused = {
        "UNIGRAM": {"model_type": "unigram", "vocab_size": 300},
        "byte fallback": {"byte_fallback": False},
        "normalises text": {"normalization_rule_name": "nmt_nfkc"},
        "extra spaces": {"remove_extra_whitespaces": True},
        "spaces behind": {"treat_whitespace_as_suffix": True},
        "user-defined": {"user_defined_symbols": ["<sep>"]},
    }
    for reason, options in refused.items():
        write_model(path, **options)
        with pytest.raises(DataError, match=f"{reason}.*name a tokenizer.json"):
            build(path, 600)
    write_model(path, remove_extra_whitespaces=True, byte_fallback=False)
    with pytest.raises(DataError) as caught:
        build(path, 600)
    assert len(caught.value.problems) == 2
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(DataError, match="no SentencePiece model"):
        build(path, 600)


def test_a_conversion_that_differs_is_refused(tmp_path: Path) -> None:
    """Oracle: a model whose pieces all have the same score, so that only their places decide."""
    path = write_model(tmp_path / "tokenizer.model")
    model = protobuf.ModelProto.FromString(path.read_bytes())
    for piece in model.pieces:
        piece.score = 0.0
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"its conversion gives .* where SentencePiece gives"):
        build(path, 600)


def test_a_model_of_32000_pieces(test_data: Path, tmp_path: Path) -> None:
    """Oracle: ids on file and the sentencepiece library, for Mistral's model, after saving and loading."""
    path = test_data / "tokenizers" / "mistral_v1_tokenizer.model"
    oracle = SentencePieceProcessor(model_file=str(path))
    build(path, 32_000).save(tmp_path)
    ours = tokenizers.load_tokenizer(tmp_path)
    golden = (test_data / "tokenizers" / "mistral_v1_golden_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in golden]
    assert len(rows) == 79 and ours.encode_batch([row["text"] for row in rows]) == [row["ids"] for row in rows]
    rng = random.Random(5)
    parts = [*LITERALS, *" \t\n\r.,;'\"=-_/*01239aeistTh", "the", " of", "ing", "=" * 9, "ſ", "\ufeff", "\u200d", "한"]
    many = ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(5_000)]
    many += [chr(code) for code in range(0x3000)]
    many += [json.loads(line)["text"] for line in (test_data / "prose" / "openstax_val.jsonl").open(encoding="utf-8")]
    found = ours.encode_batch(many)
    assert found == oracle.encode(many)
    assert [ours.decode(ids) for ids in found] == [text.replace("\u2581", " ") for text in many]
    assert (ours.eos_id, ours.pad_id, ours.vocab_size, ours.unused_ids(32_000)) == (2, 0, 32_000, [])
