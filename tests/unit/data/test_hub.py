"""Datasets on the hub, through the real client libraries, from a stand-in on loopback that fails on demand."""

import gzip
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ds_slm.data.shards import writer
from ds_slm.data.sources import hub as hub_module
from ds_slm.data.sources.documents import documents, locate
from ds_slm.data.tokenizers.tokenizer import build_tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe.data_sections import Source
from tests.support import data_recipes
from tests.support.data_recipes import texts
from tests.support.faults import fail_at
from tests.support.hub_stand_in import COMMIT, Fault, HubStandIn
from tests.support.source_files import jsonl, zstd

ROOT = Path(__file__).resolve().parents[3]
MADE = texts(40)
README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/*.parquet
  - split: test
    path: small-test/0.parquet
---
"""


def parquet(made: list[str], fat: bool = False) -> bytes:
    """Row groups of 5 rows; with a wide column on each side."""
    filling = [random.Random(place).randbytes(10_000).hex() if fat else "x" for place in range(len(made))]
    file = io.BytesIO()
    table = pyarrow.table({"before": filling, "text": made, "behind": filling})
    pyarrow.parquet.write_table(table, file, row_group_size=5, compression="none")
    return file.getvalue()


DATASET = {
    "README.md": README.encode(),
    "small/0.parquet": parquet(MADE[:20], fat=True),
    "small/1.parquet": parquet(MADE[20:], fat=True),
    "small-test/0.parquet": parquet(MADE[:3]),
}
LINES = {
    "0.jsonl": jsonl(MADE[:15]),
    "1.jsonl.gz": gzip.compress(jsonl(MADE[15:25])),
    "2.jsonl.zst": zstd(jsonl(MADE[25:])),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that the client libraries take for the hub, with empty caches and no waits between tries."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    with HubStandIn().serving() as stand_in:
        stand_in.datasets = {"made/up": dict(DATASET), "made/lines": dict(LINES)}
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", stand_in.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield stand_in
        huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, written down instead of slept."""
    found: list[float] = []
    monkeypatch.setattr("ds_slm.data.sources.hub.time", SimpleNamespace(sleep=found.append))
    return found


def source(**fields: Any) -> Source:
    return Source(**{"name": "web", "kind": "hub", "id": "made/up", "config": "small", **fields})


SOURCES = [source(), source(id="made/lines", config=None), source(split="test")]


@pytest.mark.parametrize(("chosen", "expected"), [(SOURCES[0], MADE), (SOURCES[1], MADE), (SOURCES[2], MADE[:3])])
def test_documents_of_a_dataset(chosen: Source, expected: list[str], hub: HubStandIn) -> None:
    """Oracle: the documents that were written, files in order; and what datasets itself streams from there."""
    from datasets import load_dataset

    assert list(documents(chosen)) == expected
    rows = load_dataset(str(chosen.id), chosen.config, split=chosen.split, streaming=True, revision=COMMIT)
    readable = 25 if chosen.id == "made/lines" else len(expected)  # for .zst datasets needs one more package
    assert [row["text"] for row in islice(rows, readable)] == expected[:readable]


def test_a_program_with_another_endpoint(tmp_path: Path) -> None:
    """Oracle: HF_ENDPOINT alone leads a new process to the stand-in; an unset configuration is the default one."""
    program = (
        "from ds_slm.data.sources.documents import documents\nfrom ds_slm.recipe.data_sections import Source\n"
        "print(*documents(Source(name='web', kind='hub', id='made/lines')), sep='\\n')"
    )
    with HubStandIn().serving() as stand_in:
        stand_in.datasets = {"made/lines": dict(LINES)}
        environment = {**os.environ, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        found = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
    assert found.stdout.splitlines() == MADE


def test_preparing_from_the_hub(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shards of the same documents in a local file; and after a hub that fell silent half-way, the same."""
    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(writer, "JOURNAL_TOKENS", 200)
    local = data_recipes.recipe(
        data_recipes.source("web", path=data_recipes.write_jsonl(tmp_path / "local.jsonl", MADE)), val_fraction=0.2
    )
    made = local.model_copy(update={"data": local.data.model_copy(update={"source": [source()]})})
    whole = data_recipes.prepare(local, tmp_path / "local")
    assert data_recipes.prepare(made, tmp_path / "hub").sha256 == whole.sha256

    second_save = fail_at("replaced", "journal.json", KeyboardInterrupt(), after=1)
    with second_save, pytest.raises(KeyboardInterrupt):
        data_recipes.prepare(made, tmp_path / "killed")
    journal = json.loads((tmp_path / "killed" / "made" / "web" / "journal.json").read_text())
    assert journal["position"]["made_from"]["commit"] == COMMIT
    before = len(hub.data_requests("small/0.parquet"))
    again = data_recipes.prepare(made, tmp_path / "killed")
    assert again.sha256 == whole.sha256
    assert again.manifests["web"]["made_from"]["commit"] == COMMIT
    assert len(hub.data_requests("small/1.parquet")) > 0 and len(hub.data_requests("small/0.parquet")) - before <= 8


def text_chunks(content: bytes) -> list[tuple[int, int]]:
    """Where the text column's chunk of each row group lies, by the file's own footer."""
    metadata = pyarrow.parquet.read_metadata(io.BytesIO(content))
    chunks = [metadata.row_group(group).column(1) for group in range(metadata.num_row_groups)]
    begins = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    return [(begin, begin + chunk.total_compressed_size) for begin, chunk in zip(begins, chunks, strict=True)]


def ranges(hub: HubStandIn, path: str) -> list[tuple[int, int | None]]:
    """The ranges asked for of a file, without its last 64 kB, where the footer is looked for."""
    footer_begin = len(DATASET[path]) - (1 << 16)
    asked = [(request.begin, request.end) for request in hub.data_requests(path) if request.begin is not None]
    return [(begin, end) for begin, end in asked if begin != footer_begin]


def test_only_the_wanted_column_is_fetched(hub: HubStandIn) -> None:
    """Oracle: the footer says where the column lies; bytes served, against a file that is mostly other columns."""
    assert list(documents(source())) == MADE
    for path in ("small/0.parquet", "small/1.parquet"):
        content = DATASET[path]
        assert ranges(hub, path) == text_chunks(content)
        served_bytes = sum(request.sent_bytes for request in hub.data_requests(path))
        assert served_bytes < (1 << 16) + 20 * len(max(MADE, key=len)) + 2_000 < len(content) / 8


@pytest.mark.parametrize("chosen", SOURCES[:2], ids=["parquet", "lines"])
def test_a_position_on_the_hub(chosen: Source, hub: HubStandIn) -> None:
    """Oracle: the sequence, cut at row groups' and files' ends and between; positions are plain JSON."""
    for count in (0, 5, 15, 23, 40):
        stream = documents(chosen)
        assert list(islice(stream, count)) == MADE[:count]
        position = json.loads(json.dumps(stream.position()))
        assert list(documents(chosen, position=position)) == MADE[count:]


def test_going_on_fetches_nothing_from_before(hub: HubStandIn) -> None:
    """Oracle: the ranges asked for after the cut, against the footers' places of the row groups."""
    positions = {}
    stream = documents(source())
    for count, _ in enumerate(stream, start=1):
        positions[count] = stream.position()
    hub.requests.clear()
    assert list(documents(source(), position=positions[12])) == MADE[12:]
    assert ranges(hub, "small/0.parquet") == text_chunks(DATASET["small/0.parquet"])[2:]
    hub.requests.clear()
    assert list(documents(source(), position=positions[31])) == MADE[31:]
    assert not hub.data_requests("small/0.parquet")
    assert ranges(hub, "small/1.parquet") == text_chunks(DATASET["small/1.parquet"])[2:]


def test_a_position_stays_at_its_commit(hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: what was asked for names the commit; one that is gone, or another split, is refused at once."""
    stream = documents(source())
    assert next(iter(stream)) == MADE[0]
    assert {request.path.split("/")[5] for request in hub.data_requests(".parquet")} == {COMMIT}
    with pytest.raises(DataError, match="not what it was"):
        documents(source(split="test"), position=stream.position())
    gone = stream.position()
    gone["made_from"] = {**gone["made_from"], "commit": "f" * 40}
    with pytest.raises(DataError, match="the hub gave no 'made/up'"):
        documents(source(), position=gone)
    assert not waits_s


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((kind, "small/0.parquet$") for kind in (429, 500, 503, "reset", "cut", "short")),
        *((kind, "^/api/datasets/made/up$") for kind in (503, "cut")),
        *((kind, "/tree/") for kind in (503, "reset")),
    ],
)
def test_what_may_pass_is_asked_again(kind: int | str, path: str, hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: the whole sequence in spite of three failures; each told, with the wait, where it is we who wait."""
    hub.faults = [Fault(path, kind, 3)]
    told: list[str] = []
    assert list(documents(source(), report=told.append)) == MADE
    assert len(told) == len(waits_s) and all("trying again" in line for line in told)
    if path != "/tree/":  # where the hub's own library tries again first
        assert waits_s == (
            [1, 2] if kind in ("cut", "short") and "parquet" in path else [1, 2, 4]
        )  # a HEAD has no body


def test_progress_gives_all_tries_back(hub: HubStandIn, waits_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with two tries more, two failures before every single answer do no harm; three are too many."""
    monkeypatch.setattr(hub_module, "DELAYS_S", (1, 2))
    hub.faults = [Fault("parquet$", "cut", 2, again=True)]
    assert list(documents(source())) == MADE
    assert len(waits_s) > 16
    hub.faults = [Fault("parquet$", "cut", 3, again=True)]
    stream = documents(source())
    with pytest.raises(DataError, match=r"the hub gave no 'made/up'.*with --source web=PATH"):
        list(stream)
    hub.faults = []
    assert list(stream) == MADE


def test_a_failed_stream_leaves_a_good_position(hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: what came before the failure and what a new stream gives from its position are the sequence."""
    hub.faults = [Fault("small/1.parquet$", 503, 1_000)]
    stream, found = documents(source()), []
    with pytest.raises(DataError, match="503"):
        for text in stream:
            found.append(text)
    assert found == MADE[:20] and waits_s == list(hub_module.DELAYS_S)
    hub.faults = []
    assert found + list(documents(source(), position=stream.position())) == MADE


@pytest.mark.parametrize("headers", [{"Retry-After": "77"}, {"RateLimit": '"api";r=0;t=77'}])
def test_the_hub_says_how_long_to_wait(headers: dict[str, str], hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: the seconds in either header."""
    hub.faults = [Fault("small/1.parquet$", 429, 1, headers=headers)]
    assert list(documents(source())) == MADE
    assert waits_s == [77]


@pytest.mark.parametrize("path", ["/api/", "small/1.parquet$"])
def test_a_hub_that_never_answers(
    path: str, hub: HubStandIn, waits_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: after the last try an error says how to do without the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.faults = [Fault(path, "silent", 1_000)]
    with pytest.raises(DataError, match=r"the hub gave no 'made/up' \(.*timed out.*with --source web=PATH"):
        list(documents(source()))
    assert waits_s == list(hub_module.FIRST_DELAYS_S if path == "/api/" else hub_module.DELAYS_S)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id": "made/none"}, "no such dataset, or no access: .*hf auth login.*--source web=PATH"),
        ({"id": "made/gated"}, "gated.*accept its terms on its page, log in.*--source web=PATH"),
        ({"config": "large"}, "'large'.*'small'.*--source web=PATH"),
        ({"split": "valid"}, "no split 'valid', the splits there are: 'train', 'test'.*--source web=PATH"),
        ({"column": "txet"}, "small/0.parquet: no column 'txet'; the columns there are: 'before', 'text', 'behind'"),
        ({"id": "made/tables", "config": None}, "not made of .parquet, .*tables.csv.*--source web=PATH"),
        ({"id": "made/broken", "config": None}, "made/broken/0.parquet cannot be read"),
        ({"id": "made/short", "config": None}, "made/short/0.jsonl.gz cannot be read.*end-of-stream"),
    ],
)
def test_what_does_not_pass(fields: dict[str, Any], reason: str, hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: an error at once, with what is there instead, or how to log in, or how to do without the hub."""
    hub.datasets["made/gated"] = dict(DATASET)
    hub.gated.add("made/gated")
    hub.datasets["made/tables"] = {"tables.csv": b"text\na\n"}
    hub.datasets["made/broken"] = {"0.parquet": DATASET["small/0.parquet"][:-9]}
    hub.datasets["made/short"] = {"0.jsonl.gz": LINES["1.jsonl.gz"][:-9]}
    with pytest.raises(DataError, match=f"(?s){reason}"):
        list(documents(source(**fields)))
    assert not waits_s


def test_a_hub_out_of_reach_is_named(
    hub: HubStandIn, waits_s: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the address at which nobody listens, in the lines between the tries, in the error, and of a tokenizer."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    lines: list[str] = []
    reason = rf"the hub gave no 'made/up' \({nobody} cannot be reached: .*--source web=PATH"
    with pytest.raises(DataError, match=reason):
        list(documents(source(), report=lines.append))
    assert len(lines) == len(waits_s) == 3 and all(f"{nobody} cannot be reached" in line for line in lines)

    monkeypatch.chdir(tmp_path)
    theirs = data_recipes.BPE.replace('kind = "bpe"', 'kind = "hf"\npath = "org/name"')
    with pytest.raises(
        DataError, match=rf"tokenizer.path = 'org/name' gives no tokenizer \({nobody} cannot be reached"
    ):
        build_tokenizer(
            data_recipes.recipe(data_recipes.source("web", path="."), tokenizer=theirs), lambda source: iter(())
        )


TOKENS = {"data/0.bin": bytes(range(256)) * 40, "data/1.bin": b"ab" * 999, "README.md": b"ids", "x.txt": b"no ids"}


def ids(**fields: Any) -> Source:
    return Source(**{"name": "ids", "kind": "tokens", "id": "made/ids", **fields})


@pytest.mark.parametrize("kind", [None, 503, "reset", "cut"])
def test_token_files_are_downloaded(kind: int | str | None, hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: the bytes served, in the files' order, in spite of failures; nothing but token files is fetched."""
    hub.datasets["made/ids"] = TOKENS
    hub.faults = [Fault("1.bin$", kind, 2)] if kind else []
    place = locate(ids())
    assert [path.read_bytes() for path in place.files] == [TOKENS["data/0.bin"], TOKENS["data/1.bin"]]
    assert place.kind == "tokens" and not [request for request in hub.requests if request.path.endswith(".txt")]


def test_token_files_are_those_of_the_revision(hub: HubStandIn, waits_s: list[float]) -> None:
    """Oracle: what the hub was asked for: the revision's commit; one that is not there gives nothing."""
    hub.datasets["made/ids"] = TOKENS
    assert len(locate(ids(revision=COMMIT)).files) == 2
    assert hub.requests[0].path.endswith(f"/revision/{COMMIT}")
    hub.requests.clear()
    with pytest.raises(DataError, match="the hub gave no 'made/ids'"):
        locate(ids(revision="no-such-tag"))
    assert not any(".bin" in request.path for request in hub.requests)


def test_token_files_that_stay_away(
    hub: HubStandIn, waits_s: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a dataset without any, and one of which a file never comes: refused, though a part lies in the cache."""
    hub.datasets["made/ids"] = TOKENS
    hub.faults = [Fault("1.bin$", 503, 1_000)]
    for _ in range(2):
        with pytest.raises(DataError, match=r"the hub gave no 'made/ids'.*--source ids=PATH"):
            locate(ids())
    hub.faults = []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.bin").write_bytes(TOKENS["data/0.bin"])
    with monkeypatch.context() as patched:  # before version 2 it gave what was there
        patched.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(DataError, match=r"1\.bin did not come whole.*--source ids=PATH"):
            locate(ids())
    assert [path.name for path in locate(ids()).files] == ["0.bin", "1.bin"]
    with pytest.raises(DataError, match=r"holds no \.bin file.*--source ids=PATH"):
        locate(ids(id="made/lines"))
