"""`ds-slm chat`: a conversation in the terminal, or one answer for a script.

    MODEL --speaker_of--> Speaker --> Conversation --Terminal: a question or /command a line--> pieces of an answer
                                                   --one_answer: --prompt--> text, or one JSON object

`input` reads lines with readline, so pasted lines stay together if the terminal marks pasted text. Control characters
that a model generates are shown as pictures of themselves: none reaches the terminal.
"""

import contextlib
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console

from ds_slm.cli.output import print_json
from ds_slm.cli.speaking import speaker_of
from ds_slm.errors import EXIT_INTERRUPTED, ConfigError, DataError, UserError, describe
from ds_slm.files import replace_text
from ds_slm.publish.chat import Answer, Conversation
from ds_slm.publish.generate import Reader
from ds_slm.publish.models import open_model
from ds_slm.publish.sampling import Settings
from ds_slm.recipe.problems import nearest

QUOTES = '"""'
"""The marks around a question of several lines."""
COMMANDS = {
    "/reset": "forget the conversation; the system prompt stays",
    "/undo": "take the last question and its answer back",
    "/system TEXT": "answer with this system prompt from here on; without TEXT with none",
    "/set KEY=VALUE": f"change a setting ({', '.join(Settings.names())}); without KEY show them",
    "/save FILE": "write the conversation as a line of JSON, which fine-tuning reads",
    "/help": "this list",
    "/quit": "end; Ctrl-D too",
}
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control character -> the character that is shown for it."""


@dataclass(frozen=True)
class Flags:
    """The flags of `ds-slm chat`, except the model."""

    settings: Settings
    system: str | None
    prompt: str | None
    """One question, `-` to read it from stdin; None for a conversation."""
    plain: bool
    """Whether to continue each text by itself, as a base model does."""
    as_json: bool


def run(model: Path, flags: Flags) -> None:
    """Talk, or answer once. Raises UserError if the model cannot."""
    if flags.as_json and flags.prompt is None:
        raise ConfigError("--json prints one answer as an object: add --prompt TEXT.")
    if flags.plain and flags.system is not None:
        raise ConfigError("--continue continues a text as it is: leave out --system.")
    question = None if flags.prompt is None else _question(flags.prompt)

    opened = open_model(model)
    speaker = speaker_of(opened, model, flags.plain, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    Reader(speaker.model, capacity=1).read([speaker.tokenizer.eos_id])  # reports at once if weights are not finite
    conversation = Conversation(speaker, flags.settings, flags.system or None)

    if question is not None:
        _answer_once(conversation, question, {"model": str(opened.folder)} if flags.as_json else None)
        return
    parameters, limit = sum(one.numel() for one in speaker.model.parameters()), opened.shape.max_position_embeddings
    Terminal(conversation, flags.plain).run(
        f"{opened.folder}: {parameters:,} parameters, a context of {limit:,} tokens. /help lists the commands."
    )


def _question(prompt: str) -> str:
    """The text of --prompt, or of stdin."""
    if prompt == "-":
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"stdin is not UTF-8 ({error}): expected text.") from error
    if not prompt.strip():
        raise ConfigError("the prompt is empty: expected a question, or a text to continue.")
    return prompt


def _answer_once(conversation: Conversation, question: str, facts: dict[str, str] | None) -> None:
    """An answer on stdout, its cost on stderr; or, with facts, all of it as one object."""
    try:
        for piece in conversation.ask(question):
            if facts is None:
                _write(piece)
    except KeyboardInterrupt as error:
        print()
        raise typer.Exit(EXIT_INTERRUPTED) from error

    answer = conversation.answer
    assert answer is not None
    if facts is None:
        print()
        Console(stderr=True).print(_cost(answer), style="dim", highlight=False)
        return
    content = asdict(answer)
    print_json(
        {
            **facts, "system": conversation.system, "prompt": question, "answer": content.pop("text"), **content,
            "tokens_per_s": answer.tokens_per_s, "settings": asdict(conversation.settings),
        }
    )  # fmt: skip


def _write(piece: str) -> None:
    sys.stdout.write(piece.translate(PICTURES) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _cost(answer: Answer) -> str:
    """The cost of an answer, and what a person should know of how it ended."""
    parts = [f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}, {answer.tokens_per_s:,.0f} tokens/s"]
    if answer.stopped_by == "max_new_tokens":
        parts.append("cut: it has max_new_tokens")
    if answer.stopped_by == "context":
        parts.append("cut: the context is full")
    if answer.stopped_by == "interrupt":
        parts.append("stopped")
    if count := answer.forgotten_turns // 2:
        what = "question and its answer are" if count == 1 else f"{count} questions and their answers are"
        parts.append(f"the context is full: the oldest {what} forgotten")
    return "; ".join(parts)


class Terminal:
    """Questions and commands from stdin, answers to stdout."""

    def __init__(self, conversation: Conversation, plain: bool) -> None:
        self._conversation = conversation
        self._plain = plain
        self._console = Console(highlight=False)
        self._is_typed = sys.stdin.isatty()
        self._saved: set[Path] = set()

    def run(self, greeting: str) -> None:
        """Talk until /quit or the end of stdin."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit and repeat lines
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # the question reports bytes that are not text
        if self._is_typed:
            self._say(greeting)

        while True:
            try:
                self._take(self._read("> "))
            except EOFError:
                break
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends.")
            except (UserError, OSError) as error:
                described = describe(error)
                if described is None:
                    raise
                self._say(described[0], style="red")
        if self._is_typed:
            print()

    def _take(self, line: str) -> None:
        """Act on a line. Raises EOFError to end."""
        if line.startswith(QUOTES):
            self._ask(self._block(line))
        elif line.startswith("/"):
            name, _, rest = line.partition(" ")
            self._command(name.strip(), rest.strip())
        else:
            self._ask(line)

    def _read(self, mark: str) -> str:
        return input(mark if self._is_typed else "")

    def _block(self, first: str) -> str:
        """The lines up to the one that ends with quotes."""
        lines = [first.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self._read("... "))
            except EOFError:
                self._say(f"the text has no closing {QUOTES}: it was not sent.", style="red")
                raise
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")

    def _ask(self, question: str) -> None:
        if not question.strip():
            return
        if self._plain:
            self._conversation.reset()

        # Ctrl-C ends only the answer.
        pieces = self._conversation.ask(question)
        with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                _write(piece)

        answer = self._conversation.answer
        print(flush=True)
        self._say(_cost(answer) if answer else "stopped before the answer began: the question is taken back.")

    def _command(self, name: str, rest: str) -> None:
        conversation = self._conversation
        if self._plain and name in ("/reset", "/undo", "/system", "/save"):
            raise ConfigError(f"{name} belongs to a conversation: --continue continues each text by itself.")

        match name:
            case "/reset":
                conversation.reset()
                self._say("the conversation begins anew.")
            case "/undo":
                question = conversation.undo()
                self._say("nothing was said yet." if question is None else f"taken back: {question}")
            case "/system":
                conversation.system = rest or None
                self._say(f"system prompt: {rest or 'none'}")
            case "/set":
                if rest:
                    conversation.set(conversation.settings.changed(rest))
                self._say(", ".join(f"{key}={value}" for key, value in asdict(conversation.settings).items()))
            case "/save":
                self._save(rest)
            case "/help":
                self._help()
            case "/quit":
                raise EOFError
            case _:
                known = [usage.partition(" ")[0] for usage in COMMANDS]
                raise ConfigError(
                    f"{name} is not a command{nearest(name, known)}; /help lists them. A text that begins with / is "
                    "sent where a space stands before it."
                )

    def _save(self, name: str) -> None:
        try:
            path = Path(name).expanduser()
            with contextlib.suppress(OSError):
                path.lstat()
        except (RuntimeError, ValueError) as error:  # ~NAME of an unknown user; a name that the system does not allow
            raise ConfigError(f"/save {name!r}: {error}; expected a file, in a folder that exists.") from error

        if not name or not path.parent.is_dir() or path.is_dir():
            raise ConfigError(f"/save {name}: expected a file, in a folder that exists.")
        if path.exists() and path not in self._saved:
            raise ConfigError(f"{path} exists, and was not saved by this conversation: name another file.")
        if not self._conversation.turns:
            raise ConfigError("nothing was said yet: there is nothing to save.")

        line = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False)
        replace_text(path, f"{line}\n")
        self._saved.add(path)
        self._say(f"saved: {path}")

    def _help(self) -> None:
        for usage, what in COMMANDS.items():
            self._say(f"{usage:<16}{what}")
        self._say(
            f"Several lines: begin the first with {QUOTES} and end the last with {QUOTES}. Ctrl-C stops an answer."
        )

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)
