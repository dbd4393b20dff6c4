"""The set that every installation has."""

from itertools import islice

from ds_slm.data.shards.writer import split_of
from ds_slm.data.sources import builtin
from ds_slm.evaluate import documentation
from ds_slm.evaluate.own_sets import OWN_SETS, questions_of
from ds_slm.recipe import loading


def test_items_come_from_held_out_documents_alone() -> None:
    """Oracle: the recipe's rule of what is held out; endings of four documents, the right one in its place."""
    rows = documentation.rows()
    assert len(rows) == documentation.MOST_ITEMS == len({row["ctx"] for row in rows})
    data = loading.load("demo").data
    first = [
        " ".join(text.split())
        for row, text in islice(enumerate(builtin.read_builtin()), 9_000)
        if split_of(text, row, data) == "val"
    ]
    whole = [row["ctx"] + row["endings"][row["label"]] for row in rows]
    assert len(first) > 50
    assert sum(any(text.startswith(one) for text in first) for one in whole) >= 50
    assert all(len(set(row["endings"])) == len(row["endings"]) == 4 for row in rows)
    places = [row["label"] for row in rows]
    assert all(places.count(place) > len(rows) / 8 for place in range(4))


def test_rows_are_always_the_same() -> None:
    """Oracle: a second reading; and the set's own questions, which a hash is made of."""
    rows = documentation.rows()
    assert rows == documentation.rows()
    asked = questions_of(OWN_SETS["documentation"].find(None))
    assert [one.gold for one in asked] == [row["label"] for row in rows]
