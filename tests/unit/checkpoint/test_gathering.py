"""Tensors written front to back, and gathered window by window from ranks that are threads."""

import itertools
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_slm.checkpoint import gathering
from ds_slm.checkpoint.gathering import Gathering, Span, spans_of_kind
from ds_slm.checkpoint.tensor_file import TensorFile, in_file_order
from ds_slm.engine.partitions import Fragment, PartitionValues, Snapshot
from ds_slm.errors import CheckpointError
from ds_slm.recipe.sizes import BLOCK_VALUES
from tests.support import ranks


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names that sort otherwise than they were made, odd shapes, a scalar, and one that is empty."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.layers.10.w": (3, 2), "model.layers.2.w": (5,), 'a"é': (1,), "s": (), "z": (0,), "big": (300, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_file_written_in_pieces_is_that_of_safetensors(tmp_path: Path) -> None:
    """Oracle: `safetensors.torch.save_file`, byte by byte; and its hash."""
    content = tensors()
    save_file(content, tmp_path / "theirs")
    flat = torch.cat([content[name].reshape(-1) for name in in_file_order(content)])
    with TensorFile(tmp_path / "ours", {name: tensor.shape for name, tensor in content.items()}) as file:
        for piece in flat.split(1000):
            file.write(piece)
        fingerprint = file.sync()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert fingerprint["bytes"] == (tmp_path / "ours").stat().st_size
    assert all(torch.equal(load_file(tmp_path / "ours")[name], content[name]) for name in content)


def test_a_file_that_lacks_values_is_refused(tmp_path: Path) -> None:
    """Oracle: the bytes by hand: two values of three."""
    file = TensorFile(tmp_path / "file", {"a": [3]})
    file.write(torch.ones(2))
    with pytest.raises(CheckpointError, match="bytes were written, expected"):
        file.sync()
    file.close()
    header = struct.unpack("<Q", (tmp_path / "file").read_bytes()[:8])[0]
    assert (tmp_path / "file").stat().st_size == 8 + header + 8


def cut(content: dict[str, torch.Tensor], world_size: int, seed: int) -> list[Snapshot]:
    """Partitions at random places: parameters in the model's order, cut across their borders, as ZeRO does."""
    rng = random.Random(seed)
    flat = torch.cat([tensor.reshape(-1) for tensor in content.values()])
    borders = [0, *sorted(rng.randrange(len(flat)) for _ in range(world_size - 1)), len(flat)]
    snapshots = []
    for begin, end in itertools.pairwise(borders):
        fragments, start = [], 0
        for name, tensor in content.items():
            first, last = max(begin, start), min(end, start + tensor.numel())
            if first < last:
                fragments.append(Fragment(name, first - start, last - first, first - begin))
            start += tensor.numel()
        shapes = {name: tensor.shape for name, tensor in content.items()}
        snapshots.append(Snapshot([fragments], {"model": [PartitionValues(flat[begin:end].clone())]}, shapes, {}))
    return snapshots


@pytest.mark.parametrize(("world_size", "writers"), [(1, [0]), (2, [0]), (3, [0, 2]), (4, [1])])
def test_windows_of_all_ranks_make_up_the_tensors(
    world_size: int, writers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the tensors that were cut; windows of 97 values, which no border meets."""
    monkeypatch.setattr(gathering, "WINDOW_VALUES", 97)
    content = tensors()
    parts = cut(content, world_size, seed=world_size)

    def rank(control: Any) -> list[torch.Tensor] | None:
        own, got = parts[control.rank], []
        one = Gathering(writers, control)
        write = (lambda values: got.append(values.clone())) if control.rank in writers else None
        one.stream(own.shapes, spans_of_kind(own, "model"), write)
        assert one.problem is None
        return got if write else None

    expected = torch.cat([content[name].reshape(-1) for name in in_file_order(content)])
    results = ranks.run([f"host{number}" for number in range(world_size)], rank)
    assert [number for number, got in enumerate(results) if got is not None] == writers
    for got in results:
        assert got is None or (torch.equal(torch.cat(got), expected) and max(map(len, got)) <= 97)


def test_partitions_that_do_not_make_up_the_model_are_refused() -> None:
    """Oracle: a value that no rank holds, and one that two hold: told on every rank, nothing written."""
    for spans in ([(0, 3), (4, 2)], [(0, 4), (3, 3)]):

        def rank(control: Any, spans: list[tuple[int, int]] = spans) -> str | None:
            start, numel = spans[control.rank]
            one = Gathering([0], control)
            one.stream({"a": [6]}, [Span(start, numel, lambda begin, end: torch.ones(end - begin))], print)
            return one.problem

        assert all(problem and "do not make up" in problem for problem in ranks.run(["a", "b"], rank))


def test_a_part_of_8_bit_values_is_decoded_like_the_whole() -> None:
    """Oracle: map[code] * absmax of its block, at every border of two blocks and a bit."""
    generator = torch.Generator().manual_seed(0)
    numel = 2 * BLOCK_VALUES + 9
    codes = torch.randint(0, 256, (numel,), generator=generator, dtype=torch.uint8)
    stored = PartitionValues(codes, torch.randn(256, generator=generator), torch.rand(3, generator=generator))
    assert stored.code_map is not None and stored.absmax is not None
    expected = stored.code_map[codes.long()] * stored.absmax.repeat_interleave(BLOCK_VALUES)[:numel]
    for begin in (0, 1, BLOCK_VALUES - 1, BLOCK_VALUES, BLOCK_VALUES + 1, 2 * BLOCK_VALUES):
        for end in (begin, begin + 1, BLOCK_VALUES + 1, 2 * BLOCK_VALUES, numel):
            assert torch.equal(stored.decoded(begin, end), expected[begin:end])
