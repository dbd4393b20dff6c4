"""Learning a tokenizer: ends for any text, changes nothing of ordinary text, and heeds a signal meanwhile."""

import random
import re
import signal
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_slm.data.tokenizers.bpe_training import KINDS, LONG_RUN_BYTES, LONGEST_RUN, LongRuns, train_bpe
from ds_slm.data.tokenizers.byte_level import GPT2_PATTERN
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from tests.support.data_recipes import BPE, recipe, source, texts

ROOT = Path(__file__).resolve().parents[3]
MILLION = 1_000_000
RNG = random.Random(0)
WITHOUT_A_BREAK = {
    "one letter": "a" * MILLION,
    "DNA": "".join(RNG.choices("ACGT", k=MILLION)),
    "base64": "".join(RNG.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=MILLION)),
    "digits": "".join(RNG.choices("0123456789", k=MILLION)),
    "Chinese": "".join(map(chr, RNG.choices(range(0x4E00, 0x9FA6), k=MILLION))),
    "emoji": "".join(map(chr, RNG.choices(range(0x1F600, 0x1F640), k=MILLION))),
    "spaces": " " * MILLION,
    "white space": "".join(RNG.choices(" \n\t", k=MILLION)),
    "control characters": "\x1c#" * (MILLION // 2),
}


def pre_tokens(pieces: list[str]) -> list[str]:
    return [match[0] for piece in pieces for match in regex.finditer(GPT2_PATTERN, piece)]


@pytest.mark.parametrize("name", WITHOUT_A_BREAK)
def test_no_long_pre_token_is_learned_from(name: str) -> None:
    """Oracle: GPT-2's pattern; and counting: what is left out and what remains is the whole text."""
    text = WITHOUT_A_BREAK[name]
    long_runs = LongRuns()
    pieces = list(long_runs.cut(text))
    assert max(map(len, pre_tokens(pieces))) <= LONGEST_RUN + 1  # with the space before it
    assert long_runs.count >= 1
    assert long_runs.learned_bytes <= LONG_RUN_BYTES + 4 * LONGEST_RUN
    assert len("".join(pieces).encode()) + long_runs.left_out_bytes == len(text.encode())


@settings(max_examples=60)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from(["a", "é", "7", "=", "日", "😀", "\n", " ", "\x1c", "'s "]), st.integers(1, 9)),
        max_size=12,
    )
)
def test_only_long_runs_are_cut(runs: list[tuple[str, int]]) -> None:
    """Oracle: GPT-2's pattern, with a bound of five characters: a text without a longer run stays as it is, and of any
    other the pre-tokens are those of the whole text, but for those that are too long.
    """
    text = "".join(letter * count for letter, count in runs)
    long_runs = LongRuns(longest=5)
    pieces = list(long_runs.cut(text))
    assert "".join(pieces) == text
    lengths = [len(list(group)) for _, group in groupby(text, kind_of)]
    assert long_runs.count == sum(length > 5 for length in lengths)
    assert len(pieces) == 1 + sum((length - 1) // 5 for length in lengths)
    assert max(map(len, pre_tokens(pieces)), default=0) <= 6


def kind_of(character: str) -> int:
    return next(place for place, kind in enumerate(KINDS) if regex.fullmatch(kind, character))


def learned_from(documents: list[str]) -> tuple[list[str], list[str]]:
    """The ids' tokens of a tokenizer that is trained on some documents, and what was told."""
    told: list[str] = []
    made = build_tokenizer(recipe(source("made", path="."), tokenizer=BPE), lambda _: iter(documents), told.append)
    return [made.decode([token]) for token in range(made.vocab_size)], told


def test_ordinary_text_gives_the_same_tokenizer() -> None:
    """Oracle: the trainer itself, given the documents as they are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    documents = [*texts(200), "=" * LONGEST_RUN, "x" * LONGEST_RUN + " " * LONGEST_RUN + "9" * LONGEST_RUN]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(documents, trainer)
    learned, long_runs = train_bpe(documents, 400, 2)
    assert {token: place for place, token in enumerate(learned)} == learner.get_vocab()
    assert str(long_runs) == ""


@pytest.mark.parametrize("name", WITHOUT_A_BREAK)
def test_a_document_without_a_break_is_learned_from_and_told(name: str) -> None:
    """Oracle: the vocabulary is full, its tokens are joined letters, and one line says what was cut."""
    tokens, told = learned_from([WITHOUT_A_BREAK[name][:20_000], *texts(20)])
    assert len(tokens) == 300
    assert len(told) == 1 and re.match(r"warning: tokenizer: (1 run|\d+ runs) of more than 256 letters", told[0])


def test_what_is_left_out_is_told() -> None:
    """Oracle: counting bytes: of two million letters, half."""
    long_runs = LongRuns()
    for name in ("DNA", "digits"):
        list(long_runs.cut(WITHOUT_A_BREAK[name]))
    left_out = 2 * MILLION - long_runs.learned_bytes
    assert MILLION - LONGEST_RUN <= left_out <= MILLION
    assert "2 runs of more than 256 letters, digits or signs without a break were cut" in str(long_runs)
    assert str(long_runs).endswith(f"{left_out:,} bytes of them left out")


UNBOUNDED = """
import sys
from ds_slm.data.tokenizers import bpe_training
from ds_slm.errors import run_program

def letters():
    yield "".join(map(chr, (97 + place * place % 26 for place in range(2_000_000))))
    print("read", flush=True)

bpe_training.LongRuns.cut = lambda self, text: iter([text])
sys.exit(run_program(lambda: bpe_training.train_bpe(letters(), 5_000, 2)))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_trainer_that_would_not_end(number: signal.Signals, status: int) -> None:
    """Oracle: the exit code, of a trainer that is deep in a text that takes it hours; the test waits for no clock."""
    program = subprocess.Popen(
        [sys.executable, "-c", UNBOUNDED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "read\n"
        program.send_signal(number)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == status
    assert ("interrupted" in errors) == (number == signal.SIGINT) and "Traceback" not in errors
