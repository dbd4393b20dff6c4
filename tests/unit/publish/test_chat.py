"""A conversation: the ids it is read as, what comes back, what is kept, what is forgotten."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

from ds_slm.cli.speaking import speaker_of
from ds_slm.data.tokenizers.tokenizer import IM_END, Tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError, ConfigError, DataError
from ds_slm.publish.chat import UNFINISHED, Conversation, Speaker, TextStream
from ds_slm.publish.generate import Chooser, Reader
from ds_slm.publish.models import open_model
from ds_slm.publish.sampling import GREEDY, Sampling, Settings
from sft.chatml import ChatML
from tests.support.assistants import CITIES, CONTEXT, Assistant, Messages, chat

pytestmark = pytest.mark.usefixtures("one_thread")
LIKELIEST = Settings(temperature=0, max_new_tokens=40)
A, B = 257, 258
"""Tokens of one letter, behind those of bytes and one that is special."""
QUESTIONS = [f"what is the capital of {country}?" for country in CITIES]


@pytest.fixture(scope="module")
def speaker(assistant: Assistant) -> Speaker:
    return speaker_of(open_model(assistant.export), assistant.export, False, torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(assistant: Assistant) -> Any:
    """transformers' model and tokenizer of the same export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(assistant.export), AutoTokenizer.from_pretrained(assistant.export)


@pytest.fixture
def lengths(speaker: Speaker) -> Iterator[list[int]]:
    """How many ids each forward of the model reads."""
    found: list[int] = []
    handle = speaker.model.register_forward_pre_hook(lambda model, args: found.append(args[0].shape[1]))
    yield found
    handle.remove()


def answer(conversation: Conversation, question: str) -> str:
    """The whole of an answer."""
    text = "".join(conversation.ask(question))
    assert conversation.answer is not None and conversation.answer.text == text
    return text


def as_if_new(conversation: Conversation, turns: Messages) -> Conversation:
    """A conversation that says the same, and has read nothing yet."""
    made = Conversation(conversation.speaker, conversation.settings, conversation.system)
    made.turns = list(turns)
    return made


@pytest.mark.parametrize(
    "messages",
    [
        chat("a"),
        chat("what is the cat?", "it is 日本.", "naïve?"),
        chat(" spaces \n\n around ", "\tTabs\t", "é🏔️", system="be brief.\nAnd kind."),
        chat("", "", "again"),
    ],
    ids=["short", "turns", "white space", "empty"],
)
def test_a_conversation_has_the_ids_of_the_exported_template(
    messages: Messages, speaker: Speaker, theirs: Any, assistant: Assistant
) -> None:
    """Oracle: transformers' apply_chat_template on the export; and the encoding of training."""
    expected = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert speaker.render(messages) == list(expected)
    assert speaker.render(messages) == ChatML(load_tokenizer(assistant.run / "tokenizer")).prompt(messages)


def test_a_control_token_that_is_typed_stays_text(speaker: Speaker) -> None:
    """Oracle: its id stands in the prompt as often as turns end."""
    end_id = speaker.tokenizer.token_id(IM_END)
    assert speaker.render(chat(f"a{IM_END}b", "c", "d")).count(end_id) == 3


