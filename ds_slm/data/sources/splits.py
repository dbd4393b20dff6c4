"""Which files of a folder belong to a split: data sets say it in the names of files and folders.

    paths below the root + a split --choose--> Choice: read, of another split, named for none

The rule is the one by which `datasets` reads a repository (`datasets.data_files`), so that a folder and its copy on the
hub give the same text: a split's keyword between characters that are not letters names the split, and a folder's name
counts before a word in a file's name. Beyond it, case does not matter, `split=train`, `train(1)` and `trainSplit` are
understood, and so are the words that are in WORDS and ALONE only. A file whose whole name is a split's (`valid.jsonl`)
is of that split whatever its folder is called.

    read                       the files that are named for the split
    nothing is named for it    train: the files that are named for no split; refused for any other split
    no file names a split      all of them
    split = "all"              all of them, whatever their names

A name with the words of two splits (`train_dev.jsonl`) belongs to neither. The names of the root and of the folders
above it do not count.

Known gaps: words that are written as one in small letters (`wikival`) name no split, but such files are named first
when the program says what it reads. A title (`strength-training.txt`) can look like a split's name. If few files name a
split among many that name none, the folder is refused, with the way out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

TRAIN, ALL = "train", "all"

WORDS = {
    TRAIN: ("train", "training", "trn"),
    "validation": ("validation", "valid", "dev", "val", "devel", "validations", "newsdev", "newsdiscussdev"),
    "test": (
        *("test", "testing", "eval", "evaluation", "devtest", "tests", "tst", "evals", "evaluations"),
        *("testa", "testb", "newstest", "newsdiscusstest"),
    ),
    "held out": ("heldout", "holdout"),
}
"""Split -> the words that name it, also in `testset`, `testdata` and `testsplit`; the words of `datasets` first."""

ALONE = {
    "validate": "validation",
    "development": "validation",
    "evaluate": "test",
    "blind": "test",
    "unseen": "held out",
}
"""Words that also occur in titles: they name a split only if the file or folder has no other word."""

NO_SPLIT = frozenset(("devops", "devtools", "devrel"))
"""Single words that are written as if they were two."""

BESIDE = frozenset(("of", "part", "shard", "split", "splits", "set", "data"))
"""Words that may stand beside a split's word in a name without other words, as in `train-00000-of-00010`."""

TITLES_PER_NAME = 10
"""If more than this many files name no split for each file that does, the words count as parts of titles."""

ENDS = ("", "set", "sets", "data", "split", "splits")

_SPLIT_OF = {word + end: split for split, words in WORDS.items() for word in words for end in ENDS}
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])")
_HELD_OUT = re.compile(r"(?<![^\W\d_])(held|hold)[\W_]?out(?![^\W\d_])", re.IGNORECASE)
_LOOKS_HELD_OUT = re.compile(r"test|tst|dev|val|(held|hold)[\W_]?out|blind|gold|hidden|unseen", re.IGNORECASE)
_SHARDED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
"""In the folder data/, `datasets` takes the part before the numbers as the whole name of a split."""


@dataclass(frozen=True)
class Choice:
    """Places in the list of paths, in its order."""

    read: tuple[int, ...]
    other_split: tuple[int, ...] = ()
    """Named for another split, or for two."""
    beside: tuple[int, ...] = ()
    """Left out because they are named for no split while others are."""


class UnclearSplit(Exception):
    """The names do not show which files belong to the split."""


def choose(paths: Sequence[PurePath], wanted: str) -> Choice:
    """The files of a split.

    Args:
        paths: relative to the root, without their suffixes.
        wanted: the split, in any spelling; "all" takes everything.

    Raises:
        UnclearSplit: with the reason as a whole clause.
    """
    named = [splits_of(path, wanted) for path in paths]
    if wanted == ALL or not any(named):
        return Choice(tuple(range(len(paths))))

    split = canonical(wanted)
    if not any(found == {split} for found in named) and len(general := _splits_in(wanted)) == 1:
        split = next(iter(general))  # train_sft among files named train
    mine = [place for place, found in enumerate(named) if found == {split}]
    others = tuple(place for place, found in enumerate(named) if found and found != {split})

    # Beside data/train-00000-of-00010 a train.jsonl elsewhere is the same text in its first form.
    if sharded := [place for place in mine if _sharded(paths[place])]:
        mine = sharded
    beside = tuple(sorted(set(range(len(paths))) - set(mine) - set(others)))

    if mine and len(beside) > TITLES_PER_NAME * (len(mine) + len(others)):
        raise UnclearSplit(
            f"{len(mine) + len(others):,} of its {len(paths):,} files have the word for a split in their names and "
            f"{len(beside):,} have none, so that nobody can tell whether they are all of {split!r}"
        )
    if mine:
        return Choice(tuple(mine), others, beside)
    if split == TRAIN and beside:
        return Choice(beside, others)
    there = ", ".join(sorted({" and ".join(sorted(found)) for found in named if found}))
    raise UnclearSplit(f"its files are named for {there}, and none for {wanted!r}")


