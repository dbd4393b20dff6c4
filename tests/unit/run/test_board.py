"""TensorBoard's files, read by TensorBoard's own readers."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from ds_slm.recipe import loading
from ds_slm.run import board
from ds_slm.run.board import Board


def written(folder: Path) -> EventAccumulator:
    """What a run that was resumed once has written: steps 1 to 6, and 5 to 8 again."""
    recipe = loading.load("demo").model_dump(mode="json")
    for first_step, last_step in ((0, 6), (4, 8)):
        made = Board(folder, first_step)
        made.compare_by(recipe)
        made.text("recipe", "```toml\n```", first_step)
        for step in range(first_step + 1, last_step + 1):
            made.record("train", step, {"loss": 10.0 * first_step + step, "mfu": None, "ledger": "text"})
        made.record("val", last_step, {"loss": 3.0})
        made.record("samples", last_step, {"continuations": {"Once": " upon a time"}})
        made.record("launch", first_step, {"world_size": 2})
        made.close()

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """The reader of one folder."""
    return written(tmp_path_factory.mktemp("tb"))


def test_a_resumed_run_leaves_neither_overlap_nor_gap(events: EventAccumulator) -> None:
    """Steps 5 and 6 were taken twice: the later ones stand."""
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [*((step, step) for step in range(1, 5)), *((step, 40.0 + step) for step in range(5, 9))]


def test_a_record_is_one_event(tmp_path: Path) -> None:
    """Oracle: the events of the file as TensorBoard loads them: one with every value of the record, none missing."""
    values = {"loss": 1.5, "lr": 0.25, "grad_norm": 2.0, "mfu": None}
    made = Board(tmp_path, 0)
    made.record("train", 7, values)
    made.close()

    [path] = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.step == 7 and event.summary.value]
    assert [[value.tag for value in event.summary.value] for event in events] == [
        ["train/loss", "train/lr", "train/grad_norm"]
    ]


def test_the_first_chart_holds_training_and_held_out_loss(events: EventAccumulator) -> None:
    """The layout as the plug-in parses it: losses, then rates, then the machine."""
    layout = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title[:9] for category in layout.category] == ["1 loss", "2 rates", "3 machine", "4 layers,"]

    patterns = list(layout.category[0].chart[0].multiline.tag)
    shown = [tag for tag in every_tag() for pattern in patterns if re.match(pattern, tag)]
    assert shown == ["train/loss", "val/loss"]


def test_every_chart_shows_something() -> None:
    """Each pattern of the layout fits a tag that is written."""
    tags = [*every_tag(), "layers/grad_norm/layer-01", "layers/weight_norm/head"]
    for charts in board.CHARTS.values():
        for _, patterns in charts.values():
            assert all(any(re.match(pattern, tag) for tag in tags) for pattern in patterns), patterns


def test_runs_are_compared_by_recipe_and_last_values(events: EventAccumulator) -> None:
    """The table of runs, as the plug-in parses it."""
    metadata = events.SummaryMetadata
    experiment, session = (
        plugin_data_pb2.HParamsPluginData.FromString(  # pyright: ignore[reportAttributeAccessIssue]
            metadata(f"_hparams_/{name}").plugin_data.content
        )
        for name in ("experiment", "session_start_info")
    )
    values: Any = session.session_start_info.hparams
    recipe = loading.load("demo")
    assert values["optimizer.lr"].number_value == recipe.optimizer.lr
    assert values["schedule.kind"].string_value == recipe.schedule.kind

    metrics = [one.name.tag for one in experiment.experiment.metric_infos]
    assert metrics == list(board.LAST)
    assert set(metrics) <= set(every_tag())


def test_samples_are_texts_by_step(events: EventAccumulator) -> None:
    """One tag for each prompt; what is no scalar and no sample leaves nothing."""
    last = events.Tensors("samples/Once/text_summary")[-1]
    assert (last.step, last.tensor_proto.string_val[0]) == (8, b" upon a time")
    assert events.Tags()["scalars"] == ["train/loss", "val/loss"]


def every_tag() -> list[str]:
    """The tags that records of known fields have."""
    return [tag for tags in board.TAGS.values() for tag in tags.values()]
