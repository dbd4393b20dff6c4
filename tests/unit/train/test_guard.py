"""A bad step's dump, its replay, rows that are skipped, and loss spikes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ds_slm.cli import verify
from ds_slm.data import skipping
from ds_slm.data.order import RowId
from ds_slm.data.rows import Rows
from ds_slm.errors import CheckpointError
from ds_slm.model import decoder
from ds_slm.recipe import loading
from ds_slm.train import guard
from ds_slm.train.spikes import Spikes
from tests.support import runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but its recipe."""
    (tmp_path / "recipe.toml").write_text(runs.write_recipe(tmp_path).read_text())
    return tmp_path


def dump(run: Path, change: dict[str, float] | None = None, documents: np.ndarray | None = None) -> None:
    """Two rows of step 14, packed as `documents` says, and fresh weights; `change` sets the first value of some."""
    recipe = loading.parse((run / "recipe.toml").read_text(), origin="")
    weights = {name: one.detach() for name, one in decoder.build(recipe.model, 0).named_parameters()}
    for name, value in (change or {}).items():
        weights[name].view(-1)[0] = value
    ids = np.arange(2 * 33, dtype=np.int64).reshape(2, 33)
    rows = Rows(ids, np.ones((2, 32), dtype=np.float32), documents)
    described = [{"position": 91, "source_epoch_row": (0, 0, 5)}, {"position": 95, "source_epoch_row": (0, 0, 9)}]
    what = {"step": 14, "why": "the loss is not finite", "rows": described}
    folder = guard.folder_of(run, 14)
    guard.dump(folder, rows, what)
    save_file(weights, folder / guard.WEIGHTS)


def test_replay_names_the_first_layer(run: Path) -> None:
    """Oracle: a weight so large that its product overflows, in the second block's down projection."""
    dump(run, {"model.layers.1.mlp.up_proj.weight": 3e38, "model.layers.1.mlp.gate_proj.weight": 3e38})
    said = list(guard.replay(run, 14))
    assert said[0].startswith("step 14: the loss is not finite; 2 rows again")
    assert said[1].startswith("row (0, 0, 5), position 91: the output of model.layers.1.mlp.") and len(said) == 4
    assert "row (0, 0, 9), position 95" in said[2] and said[3].startswith("every row goes wrong: rather the weights")


def test_packed_rows_are_replayed_as_they_were_packed(run: Path) -> None:
    """Oracle: a row of one document has the loss of a plain row; a row of two has another."""
    losses = []
    for documents in (None, np.stack([np.zeros(32, np.int32), np.arange(32, dtype=np.int32) // 16])):
        dump(run, documents=documents)
        losses.append([line.split("loss ")[1] for line in list(guard.replay(run, 14))[1:3]])
    (plain, other), (one, two) = losses
    assert plain == one and other != two


@pytest.mark.parametrize("name", [guard.WHAT, guard.ROWS, guard.WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]"])
def test_a_damaged_dump_is_told(run: Path, name: str, content: bytes) -> None:
    """Oracle: a sentence with the folder and the way out, whichever of its files is damaged."""
    dump(run)
    path = guard.folder_of(run, 14) / name
    assert path.is_file()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000014 is damaged"):
        list(guard.replay(run, 14))


def test_replay_names_a_gradient(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a backward pass that goes wrong below the first block's output, with a finite loss."""
    original = decoder.Mlp.forward

    def broken(self: decoder.Mlp, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD * 1.0
        if x_BTD.requires_grad:
            x_BTD.register_hook(lambda gradient: gradient * float("nan"))
        return original(self, x_BTD)

    dump(run)
    monkeypatch.setattr(decoder.Mlp, "forward", broken)
    said = list(guard.replay(run, 14))
    assert said[1].endswith("the gradient at the output of model.layers.1.post_attention_layernorm is not finite")


def test_replay_of_what_is_fine_says_so(run: Path) -> None:
    """Oracle: every row's loss, and that the rows are not to blame; wrong weights are named at once."""
    dump(run)
    said = list(guard.replay(run, 14))
    assert "loss 5." in said[1] and said[-1].startswith("nothing goes wrong here")
    dump(run, {"model.norm.weight": float("nan")})
    assert "the weights themselves are not finite: model.norm.weight" in list(guard.replay(run, 14))[1]


def test_replay_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: one object alone on stdout, with the lines that are told without --json."""
    dump(run)
    verify.bad_step(run, 14, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"step": 14, "found": list(guard.replay(run, 14))}


def test_a_step_without_a_dump(run: Path) -> None:
    """Oracle: the steps there are."""
    dump(run)
    with pytest.raises(CheckpointError, match="Steps found: 14"):
        list(guard.replay(run, 3))


def test_rows_are_left_out_by_position() -> None:
    """Oracle: by hand: positions 3 to 8 and 13 of a source with four rows a step; a step is never empty."""

    class Four:
        def row_ids(self, position: int) -> list[RowId]:
            return [RowId(0, 0, 100 + place) for place in range(position, position + 4)]

        def next_position(self, position: int) -> int:
            return position + 4

    drawn = [skipping.draw(Four(), position, ((3, 9), (13, 14))) for position in (0, 4, 12)]
    assert [(begin, list(rows)) for begin, rows in drawn] == [(0, [0, 1, 2]), (8, [9, 10, 11]), (12, [12, 14, 15])]
    assert all(row.row == 100 + place for _, rows in drawn for place, row in rows.items())


def test_a_spike_stands_out_from_the_steps_before() -> None:
    """Oracle: by hand: noise of 0.01 around 3; 3.1 is within a twentieth, 3.2 is not; a slow rise never is."""
    spikes = Spikes()
    noise = [3.0 + 0.01 * (-1) ** step for step in range(40)]
    assert [spikes.excess(loss) for loss in noise] == [None] * 40
    assert spikes.excess(3.1) is None
    assert spikes.excess(3.2) == pytest.approx(0.2, abs=0.02)
    assert spikes.excess(float("nan")) is None
    rising = Spikes()
    assert not any(rising.excess(3.0 + 0.02 * step) for step in range(100))
    assert Spikes().excess(9.0) is None
