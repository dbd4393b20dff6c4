"""Token shards: exact contents, the same bytes whatever happened on the way, and every mismatch refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ds_slm.data.shards import journal, writer
from ds_slm.data.shards.prepared import Prepared, open_prepared, verify
from ds_slm.data.tokenizers.tokenizer import load_tokenizer
from ds_slm.errors import DataError
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import (
    BPE,
    character_folder,
    contents,
    prepare,
    recipe,
    source,
    texts,
    two_sources,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    return two_sources(tmp_path)


def documents_of(prepared: Prepared, split: journal.Split) -> list[list[str]]:
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    arrays = [np.asarray(tokens) for tokens in prepared.tokens(split)]
    ends = [np.flatnonzero(array == prepared.eos_id) + 1 for array in arrays]
    return [
        [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(array, end)[:-1]]
        for array, end in zip(arrays, ends, strict=True)
    ]


def test_shards_hold_every_document_once(made: Recipe, tmp_path: Path) -> None:
    """Oracle: the documents that were written, each in one split, in order; counts and bytes of the manifest."""
    prepared = prepare(made, tmp_path / "data")
    train, val = documents_of(prepared, "train"), documents_of(prepared, "val")
    for place, written in enumerate((texts(300, seed=1), texts(100, seed=2) + texts(100, seed=3))):
        assert sorted(train[place] + val[place]) == sorted(written)
        assert train[place] == [text for text in written if text in set(train[place])]
        assert 0.1 < len(val[place]) / len(written) < 0.3
    assert prepared.val_text() == "".join(val[0] + val[1])
    assert prepared.val_bytes == len(prepared.val_text().encode())
    assert prepared.train_tokens == sum(map(len, prepared.tokens("train")))
    assert prepared.val_tokens == sum(map(len, prepared.tokens("val")))
    manifest = json.loads((tmp_path / "data" / "made" / "first" / "manifest.json").read_text())
    assert manifest["documents"] == {"train": len(train[0]), "val": len(val[0])}
    assert manifest["bytes"]["train"] == len("".join(train[0]).encode())
    assert manifest["dtype"] == "uint16" and manifest["tokenizer_sha256"] == prepared.tokenizer_sha256
    shard = manifest["shards"]["train"][0]
    content = (tmp_path / "data" / "made" / "first" / "train-00000.bin").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    verify(prepared)


def test_split_depends_on_seed_and_document_alone(made: Recipe) -> None:
    """Oracle: the same document falls on the same side in any company; another seed holds out others."""
    first = [text for text in texts(200) if writer.split_of(text, 0, made.data) == "val"]
    shuffled = [text for text in reversed(texts(200)) if writer.split_of(text, 0, made.data) == "val"]
    other = made.data.model_copy(update={"split_seed": 1})
    assert sorted(first) == sorted(shuffled)
    assert set(first) != {text for text in texts(200) if writer.split_of(text, 0, other) == "val"}


def test_a_single_document_is_split_by_position(tmp_path: Path) -> None:
    """Oracle: slices of the text."""
    text = "\n\n".join(texts(200))
    (tmp_path / "play.txt").write_text(text)
    prepared = prepare(recipe(source("play", path=tmp_path / "play.txt")), tmp_path / "data")
    border = int(len(text) * 0.9)
    assert documents_of(prepared, "train") == [[text[:border]]]
    assert prepared.val_text() == text[border:]


def test_preparing_again_changes_nothing(made: Recipe, tmp_path: Path) -> None:
    """Oracle: contents and times of every file; also where the sources have moved away since."""
    first = prepare(made, tmp_path / "data")
    folder = tmp_path / "data" / "made"
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    (tmp_path / "one.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert prepare(made, tmp_path / "data").sha256 == first.sha256
    assert open_prepared(made, tmp_path / "data" / "made").sha256 == first.sha256
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_data_hash_is_the_same_on_every_host(made: Recipe, tmp_path: Path) -> None:
    """Oracle: byte-equal folders and equal hashes from two data roots, and from other places of the same text."""
    one, two = prepare(made, tmp_path / "a"), prepare(made, tmp_path / "b")
    assert contents(one.folder) == contents(two.folder)
    (tmp_path / "one.jsonl").rename(tmp_path / "elsewhere.jsonl")
    moved = prepare(made, tmp_path / "c", sources={"first": tmp_path / "elsewhere.jsonl"})
    assert contents(moved.folder / "first")["train-00000.bin"] == contents(one.folder / "first")["train-00000.bin"]


PREPARE = (
    "import sys; from pathlib import Path; from ds_slm.data.shards import prepare; from ds_slm.recipe import loading\n"
    + ("prepare.prepare(loading.load(sys.argv[1]), Path(sys.argv[2]) / 'made')")
)


def start(program: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def saved(made: Recipe, path: Path) -> Path:
    path.write_text(loading.to_toml(made))
    return path


STALL = """
import time
from ds_slm.data.shards import journal, parts, prepare
def stall_where(owner, name, wanted):
    work = getattr(owner, name)
    def stalled(first, *others):
        return time.sleep(99) if wanted in str(getattr(first, "path", first)) else work(first, *others)
    setattr(owner, name, stalled)
