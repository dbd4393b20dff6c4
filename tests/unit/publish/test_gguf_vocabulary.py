"""The tokenizer in a GGUF file: llama.cpp's ids are those of transformers, or the file is refused."""

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from ds_slm.data.tokenizers.byte_level import CL100K_PATTERN, GPT2_PATTERN, by_rank, byte_letters, filler
from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE, unmarked
from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE, IM_END, Tokenizer, load_tokenizer
from ds_slm.errors import DataError
from ds_slm.model.decoder import build
from ds_slm.publish import gguf as files
from ds_slm.publish.gguf_vocabulary import CHATML, read_vocabulary
from ds_slm.recipe import loading
from tests.support import conversations, scored_models
from tests.support.llama_cpp import LlamaCpp
from tests.unit.data import test_sentencepiece

pytestmark = pytest.mark.usefixtures("one_thread")

HARD = [
    "", " ", "   ", "\n", "\n\n \n", " \t  a", "a  b   c    ", "\r\n\r\n x", "\u00a0\u3000 \u2028x", "\0", "a\0b",
    "I'll we'VE don't 'S's'd 're", "0 12 345 6789 01234567890 3,141.59 1e-9 ½ ² ٣٤", "…!?!--==>> <| |> ``` §§",
    "def f(x):\n    return [i**2 for i in range(10)]  # comment\n\n\tif x:\n\t\tpass\n", "https://a.org/?q=a%20b&c",
    "Übersee, naïveté, Ångström, ﬁ, ß, İ, ǅ, e\u0301",
    "日本語のテキスト。中文 文本，한국어", "שלום עולם مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽x", "𝒳𝓎 𐍈 \U000e0041", "\u2581a \u2581\u2581 <0x0A> <0x41>", "\ufeffa\ufffd\u200b",
    "<|im_end|>", "a<|im_start|> user\n<|im_end|>b", "<|endoftext|><|endoftext|>", "<s> a</s>b <unk>", "</s",
    "<|im_end", "aaaaaaaaaaaaaaaaaaaaaaa", "abababab" * 9, "the cat sees the dog in the garden",
]  # fmt: skip
LETTERS = "aeé ßA'\t\n\r0129.,<|>_-日語한😀👍🏽\u00a0\u0301\u2581"
PIECES = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "the", "cat", " the", "  ", "'ll", "123"]


def texts() -> list[str]:
    """Hard ones, and random rows of letters and pieces."""
    rng = random.Random(0)
    return HARD + ["".join(rng.choices([*LETTERS, *PIECES], k=rng.randint(1, 40))) for _ in range(200)]


def byte_level(folder: Path) -> None:
    """A BPE of our own, with GPT-2's pattern."""
    conversations.tokenizer().save(folder)


def cl100k_like(folder: Path) -> None:
    """cl100k's pattern and its kind: tokens that no merges lead to, and fillers, on a small vocabulary."""
    learned = load_vocab(conversations.tokenizer())
    whole = ["".join(byte_letters()[byte] for byte in word) for word in (b" garden", b"12", b"\n\n\n", "日本".encode())]
    tokens = {token: place for place, token in enumerate([*learned, *(word for word in whole if word not in learned)])}
    specials = {"<|endoftext|>": len(tokens), "<|im_start|>": len(tokens) + 3, "<|im_end|>": len(tokens) + 4}
    others = {filler(number): number for number in (len(tokens) + 1, len(tokens) + 2)} | specials
    backend = by_rank(tokens, others, specials, CL100K_PATTERN, ignore_merges=True)
    Tokenizer(backend, "<|endoftext|>", "<|endoftext|>").save(folder)


def load_vocab(tokenizer: Tokenizer) -> list[str]:
    """The tokens that its text is made of, in their order."""
    vocab = json.loads(tokenizer._backend.to_str())["model"]["vocab"]
    return [token for token in sorted(vocab, key=vocab.__getitem__) if not token.startswith("<|")]


def hugging_face_bpe(folder: Path) -> None:
    """As the tokenizers package makes one: the pattern is not written, and <think> is text."""
    conversations.tokenizer().save(folder)
    change(folder, lambda content: content.update(pre_tokenizer=BYTE_LEVEL))
    change(folder, lambda content: content["added_tokens"].append(PLAIN))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
PLAIN = {"id": 320, "content": "<think>", "special": False} | FLAGS


def with_bos(folder: Path) -> None:
    """A base of others, whose tokenizer puts a BOS before each text."""
    scored_models.write_tokenizer(folder / "plain", HARD * 3)
    scored_models.with_bos(folder / "plain", folder / "bos")
    shutil.copytree(folder / "bos", folder, dirs_exist_ok=True)


def sentencepiece(folder: Path, **options: bool) -> None:
    """A converted SentencePiece model, with runs of spaces that share a score."""
    model = test_sentencepiece.write_model(folder / "a.model", **options)
    size = SentencePieceProcessor(model_file=str(model)).vocab_size()
    test_sentencepiece.build(model, size).save(folder)


