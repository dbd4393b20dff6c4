"""The fp32 weights and the model's, and who holds which part. At work in test_zero_launch.py."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_slm.checkpoint import resume
from ds_slm.engine import masters, partitions
from ds_slm.errors import TrainingError


class Alone:
    """One rank that talks to nobody."""

    rank = 0

    def gather(self, message: Any) -> list[Any]:
        return [json.loads(json.dumps(message))]


def made_engine(fragments: list[partitions.Fragment], dtype: torch.dtype = torch.bfloat16) -> Any:
    """An engine with one group of two parameters, 6 and 4 elements, in a flat partition of 12."""
    values = torch.randn(10, generator=torch.Generator().manual_seed(1))
    module = torch.nn.ParameterDict({"a": values[:6].view(2, 3).to(dtype), "b": values[6:].to(dtype)})
    flat = torch.cat([values, torch.zeros(2)])
    for parameter in module.values():
        parameter._hp_mapping = None
    for part in fragments:
        module[part.name]._hp_mapping = SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=part.param_start, numel=part.numel),
            get_hp_fragment_address=lambda part=part: SimpleNamespace(start=part.flat_start),
        )
    optimizer = SimpleNamespace(bit16_groups=[list(module.values())], single_partition_of_fp32_groups=[flat])
    return SimpleNamespace(module=module, optimizer=optimizer)


RIGHT = [partitions.Fragment("a", 0, 6, 0), partitions.Fragment("b", 0, 4, 6)]


def test_a_breach_names_rank_and_parameter() -> None:
    """Oracle: one element of one parameter changed by hand; not-a-number on both sides is no difference."""
    engine, control = made_engine(RIGHT), Alone()
    masters.check(engine, control)  # type: ignore[arg-type]
    with torch.no_grad():
        engine.module["a"][0, 0] = engine.optimizer.single_partition_of_fp32_groups[0][0] = torch.nan
    masters.check(engine, control)  # type: ignore[arg-type]
    engine.module["b"].data[3] += 1
    with pytest.raises(TrainingError, match=r"rank 0: b\)"):
        masters.check(engine, control)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fragments",
    [RIGHT[:1], [RIGHT[0], partitions.Fragment("b", 1, 3, 6)], [RIGHT[0], partitions.Fragment("b", 0, 3, 6)]],
)
def test_elements_that_no_rank_holds_are_found(fragments: list[partitions.Fragment]) -> None:
    """Oracle: a parameter missing, without its beginning, without its end; and the hash tells layouts apart."""
    control: Any = Alone()
    with pytest.raises(TrainingError, match="do not hold each element once"):
        masters.layout(made_engine(fragments), control)
    moved = [partitions.Fragment("a", 0, 6, 4), partitions.Fragment("b", 0, 4, 0)]
    assert masters.layout(made_engine(RIGHT), control) == masters.layout(made_engine(RIGHT), control)
    assert masters.layout(made_engine(RIGHT), control) != masters.layout(made_engine(moved), control)


def test_filling_needs_every_parameter_once() -> None:
    """Oracle: values by hand; a name too few, one too many, another shape."""
    engine = made_engine(RIGHT)
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}
    masters.fill(engine, values.items())
    assert engine.optimizer.single_partition_of_fp32_groups[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]
    for wrong in ({"a": values["a"]}, {**values, "c": values["b"]}, {**values, "b": torch.zeros(5)}):
        with pytest.raises(ValueError, match=r"parameter|no values"):
            masters.fill(engine, wrong.items())


def test_checkpoints_without_a_layout_are_read() -> None:
    """Older ones do not say it. Oracle: by hand; block scales of other values are not used."""
    here = {"world_size": 2, "zero_stage": 1, "optimizer_wrapper": "X", "optimizer": "Y", "partitions": "hash"}
    before = {key: value for key, value in here.items() if key != "partitions"}
    assert resume.is_same_topology(here, here) and resume.is_same_topology(before, here)
    assert not resume.is_same_topology({**before, "world_size": 3}, here)
    assert not resume.is_same_topology({**here, "partitions": "other"}, here)
    values = torch.randn(600, generator=torch.Generator().manual_seed(0))
    scales = partitions.block_absmax(values)
    assert partitions._fits(scales, values)
    assert not any(partitions._fits(other, values) for other in (scales[:2], scales * 1.1, scales * 0.9))