@pytest.mark.parametrize("system", [None, "be brief."])
def test_answers_are_those_of_transformers(system: str | None, speaker: Speaker, theirs: Any) -> None:
    """Oracle: transformers' greedy generate, with the export's own two ends, over four turns."""
    model, tokenizer = theirs
    conversation = Conversation(speaker, LIKELIEST, system)
    for question in QUESTIONS[:4]:
        messages = [*conversation.messages, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer(conversation, question) == tokenizer.decode(output, skip_special_tokens=True)
        assert conversation.answer is not None
        assert conversation.answer.tokens == len(output)
        assert conversation.answer.stopped_by == IM_END


def test_the_assistant_knows_what_it_was_taught(speaker: Speaker) -> None:
    """Oracle: the conversations it was trained on: the other tests compare real answers, not noise."""
    for country, city in CITIES.items():
        assert answer(Conversation(speaker, LIKELIEST), f"what is the capital of {country}?") == f"it is {city}."


def test_a_turn_reads_only_what_is_new(speaker: Speaker, lengths: list[int]) -> None:
    """Oracle: the numbers of ids in each forward; the same text from a conversation without a cache."""
    conversation = Conversation(speaker, LIKELIEST, "be brief.")
    answer(conversation, QUESTIONS[0])
    assert conversation.answer is not None
    known = conversation.answer.prompt_tokens + conversation.answer.tokens - 1  # the end was drawn, and never read
    turns = list(conversation.turns)
    lengths.clear()

    text = answer(conversation, QUESTIONS[1])
    assert conversation.answer is not None
    assert lengths == [conversation.answer.prompt_tokens - known, *[1] * (conversation.answer.tokens - 1)]
    assert answer(as_if_new(conversation, turns), QUESTIONS[1]) == text


def test_the_oldest_turns_are_forgotten_and_the_system_prompt_stays(speaker: Speaker) -> None:
    """Oracle: the answer of a conversation that begins with the turns that are left; every prompt fits."""
    conversation = Conversation(speaker, LIKELIEST, "be brief.")
    forgotten = 0
    for question in QUESTIONS * 3:
        text = answer(conversation, question)
        assert conversation.answer is not None
        forgotten += conversation.answer.forgotten_turns
        assert conversation.answer.prompt_tokens + conversation.answer.tokens <= CONTEXT + 1
        left = as_if_new(conversation, conversation.turns[forgotten:-2])
        assert answer(left, question) == text
        assert left.answer is not None and left.answer.prompt_tokens == conversation.answer.prompt_tokens
        assert left.answer.forgotten_turns == 0
    assert 2 <= forgotten < len(conversation.turns)
    assert len(conversation.messages) == 1 + 6 * len(QUESTIONS)  # all of it can be saved


def test_an_answer_that_fills_the_context_forgets_turns_and_then_ends(speaker: Speaker) -> None:
    """Oracle: arithmetic: a model that never ends uses every position once nothing is left to forget."""
    endless = replace(speaker, stop_ids=frozenset())
    conversation = Conversation(endless, replace(LIKELIEST, max_new_tokens=10 * CONTEXT))
    conversation.turns = chat(QUESTIONS[0], "it is Paris.")
    answer(conversation, QUESTIONS[1])
    alone = len(speaker.render(chat(QUESTIONS[1])))
    assert conversation.answer is not None
    assert conversation.answer.stopped_by == "context"
    assert conversation.answer.forgotten_turns == 2
    assert conversation.answer.tokens == CONTEXT - alone + 1


def test_the_longest_answer_is_as_long_as_was_asked_for(speaker: Speaker) -> None:
    """Oracle: the first tokens of the whole answer."""
    conversation = Conversation(speaker, replace(LIKELIEST, max_new_tokens=3))
    text = answer(conversation, QUESTIONS[0])
    assert conversation.answer is not None
    assert (conversation.answer.tokens, conversation.answer.stopped_by) == (3, "max_new_tokens")
    assert text and "it is Paris.".startswith(text)


@pytest.mark.parametrize("system", [None, "be brief."])
def test_a_question_longer_than_the_context_is_told(system: str | None, speaker: Speaker) -> None:
    """Oracle: its length in tokens; the conversation is as before."""
    conversation = Conversation(speaker, LIKELIEST, system)
    before = answer(conversation, QUESTIONS[0])
    long = "cat " * CONTEXT
    messages = [*conversation.messages[: system is not None], {"role": "user", "content": long}]
    with pytest.raises(DataError, match=rf"{len(speaker.render(messages))} tokens.* context {CONTEXT}: shorten it"):
        answer(conversation, long)
    assert len(conversation.turns) == 2
    assert conversation.undo() == QUESTIONS[0]
    assert answer(conversation, QUESTIONS[0]) == before


def test_undo_and_reset_leave_nothing(speaker: Speaker) -> None:
    """Oracle: a conversation in which it was never said."""
    conversation = Conversation(speaker, LIKELIEST, "be brief.")
    assert conversation.undo() is None
    first = answer(conversation, QUESTIONS[0])
    second = answer(conversation, QUESTIONS[1])
    assert conversation.undo() == QUESTIONS[1]
    assert answer(conversation, QUESTIONS[1]) == second
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief."}]
    assert answer(conversation, QUESTIONS[0]) == first


LONG = "cat " * 36
"""Fills most of the context."""


def test_undo_brings_back_what_was_forgotten_for_it(speaker: Speaker) -> None:
    """Oracle: the length of the prompt, and the answer, in a conversation that never heard the long question."""
    conversation, other = Conversation(speaker, LIKELIEST), Conversation(speaker, LIKELIEST)
    for one in (conversation, other):
        answer(one, QUESTIONS[0])
    answer(conversation, LONG)
    assert conversation.answer is not None and conversation.answer.forgotten_turns == 2
    conversation.undo()
    assert answer(conversation, QUESTIONS[1]) == answer(other, QUESTIONS[1])
    assert other.answer is not None and conversation.answer.prompt_tokens == other.answer.prompt_tokens


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(speaker: Speaker) -> None:
    """Oracle: a conversation with that turn in it."""
    conversation = Conversation(speaker, LIKELIEST)
    pieces = conversation.ask(QUESTIONS[0])
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.answer is not None
    assert (conversation.answer.stopped_by, conversation.turns[-1]["content"]) == ("interrupt", said)
    new = as_if_new(conversation, conversation.turns)
    assert answer(conversation, QUESTIONS[1]) == answer(new, QUESTIONS[1])


def test_a_question_that_is_stopped_before_its_answer_is_taken_back(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: no turn is left."""
    conversation = Conversation(speaker, LIKELIEST)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(conversation, QUESTIONS[0])
    assert (conversation.turns, conversation.answer) == ([], None)


def test_the_same_seed_gives_the_same_conversation(speaker: Speaker) -> None:
    """Oracle: another conversation of the same seed, and one of another."""

    def said(seed: int) -> list[str]:
        conversation = Conversation(speaker, Settings(temperature=3.0, seed=seed, max_new_tokens=12))
        return [answer(conversation, question) for question in QUESTIONS[:2]]

    assert said(1) == said(1) != said(2)


def test_a_penalty_does_not_keep_an_answer_from_its_end() -> None:
    """Oracle: the likeliest token, which is known and ends the text; another id that is known is punished."""
    logits_V = torch.tensor([1.0, 3.0, 2.9])
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert Chooser(sampling, stop_ids={1}).choose(logits_V.clone(), [0, 1]) == 1
    assert Chooser(sampling).choose(logits_V.clone(), [0, 1]) == 2


def test_a_reader_gives_the_logits_of_a_whole_forward(speaker: Speaker) -> None:
    """Oracle: a forward without a cache, whatever was read before: more, less, something else."""
    reader = Reader(speaker.model)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, 300, (60,), generator=generator).tolist()
    for prompt in (ids, ids[:20], [*ids[:20], 7, 8], [9], [9, 9], [9, 9], ids):
        with torch.no_grad():
            expected_V = speaker.model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(reader.read(prompt), expected_V, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_finite_are_told(assistant: Assistant) -> None:
    """Oracle: the sentence instead of an answer."""
    model = open_model(assistant.export).decoder(torch.device("cpu"))
    assert not model.training
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        Reader(model).read([5])


@hypothesis.given(strategies.text(max_size=40))
def test_streamed_text_has_only_whole_characters(text: str) -> None:
    """Oracle: the text itself, from ids of single bytes: every piece is text, and all pieces are all of it."""
    tokenizer = _bytes_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(number) for number in tokenizer.encode(text)]
    if UNFINISHED not in text:
        assert all(UNFINISHED not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text == stream.text


@hypothesis.given(strategies.lists(strategies.integers(0, 256), max_size=30))
def test_streamed_bytes_that_are_no_text_come_in_the_end(ids: list[int]) -> None:
    """Oracle: the tokenizer's own decoding of all bytes at once, control tokens left out."""
    tokenizer = _bytes_tokenizer()
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special=True)


def test_a_streamed_character_that_is_taken_back_comes_once() -> None:
    """Oracle: the text. With byte fallback a whole character is no text again, until the bytes behind it are whole."""
    tokenizer = _fallback_tokenizer()
    assert tokenizer.decode([*"€".encode(), 0xE2]) == UNFINISHED * 4
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, "€€x".encode())) == "€€x"


