"""Conversations in tokenizers whose ids depend on what stands before: as the exported chat template, or refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ds_slm.data.tokenizers.control_text import ControlText
from ds_slm.data.tokenizers.sentencepiece import read_sentencepiece
from ds_slm.data.tokenizers.tokenizer import IM_END, IM_START, Tokenizer
from ds_slm.errors import DataError
from sft import chatml, probe
from sft.chatml import ChatML, Encoded
from tests.support import conversations
from tests.unit.data.test_sentencepiece import write_model

SPACE = "\u2581"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama-style tokenizer.json, from a small SentencePiece model."""
    path = write_model(tmp_path_factory.mktemp("model") / "tokenizer.model")
    return read_sentencepiece(path).to_str()


def assistant(tokenizer_json: str, change: Callable[[Backend], None] = lambda backend: None, **flags: Any) -> Tokenizer:
    backend = Backend.from_str(tokenizer_json)
    change(backend)
    backend.add_special_tokens([AddedToken(token, special=True, **flags) for token in (IM_START, IM_END)])
    return Tokenizer(backend, "</s>", "<unk>")


def metaspace(scheme: str, *steps: Any) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        backend.normalizer = normalizers.Sequence(list(steps))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)

    return change


def stripped(backend: Backend) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", SPACE)])


ACCEPTED: dict[str, tuple[Callable[[Backend], None], dict[str, bool]]] = {
    "legacy prefix": (lambda backend: None, {"normalized": False}),
    "metaspace always": (metaspace("always"), {"normalized": False}),
    "metaspace first": (metaspace("first"), {"normalized": False}),
    "metaspace never": (metaspace("never"), {"normalized": False}),
    "NFKC": (metaspace("first", normalizers.NFKC()), {"normalized": False}),
    "strips before a token": (lambda backend: None, {"normalized": False, "lstrip": True}),
    "strips behind a token": (metaspace("first"), {"normalized": False, "rstrip": True}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_prefix_space_tokenizers_are_as_the_template(llama: str, name: str) -> None:
    """Oracle: the probe's, transformers' apply_chat_template: ids, targets and prompts."""
    change, flags = ACCEPTED[name]
    made = assistant(llama, change, **flags)
    assert not made.cuts_alone
    probe.refuse_other_encoding(made)


@pytest.mark.parametrize(
    ("change", "flags"),
    [(stripped, {"normalized": False}), (lambda backend: None, {"single_word": True, "normalized": False})],
)
def test_what_the_template_would_give_otherwise_is_refused(
    llama: str, change: Callable[[Backend], None], flags: dict[str, bool]
) -> None:
    """Oracle: transformers; a normalizer that drops a turn's newline, and a token that is none beside a word."""
    with pytest.raises(
        DataError, match=r"the export's chat template would give other .* For the turns .* training has"
    ):
        probe.refuse_other_encoding(assistant(llama, change, **flags))


def test_a_control_token_that_is_not_an_added_one_is_refused(llama: str) -> None:
    """Oracle: the reason, and the way out."""
    content = json.loads(llama)
    content["model"]["vocab"] |= {IM_START: 9_000, IM_END: 9_001}
    made = Tokenizer(Backend.from_str(json.dumps(content)), "</s>", "<unk>")
    with pytest.raises(DataError, match=r"not among its added tokens.*add it there") as caught:
        probe.refuse_other_encoding(made)
    assert len(caught.value.problems) == 2


def test_turns_encoded_alone_are_found(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: header and content each encoded alone, as if nothing depended on what stands before."""

    def alone(self: ChatML, found: Any, mask: Any) -> list[Encoded]:
        encode = self.tokenizer.encode
        segments = [[encode(turn["role"] + "\n") + encode(turn["content"]) for turn in turns] for turns in found]
        return [self._join(turns, ids, mask) for turns, ids in zip(found, segments, strict=True)]  # type: ignore[misc]

    monkeypatch.setattr(chatml.ChatML, "_encode_whole", alone)
    monkeypatch.setattr(chatml.ChatML, "_newline", property(lambda self: self.tokenizer.encode("\n")))
    with pytest.raises(DataError, match="would give other ids"):
        probe.refuse_other_encoding(assistant(llama, normalized=False))


ADDED = {
    "a reasoning token": AddedToken("<think>", special=False, normalized=False),
    "a word": AddedToken("zyx", special=False, normalized=True),
    "a whole word": AddedToken("zyx", special=False, single_word=True),
    "indents": AddedToken("   ", special=False, normalized=True),
    "swallows spaces": AddedToken("<tool_call>", special=False, lstrip=True, rstrip=True),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_in_contents_have_their_ids(name: str) -> None:
    """Oracle: the probe's, transformers' apply_chat_template, for a byte-level BPE; and the token's own id, counted."""
    token = ADDED[name]
    backend = Backend.from_str(conversations.tokenizer()._backend.to_str())
    backend.add_tokens([token])
    made = Tokenizer(backend, "<|endoftext|>", "<|pad|>")
    probe.refuse_other_encoding(made)
    talk = [{"role": "user", "content": "b"}, {"role": "assistant", "content": f"{token.content} b"}]
    encoded = ChatML(made).encode(talk)
    assert (encoded.ids[encoded.trained] == made.token_id(token.content)).sum() == 1
    if token.content.strip():
        assert made.token_id(token.content) not in made.encode(f"{token.content} b")  # a document's text is text


def test_the_probe_covers_added_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: their literals encoded as letters, as in a document."""
    backend = Backend.from_str(conversations.tokenizer()._backend.to_str())
    backend.add_tokens([AddedToken("<think>", special=False)])
    made = Tokenizer(backend, "<|endoftext|>", "<|pad|>")
    text = made._encoder
    monkeypatch.setattr(Tokenizer, "control_text", lambda self, tokens: ControlText(text, tokens, []))
    with pytest.raises(DataError, match=r"<think>.*training has"):
        probe.refuse_other_encoding(made)


def test_an_eos_is_text_however_it_is_marked() -> None:
    """Oracle: counting: a literal of an EOS that is not marked special gives no EOS in a conversation."""
    content = json.loads(conversations.tokenizer()._backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in (IM_START, IM_END)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9_000, "content": "<t>", "special": False})
    made = Tokenizer(Backend.from_str(json.dumps(content)), "<|endoftext|>", "<|pad|>")
    assert made.plain_added_tokens == ["<t>"]
    ids = ChatML(made).encode([{"role": "user", "content": "<|endoftext|> <|pad|> <t>"}]).ids.tolist()
    assert (ids.count(made.eos_id), ids.count(made.pad_id), ids.count(made.token_id("<t>"))) == (0, 0, 1)


def test_both_ways_to_encode_agree() -> None:
    """Oracle: the one for any tokenizer, against the fast one for those whose text can be encoded alone."""
    ours = ChatML(conversations.tokenizer())
    talks = [*conversations.made(60, seed=4), *probe.hard_conversations()]
    for mask in ("assistant", "last", "card", "all"):
        for fast, whole in zip(ours.encode_batch(talks, mask), ours._encode_whole(talks, mask), strict=True):
            for field in ("ids", "trained", "answers"):
                assert getattr(fast, field).tolist() == getattr(whole, field).tolist()