"""


@pytest.mark.parametrize(
    ("stall", "reached"),
    [
        ("parts, 'write_json', 'tokenizer.tmp'", "tokenizer.tmp/tokenizer.json"),
        ("parts, 'write_json', 'first'", "first/val-00000.bin"),
        ("journal._Part, 'close', 'second/val'", "second/train-00000.bin.part"),
    ],
)
def test_killed_while_preparing(stall: str, reached: str, made: Recipe, tmp_path: Path) -> None:
    """Oracle: the folder of an uninterrupted run, byte for byte, after a kill at three different places."""
    whole = contents(prepare(made, tmp_path / "whole").folder)
    program = f"{STALL}\nstall_where({stall})\n{PREPARE}"
    process = start(program, saved(made, tmp_path / "made.toml"), tmp_path / "data")
    folder = tmp_path / "data" / "made"
    while not (folder / reached).exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert contents(folder).keys() != whole.keys()
    with pytest.raises(DataError, match=r"lacks .*second: run ds-slm prepare made"):
        open_prepared(made, tmp_path / "data" / "made")
    prepare(made, tmp_path / "data")
    assert contents(folder) == whole


def test_two_processes_at_once(made: Recipe, tmp_path: Path) -> None:
    """Oracle: both succeed, one of them found the work done, and the folder is as one process makes it."""
    toml = saved(made, tmp_path / "made.toml")
    processes = [start(PREPARE, toml, tmp_path / "data") for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output.count("held-out tokens") for output in outputs) == [0, 2]
    assert contents(tmp_path / "data" / "made") == contents(prepare(made, tmp_path / "alone").folder)


def test_another_recipes_folder_is_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: every difference is named, and nothing overwritten."""
    folder = prepare(made, tmp_path / "data").folder
    before = contents(folder)
    other = made.model_copy(
        update={
            "tokenizer": made.tokenizer.model_copy(update={"vocab_size": 310}),
            "data": made.data.model_copy(update={"split_seed": 9}),
        }
    )
    for refused in (
        lambda: prepare(other, tmp_path / "data"),
        lambda: open_prepared(other, folder.parent / "made"),
    ):
        with pytest.raises(
            DataError, match=r"data\.split_seed was 0, is 9, tokenizer\.vocab_size was 300, is 310"
        ) as found:
            refused()
        assert len(found.value.problems) == 3
    assert contents(folder) == before


def test_length_and_batch_are_no_part_of_the_data(made: Recipe, tmp_path: Path) -> None:
    """Oracle: a resumed run may train longer; its folder is the same one."""
    first = prepare(made, tmp_path / "data")
    longer = made.model_copy(update={"train": made.train.model_copy(update={"steps": 10**9})})
    assert prepare(longer, tmp_path / "data").sha256 == first.sha256


def test_other_local_files_are_refused(made: Recipe, tmp_path: Path) -> None:
    """Oracle: a source that has grown, and a --source of another size, are named."""
    folder = prepare(made, tmp_path / "data").folder
    before = contents(folder)
    other = write_jsonl(tmp_path / "other.jsonl", texts(10, seed=8))
    with pytest.raises(DataError, match="first was made from other local files"):
        prepare(made, tmp_path / "data", sources={"first": other})
    write_jsonl(tmp_path / "two" / "c.jsonl", texts(10, seed=8))
    with pytest.raises(DataError, match="second was made from other local files"):
        prepare(made, tmp_path / "data")
    assert contents(folder) == before


