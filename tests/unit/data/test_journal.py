"""Shards while they are written: killed at any change on disk, in several pieces, on a full disk, with its progress."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_slm.data.shards import journal, parts, writer
from ds_slm.data.shards.prepared import open_prepared, stamp_written, verify
from ds_slm.data.shards.progress import Amount, Progress
from ds_slm.data.sources import token_files
from ds_slm.errors import DataError
from ds_slm.files import write_json
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from tests.support.data_recipes import BPE, character_folder, contents, prepare, recipe, source, texts, write_jsonl
from tests.support.faults import fail_at

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, batches and journals from a few hundred documents."""
    monkeypatch.setattr(journal, "SHARD_TOKENS", 2_000)
    monkeypatch.setattr(writer, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(writer, "JOURNAL_TOKENS", 2_500)
    monkeypatch.setattr(token_files, "COPY_TOKENS", 700)


def text_recipe(folder: Path) -> Recipe:
    """Some empty documents; enough for more than one journal and shard."""
    path = write_jsonl(folder / "one.jsonl", [*texts(75, seed=1), "", "", *texts(75, seed=2)])
    return recipe(source("first", path=path), val_fraction=0.2)


def token_recipe(folder: Path) -> Recipe:
    """Ready-made ids in two files."""
    (folder / "ids").mkdir()
    ids = np.random.default_rng(0).integers(0, 28, 9_000).astype("<u2")
    ids[:4_100].tofile(folder / "ids" / "a.bin")
    ids[4_100:].tofile(folder / "ids" / "b.bin")
    characters = character_folder(folder / "characters", "\n abcdefghijklmnopqrstuvwxyz")
    section = f'kind = "hf"\nvocab_size = 28\neos_token = "\\n"\npad_token = "\\n"\npath = "{characters}"'
    return recipe(source("ids", kind="tokens", path=folder / "ids"), tokenizer=section)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [text_recipe, token_recipe])