def test_text_goes_on_behind_characters_that_an_invalid_byte_takes_along() -> None:
    """Oracle: the tokenizer's decoding of all tokens, as soon as one that is whole follows."""
    stream, tokenizer = TextStream(_fallback_tokenizer()), _fallback_tokenizer()
    ids = [A, 0xC3, 0xA9, 0xC3, B, A, B]
    assert tokenizer.decode(ids) == f"a{UNFINISHED * 3}bab"
    assert [*map(stream.push, ids)] == ["a", "", "é", "", f"{UNFINISHED * 3}b", "a", "b"]
    assert (stream.finish(), stream.text) == ("", tokenizer.decode(ids))


@hypothesis.given(strategies.lists(strategies.sampled_from([A, B, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]), max_size=30))
def test_what_is_remembered_of_streamed_bytes_is_their_decoding(ids: list[int]) -> None:
    """Oracle: the tokenizer's own decoding; behind a token that is whole, and in the end."""
    stream, tokenizer = TextStream(_fallback_tokenizer()), _fallback_tokenizer()
    for place, number in enumerate(ids, start=1):
        stream.push(number)
        if number in (A, B):
            assert stream.text == tokenizer.decode(ids[:place])
    last = stream.finish()
    assert stream.text == tokenizer.decode(ids) and stream.text.endswith(last)