def test_all_problems_at_once(tmp_path: Path) -> None:
    """Oracle: two missing paths give two problems, and no folder of shards; an unknown name the nearest one."""
    made = recipe(source("first", path=tmp_path / "none"), source("second", kind="hub", id="a/b"))
    with pytest.raises(DataError) as caught:
        prepare(made, tmp_path / "data", sources={"second": tmp_path / "neither"})
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match=r"--source secnod: .*'second'"):
        prepare(made, tmp_path / "data", sources={"secnod": tmp_path})
    assert not contents(tmp_path / "data")


def test_no_text_left_for_validation(tmp_path: Path) -> None:
    """Oracle: the error names the source and data.val_fraction; no shard is left behind."""
    path = write_jsonl(tmp_path / "few.jsonl", texts(60))
    with pytest.raises(DataError, match=r"source 'few': nothing is left for val; .*data.val_fraction=... than 1e-06"):
        prepare(recipe(source("few", path=path), val_fraction=1e-6), tmp_path / "data")
    assert not list((tmp_path / "data" / "made" / "few").iterdir())


def test_max_tokens(made: Recipe, tmp_path: Path) -> None:
    """Oracle: shares of the limit by weight, passed by less than a document; cut text is noted; val is not empty."""
    lines: list[str] = []
    prepared = prepare(made, tmp_path / "data", max_tokens=4_000, report=lines.append)
    longest = 300
    for array, share in zip(prepared.tokens("train"), (3_000, 1_000), strict=True):
        assert share <= len(array) < share + longest
    assert all(len(array) for array in prepared.tokens("val"))
    assert sum("the run will repeat them" in line for line in lines) == 2
    assert open_prepared(made, tmp_path / "data" / "made").max_tokens == 4_000


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    """Oracle: three empty ones among a hundred: reported, and no EOS of their own."""
    path = write_jsonl(tmp_path / "some.jsonl", ["", *texts(100), "", ""])
    lines: list[str] = []
    prepared = prepare(recipe(source("some", path=path)), tmp_path / "data", report=lines.append)
    assert "some: 3 documents were skipped: 3 empty or unreadable" in lines
    assert sum(map(len, documents_of(prepared, "train") + documents_of(prepared, "val"))) == 100


def character_recipe(path: Path, folder: Path) -> Recipe:
    """A recipe on ready-made ids 0..27, with a character tokenizer."""
    characters = character_folder(folder / "characters", "\n abcdefghijklmnopqrstuvwxyz")
    section = f'kind = "hf"\nvocab_size = 28\neos_token = "\\n"\npad_token = "\\n"\npath = "{characters}"'
    return recipe(source("ids", kind="tokens", path=path), tokenizer=section)


def test_ready_made_tokens(tmp_path: Path) -> None:
    """Oracle: the ids that were written, held out behind the first EOS of the last tenth; the text they spell."""
    (tmp_path / "ids").mkdir()
    ids = np.random.default_rng(0).integers(0, 28, 5_000).astype("<u2")
    ids[:3_000].tofile(tmp_path / "ids" / "a.bin")
    ids[3_000:].tofile(tmp_path / "ids" / "b.bin")
    prepared = prepare(character_recipe(tmp_path / "ids", tmp_path), tmp_path / "data")
    border = 4_500 + int(np.flatnonzero(ids[4_500:] == 0)[0]) + 1
    assert np.array_equal(prepared.tokens("train")[0], ids[:border])
    assert np.array_equal(prepared.tokens("val")[0], ids[border:])
    assert prepared.val_text() == "".join("\n abcdefghijklmnopqrstuvwxyz"[token] for token in ids[border:])
    assert prepared.val_bytes == 5_000 - border