def sentencepiece_without_prefix(folder: Path) -> None:
    """One that puts no space before a text, and joins words."""
    sentencepiece(folder, add_dummy_prefix=False, split_by_whitespace=False)


KINDS = [byte_level, cl100k_like, hugging_face_bpe, with_bos, sentencepiece, sentencepiece_without_prefix]
Make = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """The folder of a tokenizer of some kind, made once."""

    @cache
    def folder_of(make: Make) -> Path:
        folder = tmp_path_factory.mktemp(make.__name__)
        make(folder)
        return folder

    return folder_of


def loaded(folder: Path, vocab_size: int, out: Path) -> LlamaCpp:
    """A fresh model with a tokenizer, in llama.cpp."""
    shape = loading.parse(conversations.TINY, ["model.num_hidden_layers=1"]).model
    shape = shape.model_copy(update={"vocab_size": vocab_size})
    file = out / "tiny.gguf"
    files.prepare(shape, folder, "tiny", "f16").write(file, dict(build(shape, seed=1).named_parameters()))
    return LlamaCpp(file, 160)


def texts_with_other_ids(folder: Path, out: Path) -> list[str]:
    """Those of the texts whose ids in llama.cpp are others, with control tokens parsed or as plain text."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    llama_cpp = loaded(folder, ours.vocab_size + 3, out)

    def are_equal(text: str) -> bool:
        parsed = llama_cpp.ids(text) == theirs(text).input_ids
        if ours.plain_added_tokens:  # llama.cpp always finds those
            return parsed
        return parsed and llama_cpp.ids(text, parse_special=False, add_special=False) == ours.encode(text)

    return [text for text in texts() if not are_equal(text)]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_ids_are_those_of_transformers(make: Make, made: Callable[[Make], Path], tmp_path: Path) -> None:
    """Oracle: transformers with the same folder, and our encoder, to which control tokens are text."""
    assert texts_with_other_ids(made(make), tmp_path) == []


def test_ids_of_cl100k_are_those_of_transformers(cl100k_folder: Path, tmp_path: Path) -> None:
    """Oracle: transformers with the whole cl100k vocabulary."""
    assert texts_with_other_ids(cl100k_folder, tmp_path) == []


@pytest.mark.slow  # proving the conversion of the model takes most of it
def test_ids_of_32000_pieces_are_those_of_transformers(test_data: Path, tmp_path: Path) -> None:
    """Oracle: transformers with Mistral's SentencePiece model."""
    test_sentencepiece.build(test_data / "tokenizers" / "mistral_v1_tokenizer.model", 32_000).save(tmp_path)
    assert texts_with_other_ids(tmp_path, tmp_path) == []


def test_kinds_of_tokens(made: Callable[[Make], Path]) -> None:
    """Oracle: what the recipe says of each id; an id without a token, and a filler, stand for nothing."""
    tokenizer, kinds = load_tokenizer(made(cl100k_like)), gguf.TokenType
    vocabulary = read_vocabulary(made(cl100k_like), tokenizer.vocab_size + 2)
    assert vocabulary.model == "gpt2" and vocabulary.pre == "llama-bpe"
    assert vocabulary.types[: tokenizer.eos_id] == [kinds.NORMAL] * tokenizer.eos_id
    assert vocabulary.types[tokenizer.eos_id :] == [
        kinds.CONTROL, kinds.UNUSED, kinds.UNUSED, kinds.CONTROL, kinds.CONTROL, kinds.UNUSED, kinds.UNUSED
    ]  # fmt: skip
    assert vocabulary.ids == {"bos": tokenizer.eos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    assert vocabulary.chat_template is None


def test_a_conversation_begins_without_bos(tmp_path: Path) -> None:
    """Oracle: the ids of training, which begin with <|im_start|>, though the tokenizer puts a BOS before a text."""
    conversations.tokenizer().save(tmp_path)
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
    }
    change(tmp_path, lambda content: content.update(post_processor=post))
    assert read_vocabulary(tmp_path, 320).flags["add_bos_token"]
    (tmp_path / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE)
    assert not read_vocabulary(tmp_path, 320).flags["add_bos_token"]


THEIRS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{% generation %}{{ m['content'] }}{% endgeneration %}</t>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template that is not ours."""
SHIPPED = THEIRS.replace("{% generation %}", "{# #}").replace("{% endgeneration %}", "{# #}")


def in_the_file(folder: Path) -> None:
    """As transformers saves it, beside one of older times."""
    (folder / CHAT_TEMPLATE_FILE).write_text(THEIRS)
    in_the_configuration(folder, "an older one")


def in_the_configuration(folder: Path, template: Any = THEIRS) -> None:
    """As transformers saved it before."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def by_names(folder: Path) -> None:
    """One of several."""
    named = {"tool_use": "another", "default": THEIRS}
    in_the_configuration(folder, [{"name": name, "template": template} for name, template in named.items()])


