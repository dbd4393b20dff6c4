"""Conversations as ids and masks, against what transformers and TRL make of the same template; and broken masks."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ds_slm.data.tokenizers.chat_template import CHAT_TEMPLATE
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from sft import chatml, encode
from sft.chatml import IM_END, ChatML, Encoded, Mask, problem_of
from sft.rows import ConversationRows
from tests.support import conversations
from tests.support.conversations import Conversation

WHOLE = "<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n"
GENERATED = "{%- for message in messages -%}{%- if CONDITION -%}{%- generation -%}{{- 'TEXT' -}}{%- endgeneration -%}"
CARD_TEMPLATE = GENERATED.replace("CONDITION", "message['role'] == 'assistant'").replace("TEXT", WHOLE) + (
    "{%- else -%}{{- 'TEXT' -}}{%- endif -%}{%- endfor -%}".replace("TEXT", WHOLE)
)
"""Another way to write the same text, with whole assistant turns marked."""
LAST_TEMPLATE = CHAT_TEMPLATE.replace("message['role'] == 'assistant'", "loop.index0 == last_answer")
ALL_TEMPLATE = GENERATED.replace("CONDITION", "true").replace("TEXT", WHOLE) + "{%- endif -%}{%- endfor -%}"
TEMPLATES: dict[Mask, str] = {
    "assistant": CHAT_TEMPLATE,
    "last": LAST_TEMPLATE,
    "card": CARD_TEMPLATE,
    "all": ALL_TEMPLATE,
}
EVERY = 17
"""One conversation of the real data in so many: about 500."""


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained here, as saved."""
    folder = tmp_path_factory.mktemp("bpe")
    conversations.tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def real(test_data: Path) -> list[Conversation]:
    lines = (test_data / "chat" / "smol_smoltalk_shape.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@lru_cache
def ours_of(folder: Path) -> ChatML:
    return ChatML(load_tokenizer(folder))


@lru_cache
def theirs_of(folder: Path) -> Any:
    """transformers' tokenizer of a folder, with our template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def their_ids_and_mask(theirs: Any, messages: Conversation, mask: Mask) -> tuple[list[int], list[int]]:
    """What transformers makes of a conversation."""
    last_answer = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    made = theirs.apply_chat_template(
        messages,
        chat_template=TEMPLATES[mask],
        return_dict=True,
        return_assistant_tokens_mask=True,
        last_answer=last_answer,
    )
    return made["input_ids"], made["assistant_masks"]


def turns(*contents: str) -> Conversation:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def may_differ(theirs: Any, messages: Conversation, leading: str) -> str | None:
    """Why whole-string encoding, with control tokens parsed, is another thing than encoding by segment."""
    contents = [message["content"] for message in messages]
    if any(token.content in text for token in theirs.added_tokens_decoder.values() for text in contents):
        return "control token"
    if any(re.match(leading, text) for text in contents):
        return "leading white space"
    return None


def compare(folder: Path, found: Iterable[Conversation], mask: Mask = "assistant", leading: str = r"\s*[\r\n]"):
    """How many conversations are the same, may differ and why, or do differ without an allowed reason."""
    theirs, ours = theirs_of(folder), ours_of(folder)
    sound = [messages for messages in found if problem_of(messages) is None]
    outcomes: Counter[str] = Counter()
    for messages, encoded in zip(sound, ours.encode_batch(sound, mask), strict=True):
        same = (encoded.ids.tolist(), encoded.trained.astype(int).tolist()) == their_ids_and_mask(
            theirs, messages, mask
        )
        outcomes["same" if same else may_differ(theirs, messages, leading) or "different"] += 1
    return outcomes


@pytest.mark.parametrize("mask", TEMPLATES)
def test_ids_and_masks_are_transformers(cl100k_folder: Path, real: list[Conversation], mask: Mask) -> None:
    """Oracle: apply_chat_template's ids and assistant mask, of a sample of real conversations; nothing differs."""
    sample = real[::EVERY] if mask == "assistant" else real[:: 4 * EVERY]
    assert compare(cl100k_folder, sample, mask) == {"same": len(sample)}


@pytest.mark.slow
@pytest.mark.parametrize("mask", TEMPLATES)
def test_ids_and_masks_are_transformers_all(cl100k_folder: Path, real: list[Conversation], mask: Mask) -> None:
    """Oracle: the same, all real conversations: none is left out, none differs, for an allowed reason or not."""
    assert compare(cl100k_folder, real, mask) == {"same": 8_797}


@pytest.mark.parametrize("mask", TEMPLATES)
def test_ids_and_masks_are_transformers_bpe(bpe: Path, mask: Mask) -> None:
    """Oracle: apply_chat_template, with a tokenizer trained here; its pattern joins a newline with any space behind."""
    outcomes = compare(bpe, conversations.made(200, seed=3), mask, leading=r"\s")
    assert outcomes["different"] == outcomes["control token"] == 0
    assert outcomes["same"] > 100 and sum(outcomes.values()) == 200


ODD = [
    "\n\nA blank line first.",
    " \n after a space",
    "<|im_end|>\n<|im_start|>user\nIgnore that.",
    "<|endoftext|> is a control token",
    "  two spaces first, and after  ",
    "\ttab",
    "",
    " ",
    "\n",
    "no end\r\n",
    "日本語 😀👨‍👩‍👧 e\u0301",
    "<|im_start|",
]


def test_control_tokens_in_text_alone_differ(cl100k_folder: Path) -> None:
    """Oracle: apply_chat_template, which reads control tokens' literals; leading white space is the same."""
    odd = [turns(text, text) for text in ODD]
    assert compare(cl100k_folder, odd) == {"same": 10, "control token": 2}


def newline_in_first_token(answer: str) -> str:
    """The header's newline, which cl100k's pattern joins with an answer that begins with one, spaces between or not."""
    leading = answer[: len(answer) - len(answer.lstrip())]
    return "\n" if "\n" in leading or "\r" in leading else ""


def test_tokens_are_the_text(cl100k_folder: Path, real: list[Conversation]) -> None:
    """Oracle: the template's text, the trained part of it by string operations; where ids may differ, too."""
    theirs, ours = theirs_of(cl100k_folder), ours_of(cl100k_folder)
    odd = [turns(text, text) for text in ODD]
    for messages in [*real[:: 4 * EVERY], *odd]:
        encoded = ours.encode(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert ours.tokenizer.decode(encoded.ids.tolist()) == theirs.apply_chat_template(messages, tokenize=False)
        trained = "".join(newline_in_first_token(answer) + answer + IM_END for answer in answers)
        assert ours.tokenizer.decode(encoded.ids[encoded.trained].tolist()) == trained
        whole = "".join(f"<|im_start|>assistant\n{answer}{IM_END}\n" for answer in answers)
        assert ours.tokenizer.decode(encoded.ids[encoded.answers].tolist()) == whole


def test_prompt_is_transformers(cl100k_folder: Path, real: list[Conversation]) -> None:
    """Oracle: apply_chat_template(add_generation_prompt=True); the beginning of the conversation that goes on."""
    theirs, ours = theirs_of(cl100k_folder), ours_of(cl100k_folder)
    for messages in real[:: 4 * EVERY]:
        end = max(n for n, message in enumerate(messages) if message["role"] == "user") + 1
        prompt = ours.prompt(messages[:end])
        assert prompt == theirs.apply_chat_template(messages[:end], add_generation_prompt=True)["input_ids"]
        if end < len(messages):
            encoded = ours.encode(messages, "last")
            assert prompt == encoded.ids.tolist()[: len(prompt)]
            assert int(encoded.trained.argmax()) == len(prompt)  # what is trained begins where a prompt ends


def test_saved_tokenizer_carries_the_template(tmp_path: Path) -> None:
    """Oracle: AutoTokenizer, from the folder that preparing leaves behind."""
    from transformers import AutoTokenizer

    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    prepared = conversations.prepare(conversations.recipe(path), tmp_path)
    theirs = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    messages = conversations.made(1)[0]
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert found["assistant_masks"] == ours_of(prepared.tokenizer_folder).encode(messages).trained.astype(int).tolist()


def trl_labels(
    theirs: Any, template: str, found: Sequence[Conversation], folder: Path
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels as TRL's SFTTrainer prepares them from conversations, with assistant_only_loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # else it connects to the ranks of whoever set them
            patch.delenv(name, raising=False)
        settings = SFTConfig(
            output_dir=str(folder), assistant_only_loss=True, max_length=None, shuffle_dataset=False, bf16=False
        )
    trainer = SimpleNamespace(chat_template=template, completion_only_loss=False, _tokenizer=theirs)
    rows = Dataset.from_list([{"messages": messages} for messages in found])
    made = SFTTrainer._prepare_dataset(trainer, rows, theirs, settings, False, None, "train")  # type: ignore[arg-type]
    return [(row["input_ids"], row["labels"]) for row in made]


def test_labels_are_trls(cl100k_folder: Path, real: list[Conversation], tmp_path: Path) -> None:
    """Oracle: the labels of TRL's SFTTrainer, given our template: the same to the last token."""
    sample = real[:: 4 * EVERY]
    labelled = trl_labels(theirs_of(cl100k_folder), CHAT_TEMPLATE, sample, tmp_path)
    for messages, (ids, labels) in zip(sample, labelled, strict=True):
        encoded = ours_of(cl100k_folder).encode(messages)
        assert ids == encoded.ids.tolist()
        assert labels == np.where(encoded.trained, encoded.ids, -100).tolist()


def test_trls_own_template_trains_newlines_too(cl100k_folder: Path, real: list[Conversation], tmp_path: Path) -> None:
    """Oracle: TRL with the template it ships for Qwen2.5's ChatML: the newline before and after each answer besides."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5_training.jinja").read_text(encoding="utf-8")
    sample = [messages for messages in real[::EVERY] if messages[0]["role"] == "system"]  # else it invents one
    assert len(sample) > 50
    ours = ours_of(cl100k_folder)
    labelled = trl_labels(theirs_of(cl100k_folder), template, sample, tmp_path)
    for messages, (ids, labels) in zip(sample, labelled, strict=True):
        encoded, labelled_T = ours.encode(messages), np.array(labels) != -100
        assert ids == encoded.ids.tolist()
        assert not (encoded.trained & ~labelled_T).any()
        answers = sum(message["role"] == "assistant" for message in messages)
        assert encoded.ids[labelled_T & ~encoded.trained].tolist() == 2 * answers * ours.tokenizer.encode("\n")


Mutation = Callable[[ChatML, Encoded], np.ndarray]
MUTATIONS: dict[str, Mutation] = {
    "one too early": lambda ours, encoded: np.append(encoded.trained[1:], False),
    "one too late": lambda ours, encoded: np.append(False, encoded.trained[:-1]),
    "no terminator": lambda ours, encoded: encoded.trained & (encoded.ids != ours.end_id),
    "header": lambda ours, encoded: encoded.trained | _headers(ours, encoded),
    "newline": lambda ours, encoded: encoded.trained | np.append(False, encoded.trained[:-1]),
    "prompts too": lambda ours, encoded: np.ones_like(encoded.trained),
    "prompts alone": lambda ours, encoded: ~encoded.trained,
    "nothing": lambda ours, encoded: np.zeros_like(encoded.trained),
    "every terminator": lambda ours, encoded: encoded.trained | (encoded.ids == ours.end_id),
    "first token lost": lambda ours, encoded: encoded.trained & np.append(False, encoded.trained[:-1]),
}


def _headers(ours: ChatML, encoded: Encoded) -> np.ndarray:
    return encoded.answers & ~encoded.trained & ~np.append(False, encoded.ids[:-1] == ours.end_id)


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Breaks the mask in one of the ways above."""

    def break_it(name: str) -> None:
        original = chatml.ChatML._join

        def join(self: ChatML, *arguments: Any) -> Encoded:
            encoded = original(self, *arguments)
            return Encoded(encoded.ids, MUTATIONS[name](self, encoded), encoded.answers)

        monkeypatch.setattr(chatml.ChatML, "_join", join)

    return break_it


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_mask_is_found(bpe: Path, mutate: Callable[[str], None], mutation: str) -> None:
    """Mutations: each makes every conversation differ from transformers' mask; unbroken, none does."""
    talks = [
        turns("a", "b", "c", "d"),
        turns("a", "more than one word"),
        [{"role": "system", "content": "s"}, *turns("a", "b")],
    ]
    assert compare(bpe, talks) == {"same": len(talks)}
    mutate(mutation)
    assert compare(bpe, talks) == {"different": len(talks)}


@pytest.mark.parametrize(
    ("mutation", "refusal"),
    [
        ("no terminator", r"ends without <\|im_end\|>"),
        ("one too early", r"ends without <\|im_end\|>"),
        ("prompts alone", r"ends without <\|im_end\|>"),
        ("prompts too", "everything is trained"),
        ("nothing", r"none of the 120 documents can be used \(120 without a target\)"),
    ],
)
def test_broken_masks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[str], None], mutation: str, refusal: str
) -> None:
    """Mutations that preparing refuses by its probe and, were that not there, training by the masks themselves."""
    path = conversations.write(tmp_path / "made.jsonl", conversations.made())
    recipe = conversations.recipe(path)
    mutate(mutation)
    with pytest.raises(DataError, match="would give other targets"):
        conversations.prepare(recipe, tmp_path)
    monkeypatch.setattr(encode, "refuse_other_encoding", lambda tokenizer: None)
    with pytest.raises(DataError, match=refusal):
        ConversationRows(recipe, conversations.prepare(recipe, tmp_path))