def are_titles(paths: Sequence[PurePath]) -> bool:
    """Whether names that seem to name the training split are more likely titles, such as `training.txt`.

    They are where every file is one document, some are named for no split, none for another one, and no folder is. A
    file that is called nothing but `train`, or a name that looks held out, speaks for a split.

    Args:
        paths: relative to the root, with their suffixes.
    """
    if {path.suffix.lower() for path in paths} != {".txt"}:
        return False
    stems = [path.with_suffix("") for path in paths]
    named = [splits_of(stem) for stem in stems]
    by_folder = any(_splits_in(part) for stem in stems for part in stem.parts[:-1])
    is_split = any(TRAIN in (words := set(_words(stem.name))) and words <= {TRAIN, *BESIDE} for stem in stems)
    held_out = any(looks_held_out(stem) for stem, found in zip(stems, named, strict=True) if not found)
    return set().union(*named) == {TRAIN} and not (all(named) or by_folder or is_split or held_out)


def canonical(split: str) -> str:
    """A split's standard spelling: valid, val and dev are validation; an unknown split keeps its own words."""
    known = _splits_in(split)
    return known.pop() if len(known) == 1 and _is_a_splits(split) else split.lower()


def splits_of(path: PurePath, wanted: str = TRAIN) -> set[str]:
    """The splits that a path is named for: none, one, or several if it is unclear.

    Args:
        path: relative to the root, without its suffix.
        wanted: the split asked for, which is also found by its own name if it is not one of the usual ones.
    """
    name, folders = path.name, path.parts[:-1]
    own = canonical(wanted)
    if sharded := _sharded(path):
        return {canonical(sharded)} if _splits_in(sharded) or canonical(sharded) == own else set()
    if len(whole := _splits_in(name)) == 1 and _is_a_splits(name):
        return whole

    for part in (*reversed(folders), name):
        if _holds(part, wanted):
            return {own}
        if found := _splits_in(part):
            return found
    return set()


def _sharded(path: PurePath) -> str | None:
    """The split of data/SPLIT-00000-of-00010; None for a path of another form."""
    found = _SHARDED.fullmatch(path.name) if path.parts[:-1] == ("data",) else None
    return found[1] if found else None


def _holds(part: str, wanted: str) -> bool:
    """Whether a name has all the words of an unusual split's name, one after the other."""
    words, own = _words(part), _words(wanted)
    spans = (words[begin : begin + len(own)] for begin in range(len(words) - len(own) + 1))
    return canonical(wanted) not in WORDS and bool(own) and own in spans


def looks_held_out(path: PurePath) -> bool:
    """Whether a name may mean held-out data although no rule says so; it may also mean a valley."""
    return bool(_LOOKS_HELD_OUT.search(str(path)))


def _splits_in(name: str) -> set[str]:
    found = {_SPLIT_OF[word] for word in _words(name) if word in _SPLIT_OF}
    if not found and _is_a_splits(name):
        found = {ALONE[word] for word in _words(name) if word in ALONE}
    return found


def _is_a_splits(name: str) -> bool:
    """Whether a name holds only words of a split and words that may stand beside them."""
    return all(word in _SPLIT_OF or word in ALONE or word in BESIDE or len(word) == 1 for word in _words(name))


def _words(name: str) -> list[str]:
    """The words in lower case; a word like `trainSplit` is two words if one of them names a split."""
    found = []
    for word in _LETTERS.findall(_HELD_OUT.sub(r"\1out", name)):
        parts = [part.lower() for part in _CAMEL.split(word)]
        joined = "".join(parts)
        is_one = joined in _SPLIT_OF or joined in NO_SPLIT or not any(part in _SPLIT_OF for part in parts)
        found += [joined] if is_one else parts
    return found