@cache
def _fallback_tokenizer() -> Tokenizer:
    """Byte fallback: one token for each byte, one that is special, and two letters."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<eos>": 256, "a": A, "b": B}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend, "<eos>", "<eos>")


@cache
def _bytes_tokenizer() -> Tokenizer:
    """One token for each byte, and one that is special."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    from ds_slm.data.tokenizers.byte_level import byte_letters

    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, "<eos>", "<eos>")


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("temprature=1", "the nearest is 'temperature'"),
        ("temperature", "expected KEY=VALUE"),
        ("temperature=warm", "temperature is 'warm': expected a number, 0, or 0.001 to 1000"),
        ("temperature=-1", "temperature is -1.0: expected 0, or 0.001 to 1000"),
        ("temperature=nan", "temperature is nan"),
        ("temperature=1e-40", "temperature is 1e-40"),
        ("top_k=99999999999999999999", "0 or more, and less than 2**31"),
        ("repetition_penalty=1e-40", "repetition_penalty is 1e-40: expected 0.01 to 100"),
        ("max-new-tokens=99999999999999999999", "1 or more, and less than 2**31"),
        ("top_k=1.5", "expected a whole number"),
        ("top_p=0", "more than 0, and 1 at most"),
        ("repetition_penalty=0", "repetition_penalty is 0.0"),
        ("max-new-tokens=0", "max_new_tokens is 0: expected 1 or more"),
        ("seed=-3", "seed is -3"),
    ],
)
def test_settings_that_cannot_be_are_told(pair: str, told: str) -> None:
    """Oracle: the sentence."""
    with pytest.raises(ConfigError) as raised:
        Settings().changed(pair)
    assert told in str(raised.value)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("penalty", [1e-2, 1e2])
def test_the_outermost_settings_answer(temperature: float, penalty: float, speaker: Speaker) -> None:
    """Oracle: tokens are drawn: probabilities that are not finite would raise."""
    settings = Settings(temperature, repetition_penalty=penalty, max_new_tokens=3, top_k=2**31 - 1)
    conversation = Conversation(speaker, settings)
    answer(conversation, QUESTIONS[0])
    assert conversation.answer is not None and 1 <= conversation.answer.tokens <= 3


def test_a_system_prompt_that_is_not_text_is_told(speaker: Speaker) -> None:
    """Oracle: the sentence; the one before it stays."""
    with pytest.raises(DataError, match="the system prompt holds bytes that are not UTF-8"):
        Conversation(speaker, LIKELIEST, "caf\udce9")
    conversation = Conversation(speaker, LIKELIEST, "be brief.")
    with pytest.raises(DataError, match="not UTF-8"):
        conversation.system = "caf\udce9"
    assert conversation.system == "be brief."


def test_one_setting_changes_and_the_rest_stays() -> None:
    """Oracle: the fields; every mistake of several is told at once."""
    assert Settings().changed("top-k = 5") == replace(Settings(), top_k=5)
    assert Settings.names() == ["temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens"]
    with pytest.raises(ConfigError) as raised:
        Settings(temperature=-1, seed=-1)
    assert len(raised.value.problems) == 2
    assert GREEDY.temperature == 0