def test_a_source_is_read_as_far_as_the_run_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: steps x batch x weight, one per cent more and a row; a document more at most; twice the steps, twice."""
    monkeypatch.setattr("ds_slm.data.shards.prepare.WHOLE_SOURCE_TOKENS", 0)
    for name, seed in (("one", 1), ("two", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(3_000, seed=seed))
    made = recipe(
        source("one", path=tmp_path / "one.jsonl", weight=3), source("two", path=tmp_path / "two.jsonl"), tokenizer=BPE
    )
    for steps in (4, 8):
        run = made.model_copy(update={"train": made.train.model_copy(update={"steps": steps})})
        prepared = prepare(run, tmp_path / str(steps))
        drawn = steps * made.train.global_batch_tokens
        for tokens, share in zip(prepared.tokens("train"), (0.75, 0.25), strict=True):
            needed = 1.01 * drawn * share + made.data.seq_len + 1
            assert needed <= len(tokens) < needed + 300, (steps, share)


def test_ready_made_tokens_of_32_bits(tmp_path: Path) -> None:
    """Oracle: the ids that were written; without the type they are refused, not read as twice as many of 16 bits."""
    ids = np.random.default_rng(0).integers(1, 28, 5_000).astype("<u4")
    ids.tofile(tmp_path / "ids.bin")
    made = character_recipe(tmp_path / "ids.bin", tmp_path)
    with pytest.raises(DataError, match=r"every other 16-bit id is 0.*data.source.dtype = 'uint32'"):
        prepare(made, tmp_path / "data")
    section = made.data.source[0].model_copy(update={"dtype": "uint32"})
    wide = made.model_copy(update={"data": made.data.model_copy(update={"source": [section]})})
    prepared = prepare(wide, tmp_path / "data")
    assert prepared.manifests["ids"]["dtype"] == "uint16"
    found = np.concatenate([np.asarray(prepared.tokens("train")[0]), np.asarray(prepared.tokens("val")[0])])
    assert np.array_equal(found, ids)


def test_ready_made_tokens_of_one_document(tmp_path: Path) -> None:
    """Oracle: without an EOS in the last tenth, or with one at its very end alone, it is held out as it stands."""
    ids = np.full(1_000, 5, "<u2")
    for end in (5, 0):
        ids[-1] = end
        ids.tofile(tmp_path / "ids.bin")
        folder = tmp_path / str(end)
        prepared = prepare(character_recipe(tmp_path / "ids.bin", folder), folder / "data")
        assert (prepared.train_tokens, prepared.val_tokens) == (900, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([3, 4, 5] * 50 + [28], "<u2").tobytes(), r"holds id 28 at position 150, beyond the vocabulary of 28"),
        (b"\x01\x00" * 40 + b"\x01", r"has 81 bytes, no whole number of 16-bit ids"),
        (b"", "is empty, 0 bytes"),
    ],
)
def test_bad_token_files(content: bytes, message: str, tmp_path: Path) -> None:
    """Oracle: the error names file, position and limit; no shard is left behind."""
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(character_recipe(tmp_path / "ids.bin", tmp_path), tmp_path / "data")
    folder = tmp_path / "data" / "made" / "ids"
    assert not folder.exists() or not list(folder.iterdir())


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """Oracle: 65,536 ids fit into uint16, one more does not; little-endian bytes as written by hand."""
    assert journal.id_dtype(1 << 16) == np.dtype("<u2") and journal.id_dtype((1 << 16) + 1) == np.dtype("<u4")
    written = journal.ShardsInProgress(tmp_path, journal.id_dtype(100_277), {})
    written.add("val", [1, 100_257])
    written.finish()
    assert (tmp_path / "val-00000.bin").read_bytes() == bytes([1, 0, 0, 0, 0xA1, 0x87, 1, 0])
    with pytest.raises(DataError, match="does not fit into uint32"):
        journal.id_dtype((1 << 32) + 1)


def test_bpe_cannot_learn_from_ids(tmp_path: Path) -> None:
    """Oracle: said in one sentence, with the way out."""
    (tmp_path / "ids.bin").write_bytes(bytes(80))
    with pytest.raises(DataError, match="token ids, no text to train a tokenizer on"):
        prepare(recipe(source("ids", kind="tokens", path=tmp_path / "ids.bin"), tokenizer=BPE), tmp_path / "data")


def test_rows_held_out_by_draws() -> None:
    """Oracle: numpy's global generator, one draw a row: 193 of 200,000, as published for axiom-380m-instruct."""
    data = recipe(source("a", path="x"), val_fraction=0.001, split_seed=1337).data.model_copy(
        update={"held_out": "draw"}
    )
    np.random.seed(1337)
    expected = [row for row in range(200_000) if np.random.rand() < 0.001]
    assert [row for row in range(200_000) if writer.split_of("", row, data) == "val"] == expected
    assert len(expected) == 193
    beyond = writer.DRAWS + 5
    found = [row for row in range(beyond - 2_000, beyond + 2_000) if writer.split_of("", row, data) == "val"]
    draws = np.random.RandomState(1337).rand(beyond + 2_000)
    assert found == [row for row in range(beyond - 2_000, beyond + 2_000) if draws[row] < 0.001]
