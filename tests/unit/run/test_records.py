"""Records on several hosts: one that was away is given what it missed."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from ds_slm.errors import ReplacedByNewerLaunch
from ds_slm.files import write_json
from ds_slm.run import folder, launches, records
from ds_slm.run.launches import Launch
from ds_slm.run.records import Records
from ds_slm.run.report import Report
from tests.support import ranks, runs

HOSTS = ["node1", "node2", "node3"]


def write(run: Path, steps: list[int], loss: float, step_s: float = 1.0) -> None:
    """What a launch left: the ranks' loss, seconds that this host measured, and a line that a kill cut."""
    run.mkdir()
    lines = [json.dumps({"kind": "train", "step": step, "loss": loss, "step_s": step_s}) for step in steps]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_on_board(run: Path) -> list[tuple[int, float]]:
    """As TensorBoard reads it: of steps that were taken twice the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def share(tmp_path: Path, keepers: list[int], step: int, source: int) -> list[list[int]]:
    return ranks.run(
        HOSTS, lambda control: records.share(control, tmp_path / HOSTS[control.rank], keepers, step, 3, source)
    )


def test_a_host_that_was_away_is_given_what_it_missed(tmp_path: Path) -> None:
    """Oracle: node2's own lines up to the step; node1's stay beside, and TensorBoard shows no gap and no step twice."""
    write(tmp_path / "node1", [0, 1, 2], loss=2.0)
    write(tmp_path / "node2", [0, 1, 2, 3, 4, 5], loss=2.0)
    (tmp_path / "node3").mkdir()
    before = (tmp_path / "node1" / "metrics.jsonl").read_text()

    assert share(tmp_path, keepers=[0, 1], step=4, source=1) == [[0], [0], [0]]
    assert steps_of(tmp_path / "node1") == [0, 1, 2, 3, 4]
    assert (tmp_path / "node1" / "metrics.before-generation-3.jsonl").read_text() == before
    assert not (tmp_path / "node3" / "metrics.jsonl").exists()

    after = Records(tmp_path / "node1", print, first_step=4, is_given=True)
    after.write("train", 5, {"loss": 1.0})
    after.close()
    assert steps_of(tmp_path / "node1") == [0, 1, 2, 3, 4, 5]
    assert losses_on_board(tmp_path / "node1") == [*((step, 2.0) for step in range(5)), (5, 1.0)]


def test_hosts_that_know_the_same_steps_keep_what_they_measured(tmp_path: Path) -> None:
    """Oracle: their own files, byte for byte, though the seconds in them differ."""
    write(tmp_path / "node1", [1, 2, 3], loss=1.0, step_s=1.0)
    write(tmp_path / "node2", [1, 2], loss=1.0, step_s=2.0)
    (tmp_path / "node3").mkdir()
    before = {host: (tmp_path / host / "metrics.jsonl").read_bytes() for host in HOSTS[:2]}
    assert share(tmp_path, keepers=[0, 1], step=2, source=0) == [[], [], []]
    assert {host: (tmp_path / host / "metrics.jsonl").read_bytes() for host in HOSTS[:2]} == before


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_a_host_without_records_gets_them_all(tmp_path: Path, value: float) -> None:
    """Oracle: the file of the host that has one, a loss that is not a number included."""
    write(tmp_path / "node1", [1, 2, 3], loss=value)
    for host in HOSTS[1:]:
        (tmp_path / host).mkdir()
    assert share(tmp_path, keepers=[0, 1, 2], step=3, source=0) == [[1, 2]] * 3
    texts = {(tmp_path / host / "metrics.jsonl").read_text() for host in HOSTS[1:]}
    assert texts == {(tmp_path / "node1" / "metrics.jsonl").read_text().rpartition("\n")[0] + "\n"}


def test_every_host_knows_every_change(tmp_path: Path) -> None:
    """Oracle: what each launch changed, in the order of launches, each once; a damaged line is passed over."""
    first, second, third = ({"generation": number, "changes": {"train.steps": [1, number]}} for number in (1, 2, 3))
    known = {"node1": [first, third], "node2": [second, third], "node3": []}
    for host, changes in known.items():
        write(tmp_path / host, [1], loss=1.0)
        (tmp_path / host / "changes.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in changes) + "{")
    share(tmp_path, keepers=[0, 1, 2], step=1, source=1)
    assert [folder.read_changes(tmp_path / host) for host in HOSTS] == [[first, second, third]] * 3


def test_what_two_hosts_say_of_one_launch_is_told_once(tmp_path: Path) -> None:
    """Oracle: the line of the host with the checkpoint; the other one compared with the recipe it had long ago."""
    lines = {"node1": {"train.steps": [20, 60]}, "node2": {"train.steps": [40, 60]}, "node3": {"train.steps": [20, 60]}}
    for host, changes in lines.items():
        write(tmp_path / host, [1], loss=1.0)
        (tmp_path / host / "changes.jsonl").write_text(json.dumps({"generation": 3, "changes": changes}) + "\n")
    share(tmp_path, keepers=[0, 1, 2], step=1, source=1)
    expected = [{"generation": 3, "changes": {"train.steps": [40, 60]}}]
    assert [folder.read_changes(tmp_path / host) for host in HOSTS] == [expected] * 3


def test_records_of_steps_that_were_lost_give_way(tmp_path: Path) -> None:
    """Oracle: the losses of the host with the checkpoint, though another one has more lines, of weights now gone."""
    write(tmp_path / "node1", [1, 2, 4], loss=5.0)
    write(tmp_path / "node2", [1, 2, 3, 4], loss=1.0)
    (tmp_path / "node3").mkdir()
    assert share(tmp_path, keepers=[0, 1], step=4, source=0) == [[1]] * 3
    assert steps_of(tmp_path / "node2") == [1, 2, 4]
    assert {json.loads(line)["loss"] for line in (tmp_path / "node2/metrics.jsonl").read_text().splitlines()} == {5.0}


def test_a_host_with_a_checkpoint_and_no_records_takes_those_of_another(tmp_path: Path) -> None:
    """Older versions recorded on rank 0's host alone. Oracle: its file."""
    write(tmp_path / "node1", [1, 2, 3], loss=1.0)
    for host in HOSTS[1:]:
        (tmp_path / host).mkdir()
    assert share(tmp_path, keepers=[0, 1], step=3, source=1) == [[1]] * 3
    assert steps_of(tmp_path / "node2") == [1, 2, 3]


