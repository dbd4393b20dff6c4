"""An attribute that has another value for a while."""

import pytest

from ds_slm.engine.deepspeed_workarounds import replaced


class Base:
    """Has an attribute that others inherit."""

    name = "base"


class Child(Base):
    """Inherits it."""


@pytest.mark.parametrize("owner", [Base, Child, Base(), Child()], ids=["own", "inherited", "object", "of a child"])
def test_a_replaced_attribute_is_as_before_afterwards(owner: Base | type[Base]) -> None:
    """Oracle: what the owner itself holds, before and after, with an error in between."""
    before = dict(vars(owner))
    with pytest.raises(KeyError), replaced(owner, "name", "another"):
        assert owner.name == "another"
        raise KeyError
    assert owner.name == "base" and dict(vars(owner)) == before
