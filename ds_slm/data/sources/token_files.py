"""Ready-made token files: raw ids without a header, so damage must be looked for.

    .bin files --TokenFiles--> padding at their ends cut off --blocks--> ids, each block checked

It refuses ids that no text gives:
    an id beyond the vocabulary, ids of twice or four times the width, numpy's own format
    NO_TEXT_RUN ids in a row that decode to nothing (EOS, padding): a document holds at least one other id
    LONG_RUN zeros in a row, whichever token 0 is: a block of a disk that was never written, 4,096 bytes, reads as 1,024
    zeros of 32 bits or 2,048 of 16

Any other id that occurs LONG_RUN times in a row may be a table's rule or a damaged line: it is reported and copied.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError

COPY_TOKENS = 1 << 24
"""Ids read at a time."""
WIDE_IDS = 32
"""This number of ids, each followed by a 0, are ids of twice their width."""
NO_TEXT_RUN = 64
"""More equal ids in a row than this, if they decode to nothing, are not documents; at a file's end they are padding."""
LONG_RUN = 512
"""Half of the widest ids in the smallest block of a disk, because missing ids need not begin with a block."""
LOOK_TOKENS = 1 << 20
"""Ids that are checked together."""
PADDING = "ids of padding at the end of a file"
NUMPY = b"\x93NUMPY"


