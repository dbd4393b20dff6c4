"""Rows of conversations: order, weights, what is counted and told."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_slm.data.order import RowId
from ds_slm.recipe import loading
from sft import packing
from sft.chatml import ChatML, Encoded
from sft.packing import shuffled
from sft.rows import ConversationRows, summary_line
from sft.shards import ANSWER, CUT, IDS, NO_TARGETS, TRAINED
from tests.support import conversations

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up conversations in made.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    conversations.write(folder / "made.jsonl", conversations.made(300, longest=3))
    return folder


def rows_of(folder: Path, *overrides: str) -> ConversationRows:
    """Rows of the conversations; packed or not, they are prepared alike."""
    root = folder / "-".join(part for part in overrides if not part.startswith("sft.packing"))
    root.mkdir(exist_ok=True)
    return conversations.rows(folder / "made.jsonl", root, *overrides)


def expected_of(folder: Path, mask: Any = "assistant", limit: int = 129) -> dict[str, Encoded]:
    """Every conversation that fits or was cut, by its text, cut by hand."""
    ours, found = ChatML(conversations.tokenizer()), {}
    for line in (folder / "made.jsonl").read_text().splitlines():
        encoded = ours.encode(json.loads(line)["messages"], mask)
        cut = Encoded(encoded.ids[:limit], encoded.trained[:limit], encoded.answers[:limit])
        if cut.trained[1:].any():
            found[str(cut.ids.tolist())] = cut
    return found


def test_cut_and_dropped_are_counted(tmp_path: Path) -> None:
    """Oracle: counting by hand: three that fit, one cut in its answer, one whose answer was cut off, four invalid."""
    long = "word " * 600
    found: list[Any] = [[U, A]] * 3 + [[U, {**A, "content": long}], [{**U, "content": long}, A]]
    found += [[], [U, U], [U, {**A, "content": None}], [U, {**A, "role": "bot"}], [U]]
    held_out = [[{**U, "content": f"held out {number}"}, A] for number in range(50)]
    path = conversations.write(tmp_path / "made.jsonl", found + held_out)
    rows = conversations.rows(path, tmp_path)
    summary = rows.summary()
    assert summary["dropped"] == {
        "no list of messages": 1,
        "turns that do not alternate": 1,
        "content that is no string": 1,
        "unknown role 'bot'": 1,
        NO_TARGETS: 2,
    }
    assert summary["train"]["truncated"] + summary["val"]["truncated"] == 1
    assert summary["train"]["conversations"] + summary["val"]["conversations"] == 3 + 1 + 50
    line = summary_line(summary)
    assert f"{summary['train']['conversations']:,} to train on" in line and "2 without a target" in line


def test_no_terminator_is_invented(folder: Path) -> None:
    """Oracle: each conversation encoded alone and cut: its tokens and targets are those on disk, one for one."""
    rows, expected = rows_of(folder), expected_of(folder)
    found: dict[str, np.ndarray] = {}
    for split in rows._splits.values():
        for number in range(len(split)):
            tokens = split[number]
            found[str((tokens & IDS).tolist())] = tokens
    assert found.keys() == expected.keys()
    for text, tokens in found.items():
        assert ((tokens & TRAINED) != 0).tolist() == expected[text].trained.tolist()
        assert ((tokens & ANSWER) != 0).tolist() == expected[text].answers.tolist()
    assert any(tokens[0] & CUT for tokens in found.values())


@pytest.mark.parametrize("packing", ["true", "false"])
def test_an_epoch_holds_every_conversation_once(folder: Path, packing: str) -> None:
    """Oracle: counting, over three epochs; steps are the same wherever one begins to ask."""
    rows = rows_of(folder, f"sft.packing={packing}")
    count = len(rows._splits["train"])
    steps, position = [], 0
    while not steps or steps[-1][-1].epoch < 3:
        steps.append(rows.row_ids(position))
        assert len(steps[-1]) == 8
        position = rows.next_position(position)
    ids = [row_id for step in steps for row_id in step]
    for epoch in range(3):
        places = [row_id.row for row_id in ids if row_id.epoch == epoch]
        assert places == list(range(len(places)))
        numbers = [number for place in places for number in rows._epoch(epoch)[place]]
        assert sorted(numbers) == list(range(count))
    again = rows_of(folder, f"sft.packing={packing}")
    for number in (len(steps) - 1, 3, 0, len(steps) // 2):  # a resumption knows nothing but the position
        assert again.row_ids(8 * number) == steps[number]
        assert (again.read(steps[number]).token_ids == rows.read(steps[number]).token_ids).all()
    assert rows._epoch(0) != rows._epoch(1)


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("mask", ["assistant", "last", "card", "all"])
def test_rows_are_their_conversations(folder: Path, mask: str, packing: str) -> None:
    """Oracle: each conversation encoded alone: ids, weights, document ids and padding of every row."""
    rows = rows_of(folder, f"sft.mask={mask}", f"sft.packing={packing}")
    expected, seen, shared = expected_of(folder, mask), Counter(), 0
    epoch = [RowId(0, 0, row) for row in range(len(rows._epoch(0)))]
    batch = rows.read(epoch)
    assert (batch.document_ids is not None) == (packing == "true")
    for place in range(len(epoch)):
        ids, weights = batch.token_ids[place], batch.weights[place]
        begin = 0
        for document, number in enumerate(rows._epoch(0)[place]):
            end = begin + int(rows._splits["train"].lengths[number])
            conversation = expected[str(ids[begin:end].tolist())]
            seen[str(ids[begin:end].tolist())] += 1
            trained = conversation.trained[1:]
            share = 1 / trained.sum() if mask == "card" else 1.0
            np.testing.assert_allclose(weights[begin : end - 1], trained * share, rtol=1e-6)
            if mask == "card":
                assert weights[begin : end - 1].sum() == pytest.approx(1, abs=1e-6)
            if begin:
                assert weights[begin - 1] == 0  # the first token of a conversation is predicted by another one's last
            if batch.document_ids is not None:
                assert (batch.document_ids[place, begin:end] == document).all()
            begin, shared = end, shared + (document > 0)
        assert (ids[begin:] == 1).all() and not weights[max(begin - 1, 0) :].any()
        if batch.document_ids is not None:
            assert (batch.document_ids[place, begin:] == -1).all()
    held_out = len(rows._splits["val"])
    assert len(seen) == len(expected) - held_out and set(seen.values()) == {1}
    assert (shared > 30) == (packing == "true")


def test_windows_are_packed_by_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shuffled order: rows of a window hold its conversations alone, rows in order of their earliest."""
    monkeypatch.setattr(packing, "PACK_WINDOW", 50)
    rows = rows_of(folder, "sft.packing=true")
    order = shuffled(5, 1, len(rows._splits["train"])).tolist()
    place_of = {number: place for place, number in enumerate(order)}
    windows = [{place_of[number] // 50 for number in row} for row in rows._epoch(1)]
    assert all(len(window) == 1 for window in windows)
    assert [min(window) for window in windows] == sorted(min(window) for window in windows)
    places = [[place_of[number] for number in row] for row in rows._epoch(1)]
    assert places == sorted(map(sorted, places))


def test_held_out_rows(folder: Path) -> None:
    """Oracle: each held-out conversation, one a row, in the file's order; as the mask trains and as `card` counts."""
    rows = rows_of(folder, "sft.packing=true")
    ids = rows.val_row_ids()
    val, card = rows.read(ids, "val"), rows.read(ids, "val_card")
    assert val.document_ids is None and (val.token_ids == card.token_ids).all() and len(ids) > 15
    expected = expected_of(folder)
    order = list(expected)
    found = []
    for place, weights, shares in zip(val.token_ids, val.weights, card.weights, strict=True):
        text = next(text for text in order if place.tolist()[: len(expected[text].ids)] == expected[text].ids.tolist())
        conversation = expected[text]
        length = len(conversation.ids)
        found.append(order.index(text))
        assert weights[: length - 1].tolist() == conversation.trained[1:].tolist() and not weights[length - 1 :].any()
        answers = conversation.answers[1:]
        np.testing.assert_allclose(shares[: length - 1], answers / answers.sum(), rtol=1e-6)
        assert shares.sum() == pytest.approx(1, abs=1e-6) and (place[length:] == 1).all()
    assert found == sorted(found)
    assert rows.val_row_ids(len(ids) + 1) == ids == rows.val_row_ids(len(ids))
    for limit in (1, 2, 5):
        some = rows.val_row_ids(limit)
        assert some == sorted(set(some)) and len(some) == limit and set(some) <= set(ids)
        gaps = np.diff([-1, *(row_id.row for row_id in some), len(ids)])
        assert gaps.max() <= len(ids) / limit + 1  # spread evenly


def test_the_cards_measure_needs_answers(tmp_path: Path) -> None:
    """Oracle: under `all` a conversation may hold no answer, so the card's mean over answers may be of nothing."""
    path = conversations.write(tmp_path / "made.jsonl", [[{**U, "content": str(number)}] for number in range(60)])
    rows = conversations.rows(path, tmp_path, "sft.mask=all")
    assert list(rows.measures.values()) == ["val"]
    answers = conversations.write(tmp_path / "answers.jsonl", conversations.made())
    assert list(conversations.rows(answers, tmp_path / "answers").measures.values()) == ["val", "val_card"]
    assert rows.read(rows.val_row_ids(), "val_card").weights.sum() == 0


def test_filler_rows_weigh_nothing(folder: Path) -> None:
    """Oracle: by hand: padding and weight 0; rows read together or alone are the same."""
    rows = rows_of(folder, "sft.packing=true")
    ids = rows.row_ids(16)
    filled = rows.read([ids[0], None, ids[1]])
    assert (filled.token_ids[1] == 1).all() and not filled.weights[1].any()
    assert filled.document_ids is not None and (filled.document_ids[1] == -1).all()
    for place, row_id in ((0, ids[0]), (2, ids[1])):
        alone = rows.read([row_id])
        assert (alone.token_ids[0] == filled.token_ids[place]).all()
        assert (alone.weights[0] == filled.weights[place]).all()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_describe_counts_what_is_read(folder: Path, packing: str) -> None:
    """Oracle: counting in the rows themselves."""
    rows = rows_of(folder, f"sft.packing={packing}")
    for position in (0, 24):
        ids = rows.row_ids(position)
        batch = rows.read(ids)
        assert rows.describe(ids) == {
            "conversations": sum(len(rows._epoch(row_id.epoch)[row_id.row]) for row_id in ids),
            "real": int((batch.token_ids != 1).sum()),
            "supervised": int((batch.weights > 0).sum()),
            "padded": int((batch.token_ids == 1).sum()),
        }


def test_summary_counts_both_splits(folder: Path) -> None:
    """Oracle: counting over each conversation encoded alone."""
    summary, expected = rows_of(folder).summary(), expected_of(folder).values()
    both = {key: summary["train"][key] + summary["val"][key] for key in summary["train"]}
    assert both == {
        "conversations": len(expected),
        "tokens": sum(len(conversation.ids) for conversation in expected),
        "supervised_tokens": sum(int(conversation.trained.sum()) for conversation in expected),
        "truncated": both["truncated"],
    }
    train = summary["train"]
    assert summary["supervised_share"] == train["supervised_tokens"] / train["tokens"]


def test_running_out_of_rows_is_announced(folder: Path) -> None:
    """Oracle: rows over rows a step."""
    rows = rows_of(folder, "sft.packing=false")
    count = len(rows._splits["train"])
    assert rows.warnings() == rows.notes() == []

    # Four times are a note, many more a warning.
    four = rows_of(folder, "sft.packing=false", f"train.steps={4 * count // 8}")
    assert four.warnings() == [] and f"from step {count // 8 + 1} of {4 * count // 8} on" in four.notes()[0]
    long = rows_of(folder, "sft.packing=false", "train.steps=500")
    assert long.notes() == [] and long.warnings() == [
        f"the {count} rows run out: from step {count // 8 + 1} of 500 on they come again, in another order; "
        f"{4000 / count:.0f} times in all, and beyond 4 little more is learned"
    ]


def test_sources_are_pooled(tmp_path: Path) -> None:
    """Oracle: the texts of both files, each conversation once in an epoch."""
    paths = [conversations.write(tmp_path / f"{seed}.jsonl", conversations.made(60, seed)) for seed in (1, 2)]
    second = f'[[data.source]]\nname = "other"\nkind = "files"\ncolumn = "messages"\npath = "{paths[1]}"\n[optimizer]'
    text = conversations.TINY.replace("SOURCE", str(paths[0])).replace("[optimizer]", second)
    recipe = loading.parse(text, ["sft.packing=true"])
    rows = ConversationRows(recipe, conversations.prepare(recipe, tmp_path))
    train = rows._splits["train"]
    found = {tuple((train[number] & IDS).tolist()) for row in rows._epoch(0) for number in row}
    assert len(found) == len(train) == sum(len(row) for row in rows._epoch(0))
    ours = ChatML(conversations.tokenizer())
    for seed in (1, 2):
        mine = {tuple(ours.encode(messages).ids[:129].tolist()) for messages in conversations.made(60, seed)}
        assert len(mine & found) > 40


def test_system_turns_are_dropped(folder: Path) -> None:
    """Oracle: no system header in any row; the rest of those conversations is there."""
    header = [2, *conversations.tokenizer().encode("system\n")]
    for keep in ("keep", "drop"):
        rows = rows_of(folder, f"sft.system_turns={keep}")
        train = rows._splits["train"]
        begins = [(train[number] & IDS)[: len(header)].tolist() == header for number in range(len(train))]
        assert any(begins) == (keep == "keep") and not all(begins)


def test_max_rows_reads_the_first(tmp_path: Path) -> None:
    """Oracle: the file's first rows, those that are left out counted among them."""
    made = [[U, U], *conversations.made(100)]
    path = conversations.write(tmp_path / "made.jsonl", made)
    rows = conversations.rows(path, tmp_path, "sft.max_rows=40")
    assert sum(len(split) for split in rows._splits.values()) + sum(rows.summary()["dropped"].values()) == 40
