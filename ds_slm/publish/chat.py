"""A conversation with a model, without a terminal: what it remembers, what is read, and the pieces of an answer.

    question --> turns --render--> ids --Reader: only those that are new--> tokens --TextStream--> whole characters

When the context is full, the oldest question and its answer are forgotten, then further ones until the answer has room;
the system prompt stays. Forgotten turns are still saved. The next question is rendered from the text of the turns, as
in training: if an answer's tokens differ from its text's tokens, they are read again.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from ds_slm.data.sources.readers import is_unicode
from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from ds_slm.model.decoder import Decoder
from ds_slm.publish.generate import Chooser, Reader, tokens
from ds_slm.publish.sampling import Settings

Message = dict[str, str]
UNFINISHED = "\ufffd"
"""The character that a tokenizer gives for bytes that are not a whole character."""


@dataclass(frozen=True)
class Speaker:
    """A model, and how to speak to it."""

    model: Decoder
    tokenizer: Tokenizer
    render: Callable[[Sequence[Message]], list[int]]
    """The ids of messages, up to where the next answer begins."""
    stop_ids: frozenset[int]
    """Ids that end an answer."""


@dataclass(frozen=True)
class Answer:
    """What came back, and at what cost."""

    text: str
    prompt_tokens: int
    """Tokens before the answer when it began."""
    tokens: int
    """Tokens of the answer, including the one that ended it."""
    stopped_by: str
    """The token that ended it, or max_new_tokens, context (no turn was left to forget), interrupt."""
    forgotten_turns: int
    """Questions and answers that were forgotten for it."""
    seconds: float
    """Seconds from the question to the last token."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, including the time to read the prompt."""
        return self.tokens / self.seconds


class TextStream:
    """The text of tokens that come one at a time. Bytes of an unfinished character are held back.

    With byte fallback, a byte that is not text can change whole characters before it: the text from there on is then
    given out again as the tokenizer decodes it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = ""
        """The decoded text that has been given out."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """The text that a token completes."""
        self._ids.append(token)
        decoded = self._decoded()
        text = decoded.rstrip(UNFINISHED)

        # Some tokenizers take a character back until the bytes after it are whole.
        if text != decoded and not text.startswith(self.text):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The rest of the text: no more tokens follow."""
        return self._give(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=True)

    def _give(self, text: str) -> str:
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.text, text, strict=False)))
        self.text = text
        return text[kept:]


class Conversation:
    """Questions and answers, after a system prompt if there is one."""

    def __init__(self, speaker: Speaker, settings: Settings, system: str | None = None) -> None:
        """Raises DataError if the system prompt is not text."""
        self.speaker = speaker
        self.system = system
        self.turns: list[Message] = []
        """Question, answer, question, answer, ..."""
        self.answer: Answer | None = None
        """The last answer; None while a question has none yet."""
        self._forgotten = 0
        """Turns at the beginning that are no longer read."""
        self._forgotten_before: list[int] = []
        """The same number at the time of each question."""
        self._reader = Reader(speaker.model)
        self._unused_ids = speaker.tokenizer.unused_ids(speaker.model.shape.vocab_size)
        self.set(settings)

    def set(self, settings: Settings) -> None:
        """Use these settings from now on, beginning with the seed again."""
        self.settings = settings
        self._chooser = Chooser(settings, self.speaker.stop_ids, self._unused_ids)

    @property
    def system(self) -> str | None:
        """The system prompt. Setting it raises DataError if it is not text."""
        return self._system

    @system.setter
    def system(self, system: str | None) -> None:
        _refuse_bytes("system prompt", system or "")
        self._system = system

    @property
    def messages(self) -> list[Message]:
        """All messages, including forgotten turns."""
        return [*self._opening, *self.turns]

    @property
    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.turns, self._forgotten, self._forgotten_before = [], 0, []

    def undo(self) -> str | None:
        """Take the last question and its answer back. Returns the question, None if there is none."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        self._forgotten = self._forgotten_before.pop()
        return question

    def ask(self, question: str) -> Generator[str, None, None]:
        """The pieces of an answer, each of whole characters; after the last one `answer` says more.

        An answer that is interrupted stays in the conversation as far as it came; a question whose answer has not begun
        is removed.

        Raises:
            DataError: the question is longer than the context, or not text.
        """
        begun_s = time.monotonic()
        _refuse_bytes("question", question)
        before, self.answer = self._forgotten, None
        self.turns.append({"role": "user", "content": question})

        new_ids: list[int] = []
        stream = TextStream(self.speaker.tokenizer)
        prompt: list[int] = []
        stopped_by = "interrupt"
        try:
            prompt = self._prompt()
            drawn = tokens(self._reader, prompt, self._chooser, lambda known: self._with_room(known[len(prompt) :]))
            for token in islice(drawn, self.settings.max_new_tokens):
                new_ids.append(token)
                if piece := stream.push(token):
                    yield piece
            stopped_by = self._end_of(new_ids)
            if piece := stream.finish():
                yield piece

        # Questions and answers must alternate, however this one ended.
        finally:
            if new_ids:
                self.turns.append({"role": "assistant", "content": stream.text})
                self._forgotten_before.append(before)
                seconds, forgotten = time.monotonic() - begun_s, self._forgotten - before
                self.answer = Answer(stream.text, len(prompt), len(new_ids), stopped_by, forgotten, seconds)
            else:
                self.turns.pop()
                self._forgotten = before

    def _end_of(self, new_ids: Sequence[int]) -> str:
        if new_ids[-1] in self.speaker.stop_ids:
            return self.speaker.tokenizer.decode(new_ids[-1:])
        return "max_new_tokens" if len(new_ids) == self.settings.max_new_tokens else "context"

    def _prompt(self) -> list[int]:
        """The ids before an answer. Raises DataError if the question alone is too long."""
        ids = self._with_room([])
        if ids:
            return ids

        length = len(self.speaker.render([*self._opening, self.turns[-1]]))
        beside = ", with the system prompt and what stands around both," if self.system else ""
        raise DataError(
            f"the question has {length:,} tokens{beside} and the model's context {self._reader.limit:,}: shorten it."
        )

    def _with_room(self, answer: Sequence[int]) -> list[int]:
        """The ids of the remembered turns and of an answer as far as it came; empty if it cannot go on.

        Turns are forgotten until the answer has room for what is left of it, or for a quarter of the context.
        """
        limit = self._reader.limit
        room = min(self.settings.max_new_tokens - len(answer), limit // 4)
        while True:
            remembered = [*self._opening, *self.turns[self._forgotten :]]
            ids = [*self.speaker.render(remembered), *answer]
            is_last = self._forgotten == len(self.turns) - 1
            if len(ids) + room <= limit or is_last:
                return ids if len(ids) <= limit else []
            self._forgotten += 2


def _refuse_bytes(what: str, text: str) -> None:
    if not is_unicode(text):
        raise DataError(f"the {what} holds bytes that are not UTF-8: expected text.")