def test_a_line_that_is_no_record_is_passed_over(tmp_path: Path) -> None:
    """Oracle: the records around it."""
    write(tmp_path / "run", [1, 2], loss=1.0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:2]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 1}', "[]", lines[1]]) + "\n")
    Records(tmp_path / "run", print, first_step=2, is_given=True).close()
    assert steps_of(tmp_path / "run") == [1, 2]


def test_one_look_at_the_folder_serves_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of the looks: a record's own serves the question behind it, once; then it is looked up anew."""
    looks: list[Launch] = []

    def is_replaced(folder: Path, launch: Launch) -> bool:
        looks.append(launch)
        return working(folder, launch)

    working = launches.is_replaced
    monkeypatch.setattr(launches, "is_replaced", is_replaced)
    write_json(tmp_path / "env.json", Launch(1, "a").facts())
    made = Records(tmp_path, print, launch=Launch(1, "a"))
    begun = len(looks)
    for step in (1, 2):
        made.write("train", step, {})
        assert not made.is_replaced() and len(looks) == begun + step
    assert not made.is_replaced() and len(looks) == begun + 3

    # A newer launch: nothing is written any more, and the question behind that says so.
    write_json(tmp_path / "env.json", Launch(2, "b").facts())
    made.write("train", 3, {})
    assert made.is_replaced() and len(looks) == begun + 4
    made.close()
    assert steps_of(tmp_path) == [1, 2]


def test_records_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    """A run killed after step 3 and resumed at step 2 holds step 3 once, and a half-written line is no obstacle."""
    with (tmp_path / "terminal.txt").open("w") as terminal:
        lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in (1, 2, 3)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
        report = Report(terminal, Records(tmp_path, print, 2), total_steps=3, first_step=2)
        report.record("train", 3, {"loss": 2.0, "tokens_per_s": 1.0, "step_s": 1.0})
        report.close()
    assert [(record["step"], record["loss"]) for record in runs.records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_an_older_launch_records_nothing(tmp_path: Path) -> None:
    """Another launch is in env.json, with the same number: the older one's records stay out, the newer one's go in.

    One that finds a newer launch there when it begins drops none of that one's records.
    """
    with (tmp_path / "terminal.txt").open("w") as terminal:
        reports = []
        for launch in (Launch(1, "b"), Launch(1, "c")):
            (tmp_path / "env.json").write_text(json.dumps(launch.facts()))
            reports.append(Report(terminal, Records(tmp_path, print, launch=launch), total_steps=3))
        for number, report in enumerate(reports, start=1):
            report.record("train", number, {"loss": float(number), "tokens_per_s": 1.0, "step_s": 1.0})
            report.close()
        with pytest.raises(ReplacedByNewerLaunch):
            Records(tmp_path, print, launch=Launch(1, "b"))
    assert [record["loss"] for record in runs.records(tmp_path)] == [2.0]


@pytest.mark.parametrize("which", ["metrics.jsonl", "events"])
def test_a_full_disk_costs_records_not_the_run(tmp_path: Path, which: str) -> None:
    """Oracle: /dev/full refuses every write: told once, no error."""
    with (tmp_path / "terminal.txt").open("w+") as terminal:
        records = Records(tmp_path, lambda line: print(line, file=terminal))
        if which == "metrics.jsonl":
            records._metrics.close()
            records._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closed by the records
        else:
            events = records._board._file
            events.close()
            events._records = RecordWriter(open("/dev/full", "wb"))  # noqa: SIM115 - closed by the records
        report = Report(terminal, records, total_steps=3)
        for step in (1, 2, 3):
            report.record("train", step, {"loss": 1.0, "tokens_per_s": 1.0, "step_s": 1.0})
        report.close()
        terminal.seek(0)
        said = terminal.read()
    assert said.count("RECORDS ARE LOST") == 1 and "step 3/3" in said
