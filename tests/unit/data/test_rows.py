"""Rows: what a step trains on, on which rank, and that every held-out token counts exactly once."""

import itertools
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_slm.data.order import RowId
from ds_slm.data.rows import PretrainRows, Rows, share
from ds_slm.data.shards.prepared import Prepared
from ds_slm.errors import DataError
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import prepare, recipe, source, texts, write_jsonl

SEQ_LEN = 16


def make(folder: Path, **options: object) -> tuple[Recipe, Prepared]:
    one, two = write_jsonl(folder / "1.jsonl", texts(80, 1)), write_jsonl(folder / "2.jsonl", texts(40, 2))
    made = recipe(source("one", path=one, weight=3), source("two", path=two), seq_len=SEQ_LEN, **options)  # type: ignore
    return made, prepare(made, folder / "data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Prepared]:
    return make(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def rows(prepared: tuple[Recipe, Prepared]) -> PretrainRows:
    return PretrainRows(*prepared)


@given(st.lists(st.lists(st.integers(-1, 1), min_size=6, max_size=6), min_size=1, max_size=3))
def test_documents_are_counted_as_runs_of_ids(ids: list[list[int]]) -> None:
    """Oracle: itertools.groupby over each row; rows that are not packed have none."""
    found = Rows(np.zeros((len(ids), 7), np.int64), np.zeros((len(ids), 6), np.float32), np.array(ids, np.int32))
    assert found.document_count == sum(1 for row in ids for _ in itertools.groupby(row))
    assert Rows(found.token_ids, found.weights).document_count is None


def test_a_training_row_is_a_slice(rows: PretrainRows, prepared: tuple[Recipe, Prepared]) -> None:
    """Oracle: slices of the token arrays; every target has weight 1; inputs and targets are one token apart."""
    arrays = prepared[1].tokens("train")
    ids = [RowId(0, 0, 0), RowId(1, 4, 2), RowId(0, 0, (len(arrays[0]) - 1) // SEQ_LEN - 1)]
    found = rows.read(ids)
    for place, row in enumerate(ids):
        expected = arrays[row.source][row.row * SEQ_LEN : row.row * SEQ_LEN + SEQ_LEN + 1]
        assert np.array_equal(found.token_ids[place], expected)
    assert found.token_ids.dtype == np.int64 and found.weights.dtype == np.float32
    assert np.array_equal(found.input_ids[:, 1:], found.target_ids[:, :-1])
    assert found.weights.shape == found.target_ids.shape == (3, SEQ_LEN)
    assert (found.weights == 1).all() and found.document_ids is None


def test_filler_rows_weigh_nothing(rows: PretrainRows, prepared: tuple[Recipe, Prepared]) -> None:
    """Oracle: padding ids and zero weights, in either split; a batch of nothing but fillers has the same shape."""
    for split in ("train", "val"):
        found = rows.read([None, RowId(0, 0, 1), None], split)  # type: ignore[arg-type]
        assert (found.weights.sum(axis=1) == [0, SEQ_LEN, 0]).all()
        assert (found.token_ids[[0, 2]] == prepared[1].pad_id).all()
    assert rows.read([None]).token_ids.shape == (1, SEQ_LEN + 1)


def test_every_held_out_token_is_a_target_once(rows: PretrainRows, prepared: tuple[Recipe, Prepared]) -> None:
    """Oracle: the held-out arrays themselves; the token before each target is its context, an EOS before the first."""
    ids = rows.val_row_ids(None)
    found = rows.read(ids, "val")
    for source_place, tokens in enumerate(prepared[1].tokens("val")):
        mine = [place for place, row in enumerate(ids) if row.source == source_place]
        weights = found.weights[mine].ravel()
        assert np.array_equal(found.target_ids[mine].ravel()[weights == 1], tokens)
        contexts = found.input_ids[mine].ravel()[weights == 1]
        assert np.array_equal(contexts, [prepared[1].eos_id, *tokens[:-1]])
        assert set(weights) <= {0.0, 1.0} and weights.sum() == len(tokens)
    assert found.weights.sum() == prepared[1].val_tokens


def test_limited_held_out_rows(rows: PretrainRows) -> None:
    """Oracle: a fixed subset, evenly spaced over all sources; a limit beyond all of them takes all."""
    every = rows.val_row_ids(None)
    some = rows.val_row_ids(9)
    places = [every.index(row) for row in some]
    assert len(set(some)) == 9 and some == rows.val_row_ids(9)
    assert {row.source for row in some} == {0, 1}
    assert max(np.diff(places)) - min(np.diff(places)) <= 1
    assert rows.val_row_ids(10**6) == every


@given(count=st.integers(1, 90), world_size=st.sampled_from([1, 2, 3, 5]), micro_batch=st.integers(1, 12))
def test_share_covers_every_row_once(count: int, world_size: int, micro_batch: int) -> None:
    """Oracle: the step's rows; equally many forwards of one size on every rank, no more than needed."""
    ids = [RowId(0, 0, row) for row in range(count)]
    shares = [share(ids, rank, world_size, micro_batch) for rank in range(world_size)]
    seen = [row for mine in shares for batch in mine for row in batch if row is not None]
    assert sorted(seen) == ids
    assert len({len(mine) for mine in shares}) == 1
    sizes = {len(batch) for mine in shares for batch in mine}
    assert len(sizes) == 1 and max(sizes) <= micro_batch
    assert len(shares[0]) == math.ceil(math.ceil(count / world_size) / micro_batch)


def test_steps_do_not_depend_on_the_topology(rows: PretrainRows) -> None:
    """Oracle: the same rows, as a multiset, whatever the world size; positions walk on without gaps."""
    position = 0
    for _ in range(30):
        ids = rows.row_ids(position)
        assert len(ids) == 7
        for world_size in (2, 3):
            batches = [batch for rank in range(world_size) for batch in share(ids, rank, world_size, 2)]
            assert Counter(row for batch in batches for row in batch if row) == Counter(ids)
        assert rows.next_position(position) == position + 7
        position += 7


def test_weights_reach_the_rows(rows: PretrainRows) -> None:
    """Oracle: three rows of the first source for one of the second."""
    drawn = Counter(row.source for step in range(4) for row in rows.row_ids(step * 7))
    assert drawn == {0: 21, 1: 7}


def test_keep_sees_every_row_of_an_epoch_once(tmp_path: Path) -> None:
    """Oracle: the set of all rows, the last step short; drop leaves the rest out."""
    path = write_jsonl(tmp_path / "1.jsonl", texts(60, 1))
    for last_batch in ("keep", "drop"):
        made = recipe(source("one", path=path), last_batch=last_batch, rows_per_step=8)
        rows = PretrainRows(made, prepare(made, tmp_path / "data"))
        total, position, seen = rows.epoch_rows, 0, []
        assert total % 8
        while position < total:
            seen.append(rows.row_ids(position))
            position = rows.next_position(position)
        assert position == total
        drawn = [row.row for step in seen for row in step]
        assert len(set(drawn)) == len(drawn) == (total if last_batch == "keep" else total - total % 8)
        assert rows.row_ids(position)[0].epoch == 1


def test_drop_that_leaves_nothing(tmp_path: Path) -> None:
    """Oracle: the error names both counts."""
    with pytest.raises(DataError, match=r"an epoch has \d+ rows and a step needs 90000"):
        PretrainRows(*make(tmp_path, last_batch="drop", rows_per_step=90_000))


def test_sources_shorter_than_a_row(tmp_path: Path) -> None:
    """Oracle: both sources are named, with their tokens."""
    made, prepared = make(tmp_path)
    long = made.model_copy(update={"data": made.data.model_copy(update={"seq_len": 100_000})})
    with pytest.raises(DataError) as caught:
        PretrainRows(long, prepared)
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["one", "two"]


def told(rows: PretrainRows) -> list[str]:
    """Notes and warnings, in the order of the sources' names."""
    return sorted([*rows.notes(), *rows.warnings()])


def test_a_source_that_runs_out_is_announced_once(tmp_path: Path) -> None:
    """Oracle: the first step in which taking all steps meets a row of a second epoch; nothing for one that lasts.

    Up to four times (arXiv 2305.16264) it is a note, beyond that a warning.
    """
    made, prepared = make(tmp_path, rows_per_step=20)
    rows = PretrainRows(made.model_copy(update={"train": made.train.model_copy(update={"steps": 1})}), prepared)
    assert rows.warnings() == rows.notes() == []
    position, first = 0, {}
    for step in range(1, 61):
        for row in rows.row_ids(position):
            if row.epoch == 1:
                first.setdefault(row.source, step)
        position = rows.next_position(position)
    long = made.model_copy(update={"train": made.train.model_copy(update={"steps": 60})})
    rows = PretrainRows(long, prepared)
    found = [re.search(r"source (\w+) runs out .* from step (\d+) of 60", line) for line in told(rows)]
    assert {match[1]: int(match[2]) for match in found if match} == {
        ["one", "two"][at]: step for at, step in first.items()
    }
    assert len(found) == len(first) == 2
    per_epoch = {name: rows._order.first_repeat(place) for place, name in enumerate(("one", "two"))}
    often = [name for name, position in per_epoch.items() if 4.5 * position < 60 * 20]
    assert [line.split()[1] for line in rows.warnings()] == often
    assert all("beyond 4 little more is learned" in line for line in rows.warnings())


def test_an_id_beyond_the_vocabulary(tmp_path: Path) -> None:
    """Oracle: the error names shard and position; it is found when the row is read."""
    made, prepared = make(tmp_path)
    for split, position, row in (("train", 40, 2), ("val", 5, 0)):
        path = prepared.folder / "two" / f"{split}-00000.bin"
        tokens = np.fromfile(path, "<u2")
        tokens[position] = 300
        tokens.tofile(path)
        rows = PretrainRows(made, prepared)
        with pytest.raises(
            DataError, match=f"{path} holds id 300 at position {position}, beyond the vocabulary of 300"
        ):
            rows.read([RowId(1, 0, row)], split)  # type: ignore[arg-type]


def test_importing_the_package_is_quick() -> None:
    """Oracle: sys.modules of a new process: nothing heavy comes with the rows."""
    heavy = "{'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow', 'tiktoken'}"
    program = f"import sys, ds_slm.data.rows; print({heavy} & set(sys.modules))"
    root = Path(__file__).resolve().parents[3]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