@pytest.mark.usefixtures("small_pieces")
def test_killed_before_changes_on_disk(make: Any, step: int, tmp_path: Path) -> None:
    """Oracle: the folder of a run that was not interrupted, byte for byte, after a kill at every step-th place."""
    made = make(tmp_path)
    whole = contents(prepare(made, tmp_path / "whole").folder)
    assert sum(name.startswith(("first/train", "ids/train")) for name in whole) > 2
    (tmp_path / "made.toml").write_text(loading.to_toml(made))
    program = ROOT / "tests" / "support" / "programs" / "killed_preparing.py"
    command = [sys.executable, str(program), str(tmp_path / "made.toml"), str(tmp_path / "tries"), str(step)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    places = int(found.stdout)
    assert places > 40
    for number in range(0, places, step):
        assert contents(tmp_path / "tries" / str(number) / "data" / "made") == whole, number


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_source_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the documents that are encoded after a failure in the middle are only those behind the journal."""
    made = text_recipe(tmp_path)
    encoded = 0

    def encode(work: Any, fail_at: int | None) -> Any:
        def counted(self: Any, batch: list[str]) -> Any:
            nonlocal encoded
            encoded += len(batch)
            if fail_at is not None and encoded > fail_at:
                raise OSError("torn out")
            return work(self, batch)

        return counted

    work = writer.Tokenizer.encode_batch
    with monkeypatch.context() as patched, pytest.raises(OSError, match="torn out"):
        patched.setattr(writer.Tokenizer, "encode_batch", encode(work, 100))
        prepare(made, tmp_path / "data")
    encoded = 0
    lines: list[str] = []
    monkeypatch.setattr(writer.Tokenizer, "encode_batch", encode(work, None))
    resumed = prepare(made, tmp_path / "data", report=lines.append)
    assert 30 < encoded < 100
    assert any("first: goes on behind" in line for line in lines)
    assert contents(resumed.folder) == contents(prepare(made, tmp_path / "whole").folder)


@pytest.mark.usefixtures("small_pieces")
def test_several_shards_read_as_one(tmp_path: Path) -> None:
    """Oracle: the same documents in one shard: every slice, length, place, held-out text and the data's rows."""
    made = text_recipe(tmp_path)
    several = prepare(made, tmp_path / "several")
    journal.SHARD_TOKENS = 1 << 28  # the fixture puts its own value back
    one = prepare(made, tmp_path / "one")
    for split in journal.SPLITS:
        pieces, whole = several.tokens(split)[0], np.asarray(one.tokens(split)[0])
        assert len(pieces) == len(whole)
        assert np.array_equal(pieces, whole)
        for begin in range(0, len(whole), 37):
            for length in (0, 1, 17, 2_500):
                assert np.array_equal(pieces[begin : begin + length], whole[begin : begin + length])
    files = [shard["tokens"] for shard in several.manifests["first"]["shards"]["train"]]
    path, place = several.tokens("train")[0].place(files[0] + 3)
    assert (path.name, place) == ("train-00001.bin", 3)
    assert all(tokens >= 2_000 for tokens in files[:-1])
    assert several.val_text() == one.val_text()
    verify(several)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", ["recipe", "file", "part"])
def test_a_journal_of_something_else_is_not_used(change: str, tmp_path: Path) -> None:
    """Oracle: the folder as prepared without the interruption, after the recipe, a file or a part has changed."""
    made = text_recipe(tmp_path)
    with fail_at("finishing", error=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "data")
    folder = tmp_path / "data" / "made" / "first"
    assert (folder / "journal.json").exists()
    if change == "recipe":
        made = made.model_copy(update={"data": made.data.model_copy(update={"val_fraction": 0.3})})
        shutil.rmtree(tmp_path / "data" / "made" / "tokenizer")
    elif change == "file":
        write_jsonl(tmp_path / "one.jsonl", texts(150, seed=4))
        shutil.rmtree(tmp_path / "data" / "made" / "tokenizer")
    else:
        (folder / "train-00001.bin.part").unlink()
    assert contents(prepare(made, tmp_path / "data").folder) == contents(prepare(made, tmp_path / "whole").folder)


def test_a_full_disk(tmp_path: Path) -> None:
    """Oracle: one sentence with the way out, and afterwards the bytes of an uninterrupted run."""
    made = text_recipe(tmp_path)
    told = r"the disk is full \(.* MB free\): make room, or name another --data-root"
    with fail_at("syncing"), pytest.raises(DataError, match=told):
        prepare(made, tmp_path / "data")
    assert contents(prepare(made, tmp_path / "data").folder) == contents(prepare(made, tmp_path / "whole").folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """A disk of 32 kB, in a mount namespace of its own: exit code 2 and the sentence."""
    made = text_recipe(tmp_path)
    (tmp_path / "made.toml").write_text(loading.to_toml(made))
    small = tmp_path / "small"
    small.mkdir()
    prepare_it = "from ds_slm.cli.main import run; run()"
    arguments = f"prepare {tmp_path}/made.toml --data-root {small}"
    program = f"mount -t tmpfs -o size=32k none {small} && exec {sys.executable} -c '{prepare_it}' {arguments}"
    command = ["unshare", "--mount", "sh", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    if "mount" in found.stderr and "denied" in found.stderr:
        pytest.skip("no right to mount here")
    assert found.returncode == 2, found.stderr
    assert "the disk is full" in found.stderr and "Traceback" not in found.stderr


def test_opening_ten_billion_tokens_reads_nothing_of_them(tmp_path: Path) -> None:
    """A sparse file of 20 GB: opening it and reading two rows takes neither reads nor memory in its size."""
    made = text_recipe(tmp_path)
    prepared = prepare(made, tmp_path / "data")
    tokens = 10_000_000_000
    path = prepared.folder / "first" / "train-00000.bin"
    with path.open("r+b") as file:
        file.truncate(2 * tokens)
    manifest_path = path.with_name("manifest.json")
    manifest = {**prepared.manifests["first"]}
    manifest["shards"]["train"][0] |= {"tokens": tokens, "bytes": 2 * tokens}
    write_json(manifest_path, manifest)
    stamp_written(prepared.folder, "first", manifest)
    before = _read_bytes(), _resident_bytes()
    opened = open_prepared(made, tmp_path / "data" / "made")
    array = opened.tokens("train")[0]
    assert len(array) == opened.train_tokens == tokens
    assert not array[tokens - 1_025 :].any()
    assert _read_bytes() - before[0] < 1 << 20
    assert _resident_bytes() - before[1] < 1 << 24


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["train-00000.bin.part", "train-00001.bin.part"])
@pytest.mark.usefixtures("small_pieces")
def test_a_part_that_changed_is_written_anew(name: str, tmp_path: Path) -> None:
    """Oracle: the bytes of an uninterrupted run, after a bit of a closed or an open part flipped while nobody wrote."""
    made = text_recipe(tmp_path)
    whole = contents(prepare(made, tmp_path / "whole").folder)
    with fail_at("finishing", error=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "data")
    part = tmp_path / "data" / "made" / "first" / name
    content = bytearray(part.read_bytes())
    content[8] ^= 1
    part.write_bytes(content)
    assert contents(prepare(made, tmp_path / "data").folder) == whole


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_trial_is_no_beginning_of_another(tmp_path: Path) -> None:
    """Oracle: the tokens that were asked for, and one more document at most; not all that the other had written."""
    made = text_recipe(tmp_path)
    with fail_at("finishing", error=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prepare(made, tmp_path / "data")
    assert 500 <= prepare(made, tmp_path / "data", max_tokens=500).train_tokens < 800
    assert prepare(made, tmp_path / "whole").train_tokens > 5_000


def test_progress_tells_speeds_and_time_left() -> None:
    """Oracle: arithmetic by hand, on a clock of the test's own."""
    now_s = 0.0
    lines: list[str] = []
    progress = Progress(
        "web", Amount(100_000_000, None), lines.append, Amount(10_000_000, 40_000_000), bar=False, clock=lambda: now_s
    )
    progress.advance(1_000_000, 4_000_000)
    assert not lines
    now_s = 10.0
    progress.advance(9_000_000, 36_000_000)
    assert lines == ["web: 80 MB, 20.0 M tokens, 4.0 MB/s, 1,000,000 tokens/s, 1 min 20 s left"]


def test_progress_by_bytes_where_the_source_ends_first() -> None:
    """Oracle: half of the file's bytes in 5 s leave 5 s, however many tokens are wanted."""
    now_s = 0.0
    progress = Progress("web", Amount(float("inf"), 8_000_000), print, bar=False, clock=lambda: now_s)
    assert progress.line().endswith("time left unknown")
    now_s = 5.0
    progress.advance(0, 4_000_000)
    assert progress.line().endswith("0.8 MB/s, 0 tokens/s, 0 min 5 s left")


def test_the_bar_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: on a terminal the line stands in a bar on stderr, and nothing is reported beside it."""
    now_s = 0.0
    lines: list[str] = []
    with Progress("web", Amount(100, None), lines.append, bar=True, clock=lambda: now_s) as progress:
        now_s = 1.0
        progress.advance(50, 4_000_000)
    drawn = capsys.readouterr().err
    assert "web" in drawn and "4.0 MB/s, 50 tokens/s, 0 min 1 s left" in " ".join(drawn.split())
    assert not lines


PEAK_MEMORY = """
import sys
from pathlib import Path
from ds_slm.data.shards import prepare, writer
from ds_slm.recipe import loading
writer.BATCH_CHARACTERS = 200_000
for name in sys.argv[2:]:
    prepare.prepare(loading.load(name), Path(sys.argv[1]) / Path(name).stem, report=lambda line: None)
    peak_kb = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(1024 * int(peak_kb))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Oracle: the kernel's peak of one process that prepares 1 MB, then 13 MB: the 12 MB more add less than 3."""
    names = []
    for megabytes in (1, 13):
        path = write_jsonl(tmp_path / f"{megabytes}.jsonl", texts(100, seed=1))
        line_block = path.read_bytes()
        path.write_bytes(line_block * (megabytes * 1_000_000 // len(line_block)))
        made = recipe(source("first", path=path), tokenizer=BPE)
        (tmp_path / f"made-{megabytes}.toml").write_text(loading.to_toml(made))
        names.append(tmp_path / f"made-{megabytes}.toml")
    command = [sys.executable, "-c", PEAK_MEMORY, tmp_path / "data", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    small, large = (int(line) for line in done.stdout.split())
    assert large - small < 3_000_000, (small, large)


def test_bpe_trains_on_no_more_text_than_the_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the tokenizer of the first documents alone."""
    first, second = texts(200, seed=1), texts(400, seed=2)
    few = write_jsonl(tmp_path / "few.jsonl", first)
    made = recipe(source("first", path=write_jsonl(tmp_path / "all.jsonl", first + second)), tokenizer=BPE)
    text_bytes = sum(len(text.encode()) for text in first if writer.split_of(text, 0, made.data) == "train")
    monkeypatch.setattr(parts, "TOKENIZER_BYTES_PER_TOKEN", text_bytes / 1_000)
    by_limit = prepare(made, tmp_path / "a", max_tokens=1_000)
    monkeypatch.undo()
    alone = prepare(recipe(source("first", path=few), tokenizer=BPE), tmp_path / "b")
    assert by_limit.tokenizer_sha256 == alone.tokenizer_sha256