class TokenFiles:
    """The ids of several raw files, one after the other."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype, tokenizer: Tokenizer) -> None:
        """Reads the ends of the files.

        Raises:
            DataError: a file has no whole number of ids, has another format, or holds only padding.
        """
        self._files, self._dtype, self._tokenizer = files, dtype, tokenizer
        self.long_run: str | None = None
        """The first run of one id that is so long that people should look at it, and its place."""
        self._counts = [path.stat().st_size // dtype.itemsize for path in files]

        problems = [
            f"{path} has {path.stat().st_size} bytes, no whole number of {8 * dtype.itemsize}-bit ids: it was cut "
            "short, or is of another type (data.source.dtype); get an intact copy."
            for path in files
            if path.stat().st_size % dtype.itemsize
        ]
        problems += [
            f"{path} is a file of numpy's own format: write its ids alone, with array.tofile(...)."
            for path in files
            if _begins_with(path, NUMPY)
        ]
        if problems:
            raise DataError(problems)

        paddings = [self._padding_of(path, count) for path, count in zip(files, self._counts, strict=True)]
        self.padding = sum(paddings)
        """Ids that are cut off at the ends of the files."""
        self._counts = [count - padding for count, padding in zip(self._counts, paddings, strict=True)]

        problems = [
            f"{path} holds nothing but one id that is no text: get an intact copy."
            for path, count, padding in zip(files, self._counts, paddings, strict=True)
            if padding and count <= 1
        ]
        if problems:
            raise DataError(problems)

    @cached_property
    def no_text(self) -> set[int]:
        """Ids that stand for no text: EOS, the padding token, and 0 if it decodes to nothing."""
        found = {self._tokenizer.eos_id, self._tokenizer.pad_id}
        return found if self._tokenizer.decode([0], skip_special=True) else {0, *found}

    def _padding_of(self, path: Path, count: int) -> int:
        """Ids at a file's end that are padding; an EOS, which ends the last document, is left."""
        run, last = 0, None
        while run < count:
            begin = max(count - run - COPY_TOKENS, 0)
            block = np.fromfile(path, self._dtype, count=count - run - begin, offset=begin * self._dtype.itemsize)
            last = block[-1] if last is None else last
            others = np.flatnonzero(block != last)
            run += len(block) - (int(others[-1]) + 1 if len(others) else 0)
            if len(others):
                break
        if run <= NO_TEXT_RUN or last not in {0, *self.no_text}:
            return 0
        return run - int(last == self._tokenizer.eos_id)

    def held_out_border(self, val_fraction: float) -> int:
        """The position at which held-out tokens begin: after the first EOS of the last `val_fraction`."""
        begin = nominal = int(sum(self._counts) * (1 - val_fraction))
        for block in self.blocks(nominal):
            ends = np.flatnonzero(block == self._tokenizer.eos_id)
            if len(ends):
                border = begin + int(ends[0]) + 1
                return nominal if border == sum(self._counts) else border
            begin += len(block)
        return nominal

    def blocks(self, begin: int) -> Iterator[np.ndarray]:
        """The ids from a position on, in blocks of at most COPY_TOKENS.

        Raises:
            DataError: a block holds ids that no text gives.
        """
        file_begin = 0
        for path, count in zip(self._files, self._counts, strict=True):
            place = max(begin - file_begin, 0)
            while place < count:
                before = min(place, LONG_RUN)  # a run may have begun in the block before
                length, offset = before + min(COPY_TOKENS, count - place), (place - before) * self._dtype.itemsize
                ids = np.fromfile(path, self._dtype, count=length, offset=offset)
                self._refuse_strange(path, ids[before:], place)
                self._look_at_runs(path, ids, place - before)
                yield ids[before:]
                place += length - before
            file_begin += count

    def _refuse_strange(self, path: Path, block: np.ndarray, place: int) -> None:
        vocab_size, beyond = self._tokenizer.vocab_size, int(block.argmax())
        if block[beyond] >= vocab_size:
            raise DataError(
                f"{path} holds id {block[beyond]} at position {place + beyond}, beyond the vocabulary of {vocab_size}: "
                "it was made with another tokenizer (name that one in the recipe) or is of another type "
                "(data.source.dtype)."
            )

        # Wider ids, read as narrow ones, have zeros between them.
        own, between = block[place % 2 :: 2], block[1 - place % 2 :: 2]
        if between.any() or np.count_nonzero(own) < WIDE_IDS:
            return

        bits = 8 * self._dtype.itemsize
        if bits == 16 and own[1::2].any() and own[::2].any():
            raise DataError(
                f"{path}: every other 16-bit id is 0, as in a file of 32-bit ones: set data.source.dtype = 'uint32'."
            )
        zeros = "three of four 16-bit ids are" if bits == 16 else "every other 32-bit id is"
        raise DataError(
            f"{path}: {zeros} 0, as in a file of 64-bit ones (int64, which numpy and torch write unless told "
            f"otherwise): write them anew as 32-bit ones, with numpy.fromfile({path.name!r}, "
            "'int64').astype('uint32').tofile(...), and set data.source.dtype = 'uint32'."
        )

    def _look_at_runs(self, path: Path, ids: np.ndarray, place: int) -> None:
        """Refuse or note runs of one id that are too long for text."""
        for offset in range(0, len(ids), LOOK_TOKENS):
            first = max(offset - LONG_RUN, 0)
            part = ids[first : offset + LOOK_TOKENS]
            begins = np.append(0, np.flatnonzero(part[1:] != part[:-1]) + 1)
            lengths = np.diff(begins, append=len(part))
            for run in np.flatnonzero(lengths > NO_TEXT_RUN):
                self._look_at_run(path, int(part[begins[run]]), place + first + int(begins[run]), int(lengths[run]))

    def _look_at_run(self, path: Path, number: int, place: int, length: int) -> None:
        if number in self.no_text or (number == 0 and length >= LONG_RUN):
            begin, end = self._whole_run(path, number, place)
            raise DataError(
                f"{path}: from position {begin} on id {number} stands {end - begin:,} times in a row, which is no "
                "text: ids that were never written read as zeros, and documents are not padded; get an intact copy, or "
                "write the file anew without them."
            )
        if length >= LONG_RUN and self.long_run is None:
            begin, end = self._whole_run(path, number, place)
            self.long_run = (
                f"id {number} ({self._tokenizer.decode([number])!r}) stands {end - begin:,} times in a row, from "
                f"position {begin} of {path.name} on: look whether that is text"
            )

    def _whole_run(self, path: Path, number: int, place: int) -> tuple[int, int]:
        """Where a run that holds a place begins and ends."""
        ids = np.memmap(path, self._dtype, mode="r")

        begin = end = place
        while begin:
            block = ids[max(begin - LOOK_TOKENS, 0) : begin]
            others = np.flatnonzero(block != number)
            begin -= len(block) if not len(others) else len(block) - 1 - int(others[-1])
            if len(others):
                break

        while end < len(ids):
            block = ids[end : end + LOOK_TOKENS]
            others = np.flatnonzero(block != number)
            end += len(block) if not len(others) else int(others[0])
            if len(others):
                break

        return begin, end


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