@pytest.mark.parametrize("put", [in_the_file, in_the_configuration, by_names], ids=lambda put: put.__name__)
@pytest.mark.parametrize("make", [byte_level, with_bos], ids=lambda make: make.__name__)
def test_another_chat_template_is_written_as_it_is(
    make: Make, put: Make, made: Callable[[Make], Path], tmp_path: Path
) -> None:
    """Oracle: its own text, less the marks of training, whether or not the tokenizer has ChatML's tokens."""
    folder = shutil.copytree(made(make), tmp_path / "tokenizer")
    put(folder)
    vocabulary = read_vocabulary(folder, 400)
    assert vocabulary.chat_template == SHIPPED
    assert "eot" not in vocabulary.ids


@pytest.mark.parametrize("bos", ["{{ bos_token }}", "<|bos|>", ""])
def test_a_conversation_by_another_template_has_the_ids_of_transformers(
    bos: str, made: Callable[[Make], Path], tmp_path: Path
) -> None:
    """Oracle: transformers with the same folder; one BOS where the template writes it, none elsewhere."""
    folder = shutil.copytree(made(with_bos), tmp_path / "tokenizer")
    in_the_configuration(folder, SHIPPED.replace("{{ bos_token }}", bos))
    theirs = AutoTokenizer.from_pretrained(folder)
    llama_cpp = loaded(folder, load_tokenizer(folder).vocab_size, tmp_path)
    messages = [{"role": "user", "content": "the cat"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert llama_cpp.ids(llama_cpp.rendered(messages)) == expected
    assert expected.count(theirs.bos_token_id) == bool(bos)


def test_the_end_of_a_turn_is_the_one_that_the_folder_tells(made: Callable[[Make], Path], tmp_path: Path) -> None:
    """Oracle: the one id beside EOS in generation_config.json; ChatML's where the template writes it."""
    folder = shutil.copytree(made(byte_level), tmp_path / "tokenizer")
    in_the_configuration(folder)
    tokenizer = load_tokenizer(folder)
    for named, expected in ((tokenizer.eos_id, None), ([7, tokenizer.eos_id], 7), ([7, 8, tokenizer.eos_id], None)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert read_vocabulary(folder, 400).ids.get("eot") == expected
    in_the_configuration(folder, THEIRS.replace("</t>", IM_END))
    assert read_vocabulary(folder, 400).ids["eot"] == tokenizer.token_id(IM_END)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, unmarked(CHAT_TEMPLATE)], ids=["trained", "exported"])
def test_our_chat_template_is_written_plainly(template: str, made: Callable[[Make], Path], tmp_path: Path) -> None:
    """Oracle: the text that Ollama knows, of a run and of its export."""
    folder = shutil.copytree(made(byte_level), tmp_path / "tokenizer")
    (folder / CHAT_TEMPLATE_FILE).write_text(template)
    assert read_vocabulary(folder, 400).chat_template == CHATML


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    """Change a tokenizer's file."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def split_by(pattern: str) -> Callable[[Any], None]:
    """Changes the pattern."""
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


def put_a_merge_last(content: Any) -> None:
    """One of several that make the same piece."""
    merges = content["model"]["merges"]
    merges.append(merges.pop(next(place for place, pair in enumerate(merges) if len("".join(pair)) > 2)))


def as_unigram(content: Any) -> None:
    """The same tokens, joined by probabilities."""
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    vocab = [[token, -1.0] for token in tokens]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}


REFUSED = {
    "model": (byte_level, as_unigram, "its model is Unigram"),
    "pattern": (byte_level, split_by(r"\w+|\W+"), "cuts text by"),
    "prefix space": (
        byte_level,
        lambda c: c.update(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
        "cuts text",
    ),
    "normaliser": (byte_level, lambda content: content.update(normalizer={"type": "NFKC"}), "NFKC"),
    "strips": (byte_level, lambda c: c["added_tokens"][2].update(lstrip=True), "depends on what stands beside"),
    "whole pieces": (cl100k_like, split_by(GPT2_PATTERN), "merges do not lead to"),
    "words": (byte_level, lambda content: content["model"].update(end_of_word_suffix="</w>"), "marks the parts"),
    "merges": (sentencepiece, put_a_merge_last, "not those of scores"),
    "a merge less": (sentencepiece, lambda content: content["model"]["merges"].pop(), "not those of scores"),
    "spaces": (sentencepiece, lambda content: content.update(normalizer=None), "does not write spaces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_other_ids_is_refused(name: str, made: Callable[[Make], Path], tmp_path: Path) -> None:
    """Oracle: the reason, in the error; the same tokenizer is taken before the change."""
    make, edit, reason = REFUSED[name]
    shutil.copytree(made(make), tmp_path, dirs_exist_ok=True)
    read_vocabulary(tmp_path, 1000)
    change(tmp_path, edit)
    with pytest.raises(DataError, match=reason):
        read_vocabulary(tmp_path, 1000)
