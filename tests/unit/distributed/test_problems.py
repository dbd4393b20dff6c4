"""Problems of several ranks: which are said once, and which name their host."""

import pytest

from ds_slm.distributed.problems import merged, raise_on_all
from ds_slm.errors import DataError
from tests.support import ranks


@pytest.mark.parametrize(
    ("hosts", "problems", "expected"),
    [
        (["a"], [["x", "y"]], ["x", "y"]),
        (["a", "a"], [["x"], []], ["x"]),
        (["a", "b"], [["x"], ["x"]], ["x"]),
        (["a", "b"], [["x", "y"], ["y"]], ["y", "a: x"]),
        (["a", "b", "b"], [[], ["x"], ["x", "z"]], ["b: x", "b: z"]),
        (["a", "b"], [[], []], []),
    ],
)
def test_a_problem_is_said_once_and_names_its_host(
    hosts: list[str], problems: list[list[str]], expected: list[str]
) -> None:
    """Oracle: by hand: no name where all hosts have it, or where there is one host."""
    assert merged(hosts, problems) == expected


def test_one_ranks_problem_is_raised_on_all() -> None:
    """Oracle: the same error on every rank, one of which has a problem; none where no rank has one."""

    def rank(control) -> list[str]:
        raise_on_all(control, [])
        with pytest.raises(DataError) as raised:
            raise_on_all(control, ["broken"] if control.rank == 1 else [], DataError)
        return raised.value.problems

    assert ranks.run(["node1", "node2", "node2"], rank) == [["node2: broken"]] * 3
