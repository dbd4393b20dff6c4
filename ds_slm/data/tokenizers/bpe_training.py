r"""Byte-level BPE learned from text, in bounded time and interruptible, for any text.

    texts --LongRuns.cut--> no pre-token of more than LONGEST_RUN --train_bpe, in the background--> tokens by rank

Tokens are joined within a pre-token. GPT-2's pattern ends a pre-token at each change between letters, digits, other
signs and white space. The trainer's time grows with the square of its length, and DNA, base64, a million digits, or
Chinese without a space or a comma, are one single pre-token. So a longer run is cut while the tokenizer learns, which
learns from at most LONG_RUN_BYTES of such runs, because nothing in them occurs twice. Encoding does not cut runs.

Known gap: the time for many random words, each shorter than LONGEST_RUN, is not bounded.
"""

import re
import threading
from collections.abc import Iterable, Iterator

import regex

from ds_slm.data.background import in_background, result_of

LONGEST_RUN = 256
"""Characters. Ordinary text is not cut: no run in 36 MB of prose and chats, or in the demo's text, has even 100."""
LONG_RUN_BYTES = 1_000_000
"""UTF-8 bytes of all cut runs from which the tokenizer learns; the trainer takes about 10 s for random ones."""
LONGEST_READ_S = 10.0
"""How long an interrupted trainer waits for the text that is being read."""
KINDS = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")
"""Kinds of characters: a pre-token holds one kind, and a space before it."""


class LongRuns:
    """Cuts long runs, and counts them."""

    def __init__(self, longest: int = LONGEST_RUN) -> None:
        """Runs of more than `longest` characters are cut."""
        self._longest = longest
        self._pattern = regex.compile("|".join(rf"(?<!{kind}){kind}{{{longest + 1},}}" for kind in KINDS))
        # Five times faster. It finds every text that has a long run, but other texts as well.
        self._may_be_long = re.compile(rf"[^ \n]{{{longest + 1}}}|\s{{{longest + 1}}}")
        self.count = 0
        """Runs that were cut."""
        self.learned_bytes = 0
        """Their bytes from which the tokenizer learned."""
        self.left_out_bytes = 0
        """Their bytes that were left out."""

    def cut(self, text: str) -> Iterator[str]:
        """The text in pieces with the same pre-tokens as the text, except long ones; most often one piece."""
        begin = 0
        for run in self._pattern.finditer(text) if self._may_be_long.search(text) else ():
            self.count += 1
            for piece_begin in range(run.start(), run.end(), self._longest):
                piece_end = min(piece_begin + self._longest, run.end())

                # The rest of this run is left out: the text before it is a separate piece.
                if self.learned_bytes >= LONG_RUN_BYTES:
                    self.left_out_bytes += len(text[piece_begin : run.end()].encode())
                    yield text[begin:piece_begin]
                    begin = run.end()
                    break

                # The last piece of a run stays with the text after it.
                self.learned_bytes += len(text[piece_begin:piece_end].encode())
                if piece_end < run.end():
                    yield text[begin:piece_end]
                    begin = piece_end
        yield text[begin:]

    def __str__(self) -> str:
        """One line for the user; empty if nothing was cut."""
        if not self.count:
            return ""
        left_out = f", {self.left_out_bytes:,} bytes of them left out" if self.left_out_bytes else ""
        runs, were = (f"{self.count:,} runs", "were") if self.count > 1 else ("1 run", "was")
        return (
            f"{runs} of more than {self._longest} letters, digits or signs without a break {were} cut while the "
            f"tokenizer learned{left_out}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int) -> tuple[list[str], LongRuns]:
    """Learn byte-level BPE.

    Args:
        texts: the texts to learn from; read in another thread.
        vocab_size: ids to learn, including the 256 bytes; too little text gives fewer.
        min_frequency: the least number of times that a pair must be seen to be joined.

    Returns:
        The tokens in byte letters, in the order in which text is joined; and what was cut.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    long_runs = LongRuns()
    interrupted, reading = threading.Event(), threading.Lock()

    def pieces() -> Iterator[str]:
        with reading:
            for text in texts:
                if interrupted.is_set():
                    raise InterruptedError
                yield from long_runs.cut(text)

    # The main thread waits, so that a signal wakes it while the trainer computes. Python can end while another thread
    # computes in Rust, but not while Rust has called it to read the next text.
    try:
        result_of(in_background(lambda: learner.train_from_iterator(pieces(), trainer)))
    except BaseException:
        interrupted.set()
        reading.acquire(timeout=LONGEST_READ_S)
        raise
    learned = learner.get_vocab()
    return sorted(learned, key=learned.__getitem__), long_runs
