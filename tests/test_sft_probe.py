"""Conversations in tokenizers whose ids depend on what stands before: as the exported chat template, or refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ds_slm.data.sentencepiece_model import read_sentencepiece
from ds_slm.data.tokenizer import IM_END, IM_START, Tokenizer
from ds_slm.errors import DataError
from sft import chatml, probe
from sft.chatml import ChatML, Encoded
from tests import conversations
from tests.test_data_sentencepiece import write_model

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


def test_both_ways_to_encode_agree() -> None:
    """Oracle: the one for any tokenizer, against the fast one for those whose text can be encoded alone."""
    ours = ChatML(conversations.tokenizer())
    talks = [*conversations.made(60, seed=4), *probe.hard_conversations()]
    for mask in ("assistant", "last", "card", "all"):
        for fast, whole in zip(ours.encode_batch(talks, mask), ours._encode_whole(talks, mask), strict=True):
            for field in ("ids", "trained", "answers"):
                assert getattr(fast, field).tolist() == getattr(whole, field).tolist()
