"""Tokenizers: exact vocabularies and ids, any Unicode there and back, text is text, folders that transformers loads."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.data.tokenizers import tokenizer as tokenizers
from ds_slm.errors import DataError
from ds_slm.recipe.data_sections import Source
from tests.support.data_recipes import BPE, character_folder, recipe, source, texts

CONTROLS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SCATTERED = BPE.replace('"<|pad|>" = 1', '"<|pad|>" = 299').replace('"<|im_end|>" = 3', '"<|im_end|>" = 77')


def documents(_: Source) -> Iterator[str]:
    return iter(texts())


def build(section: str = BPE) -> tokenizers.Tokenizer:
    return tokenizers.build_tokenizer(recipe(source("made", path="."), tokenizer=section), documents)


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    return build()


def test_bpe_has_exactly_the_recipes_ids(bpe: tokenizers.Tokenizer) -> None:
    """Oracle: the recipe, with special ids together and scattered; every id below vocab_size is used once."""
    for section, ids in ((BPE, (0, 1, 2, 3)), (SCATTERED, (0, 299, 2, 77))):
        made = bpe if section is BPE else build(section)
        assert made.vocab_size == 300
        assert tuple(made.token_id(token) for token in CONTROLS) == ids
        assert (made.eos_id, made.pad_id) == (0, ids[1])
        vocabulary = made._backend.get_vocab()
        assert sorted(vocabulary.values()) == list(range(300))


def test_special_ids_do_not_change_the_merges(bpe: tokenizers.Tokenizer) -> None:
    """Oracle: the same text cut at the same places, whatever numbers the tokens bear."""
    scattered = build(SCATTERED)
    for text in texts(20, seed=9):
        pieces = [[made.decode([token_id]) for token_id in made.encode(text)] for made in (bpe, scattered)]
        assert pieces[0] == pieces[1]


def test_bpe_is_deterministic(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Oracle: another process, with other hash seeds and threads, makes the same hash."""
    program = "from tests.unit.data.test_tokenizer import build; print(build().sha256)"  # the same text, from its seed
    root = Path(__file__).resolve().parents[3]
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={"PATH": "", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == bpe.sha256


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_unicode_comes_back(bpe: tokenizers.Tokenizer, text: str) -> None:
    """Oracle: the text itself, for a tokenizer that never saw most of these characters."""
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.encode_batch([text, ""]) == [ids, []]


@given(parts=st.lists(st.one_of(st.sampled_from(CONTROLS), st.text("ab <|>_", max_size=5)), max_size=8))
def test_control_tokens_in_text_are_text(bpe: tokenizers.Tokenizer, parts: list[str]) -> None:
    """Oracle: no control id comes out of any text, and the text comes back."""
    text = "".join(parts)
    ids = bpe.encode(text)
    assert min(ids, default=4) > 3
    assert bpe.decode(ids, skip_special=True) == text


def test_saved_folder_loads_everywhere(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Oracle: transformers.AutoTokenizer has the same ids; its default parses control tokens, ours does not."""
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tokenizers.load_tokenizer(tmp_path)
    assert ours.sha256 == bpe.sha256
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 1, 300)
    for text in texts(20, seed=4):
        assert theirs(text).input_ids == ours.encode(text) == bpe.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert 3 in theirs("a<|im_end|>").input_ids
    assert 3 not in ours.encode("a<|im_end|>")
    theirs.save_pretrained(tmp_path / "again")
    assert tokenizers.load_tokenizer(tmp_path / "again").encode("abc abc") == ours.encode("abc abc")


def test_added_tokens_in_text_are_text(tmp_path: Path) -> None:
    """Oracle: single characters, for an added token that is not marked special; indents, of white space, stay."""
    from tokenizers import AddedToken, Tokenizer

    folder = character_folder(tmp_path / "made", " </>abkhint\n")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    backend.add_special_tokens([AddedToken("</a>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    section = f'kind = "hf"\nvocab_size = 15\neos_token = "</a>"\npad_token = "</a>"\npath = "{folder}"'
    made = build(section)
    made.save(tmp_path / "saved")
    for tokenizer in (made, tokenizers.load_tokenizer(tmp_path / "saved")):
        text = "a<think>\n    b </a>"
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode_batch([text])[0]
        assert [tokenizer.decode([token_id]) for token_id in ids] == [*"a<think>\n", "    ", *"b </a>"]
        assert tokenizer.decode(ids, skip_special=True) == text
    theirs = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert theirs.encode("a<think></a>").ids == [made.token_id("a"), made.token_id("<think>"), made.token_id("</a>")]


def test_unused_ids(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Oracle: the ids beyond the vocabulary and in its gaps."""
    from tokenizers import Tokenizer, models

    assert bpe.unused_ids(300) == [] and bpe.unused_ids(303) == [300, 301, 302]
    Tokenizer(models.BPE(vocab={"a": 0, "b": 3, "<|unused_4|>": 4}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    gappy = build(f'kind = "hf"\nvocab_size = 5\neos_token = "a"\npad_token = "b"\npath = "{tmp_path}"')
    assert gappy.unused_ids(6) == [1, 2, 4, 5]


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the tokenizer.json the hub would give, read as it is."""
    import huggingface_hub

    folder = character_folder(tmp_path / "snapshot", "ab")
    asked: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.update(name=name) or str(folder))
    made = build('kind = "hf"\nvocab_size = 2\neos_token = "a"\npad_token = "b"\npath = "someone/something"')
    assert asked == {"name": "someone/something"} and made.encode("abba") == [0, 1, 1, 0]


def test_too_little_text_for_the_vocabulary() -> None:
    """Oracle: the error names both sizes and the way out."""
    with pytest.raises(DataError, match=r"has \d+ ids and tokenizer.vocab_size is 5000: give it more text"):
        build(BPE.replace("300", "5000"))


def test_a_local_character_tokenizer(tmp_path: Path) -> None:
    """Oracle: a character's place in the alphabet."""
    alphabet = "\n abcdefghijklmnopqrstuvwxyz"
    section = f'kind = "hf"\nvocab_size = {len(alphabet)}\neos_token = "\\n"\npad_token = "\\n"\n'
    path = character_folder(tmp_path / "characters", alphabet)
    made = build(section + f'path = "{path}"')
    text = "to be\n\nor not"
    assert made.encode(text) == [alphabet.index(character) for character in text]
    assert made.decode(made.encode(text)) == text
    made.save(tmp_path / "saved")
    assert tokenizers.load_tokenizer(tmp_path / "saved").encode(text) == made.encode(text)
    with pytest.raises(DataError, match=r"has no '<\|endoftext\|>': set tokenizer\.eos_token") as caught:
        build(f'kind = "hf"\nvocab_size = 28\npath = "{path}"')
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match=r"28 ids and tokenizer\.vocab_size is 30"):
        build(section.replace("28", "30") + f'path = "{path}"')


def test_hf_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    """Oracle: the error names what was asked for and what would do."""
    (tmp_path / "tokenizer.json").write_text("[]")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "tokenizer.model"):
        with pytest.raises(DataError, match=rf"{path}' gives no tokenizer .*name a local folder"):
            build(f'kind = "hf"\nvocab_size = 28\npath = "{path}"')


def test_damaged_tokenizer_folder(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Oracle: the error names the folder."""
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=f"{tmp_path} holds no whole tokenizer"):
        tokenizers.load_tokenizer(tmp_path)


def byte_level_folder(folder: Path, **blocks: object) -> Path:
    """A folder of a trained tokenizer.json, some blocks of which are replaced."""
    build().save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= blocks.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(content | blocks))
    return folder


AROUND = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
LAST_USE: dict[str, dict[str, object]] = {
    "BPE dropout of 0.3": {"model": {"dropout": 0.3}},
    "truncation": {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    },
    "padding": {
        "padding": {
            "strategy": {"Fixed": 600},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    },
    "1 tokens around each text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": AROUND,
            "pair": AROUND,
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        },
    },
}


@pytest.mark.parametrize("setting", LAST_USE)
def test_ids_depend_on_the_text_alone(bpe: tokenizers.Tokenizer, tmp_path: Path, setting: str) -> None:
    """Oracle: the same tokenizer without that setting: its ids, each time, its hash, and the ids of what is exported;
    what was switched off is told.
    """
    from transformers import AutoTokenizer

    folder = byte_level_folder(tmp_path / "given", **LAST_USE[setting])
    told: list[str] = []
    made_from = recipe(source("made", path="."), tokenizer=BPE.replace('"bpe"', f'"hf"\npath = "{folder}"'))
    made = tokenizers.build_tokenizer(made_from, documents, told.append)
    assert len(told) == 1 and f"switched off: {setting}" in told[0]
    made.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts(5, seed=8):
        expected = bpe.encode(text)
        assert [made.encode(text) for _ in range(5)] == 5 * [expected]
        assert made.encode_batch([text]) == [expected] == [theirs(text).input_ids]
    assert made.sha256 == tokenizers.load_tokenizer(tmp_path / "saved").sha256 == bpe.sha256
    if setting != "1 tokens around each text":  # a base keeps its own
        assert tokenizers.load_tokenizer(folder).sha256 == bpe.sha256


def test_a_tokenizer_without_such_settings_keeps_its_hash(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Oracle: the hash of the file itself; a dropout of 0, which joins all, is no such setting."""
    folder = byte_level_folder(tmp_path, model={"dropout": 0.0})
    content = json.loads((folder / "tokenizer.json").read_text())
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert tokenizers.load_tokenizer(folder).sha256 == digest != bpe.sha256


def test_unigram_does_not_sample() -> None:
    """Oracle: the likeliest pieces, each time."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.Unigram([("<unk>", -9.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)], 0, False))
    backend.model.nbest_size, backend.model.alpha = 5, 0.1
    made = tokenizers.Tokenizer(backend, eos_token="a", pad_token="b")
    assert {tuple(made.encode("abab")) for _ in range(50)} == {(3, 3)}
    assert len(made.switched_off) == 1


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": 3}, "config.json": {"eos_token_id": 0}}, 3),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": [0]}}, 0),
        ({"generation_config.json": {"eos_token_id": [3, 0]}}, r"gives the ids 3 \('<\|im_end\|>'\), 0 \("),
        ({"config.json": {"eos_token_id": 9_999}}, r"gives the ids 9999 \(None\)"),
        ({}, "gives none either"),
    ],
)
def test_a_base_that_names_no_eos(
    bpe: tokenizers.Tokenizer, tmp_path: Path, configs: dict[str, dict[str, object]], expected: int | str
) -> None:
    """Oracle: the one id of the model's configuration; several, or none, are told with what would do."""
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None, "pad_token": None}))
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    if isinstance(expected, int):
        found = tokenizers.load_tokenizer(tmp_path)
        assert (found.eos_id, found.pad_id) == (expected, expected)
    else:
        with pytest.raises(DataError, match=f"names no eos_token, and .*{expected}.*add it there") as caught:
            tokenizers.load_tokenizer(tmp_path)
        assert "prepare it again" not in str(caught.value)
