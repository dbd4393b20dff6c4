"""Fine-tuning as a whole: the same steps on any number of ranks, packed or alone, until answers are known by heart."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ds_slm.data.shards import writer
from ds_slm.engine.optim import build_optimizer
from ds_slm.model import decoder
from ds_slm.model.documents import PackedDocuments
from ds_slm.publish.export import export
from ds_slm.publish.generate import GREEDY, generate
from ds_slm.recipe import loading
from ds_slm.recipe.schedule import learning_rate
from sft.chatml import ChatML
from sft.rows import ConversationRows
from tests.support import conversations, runs, tolerances

PROGRAM = runs.ROOT / "sft" / "train.py"


pytestmark = pytest.mark.usefixtures("one_thread")


def test_rates_of_axiom_380m_instruct() -> None:
    """Oracle: the rates in the published logs, to all printed digits; 641 steps of 312 rows of 1,024 targets."""
    recipe = loading.load("axiom-380m-instruct")
    printed = {step: f"{learning_rate(recipe, step):.5e}" for step in (0, 51, 200, 538, 540, 640)}
    assert printed == {
        0: "1.50000e-04",
        51: "3.00000e-04",
        200: "3.00000e-04",
        538: "3.00000e-04",
        540: "2.99937e-04",
        640: "3.02511e-05",
    }
    assert (recipe.train.steps, recipe.train.global_batch_tokens, recipe.rows_per_step) == (641, 319_488, 312)
    assert recipe.sft is not None
    assert recipe.sft.model_dump() == {
        "mask": "card", "packing": False, "system_turns": "drop", "invalid": "drop", "max_rows": 200_000
    }  # fmt: skip
    optimizer, data = recipe.optimizer, recipe.data
    assert (optimizer.name, optimizer.weight_decay, optimizer.grad_clip) == ("adamw8bit", 0.1, 1.0)
    assert (data.held_out, data.split_seed, data.val_fraction, data.seq_len) == ("draw", 1337, 0.001, 1_024)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ConversationRows:
    """Short conversations, several in a row."""
    folder = tmp_path_factory.mktemp("packed")
    path = conversations.write(folder / "made.jsonl", conversations.made(60, longest=1))
    return conversations.rows(path, folder, "sft.packing=true", "sft.mask=card")


def read_full_rows(rows: ConversationRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, T + 1], weights and documents [B, T] of the rows that hold the most conversations."""
    epoch = rows.row_ids(0)
    batch = rows.read(epoch)
    assert batch.document_ids is not None
    fullest = np.argsort(-batch.document_ids.max(axis=1), kind="stable")[:4]
    assert batch.document_ids[fullest].max(axis=1).min() >= 1
    found = (batch.token_ids, batch.weights, batch.document_ids)
    return tuple(torch.from_numpy(array[fullest]) for array in found)  # type: ignore[return-value]


def gradients(model: Any, *batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*batch).objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"exclusive_attention": True}])
def test_packed_is_as_alone(packed: ConversationRows, changes: dict[str, bool]) -> None:
    """Oracle: each conversation in a row of its own, without document ids: logits, loss sums and gradients, in fp32."""
    shape = packed._recipe.model.model_copy(update=changes)
    model = decoder.build(shape, seed=1)
    ids, weights, documents = read_full_rows(packed)
    logits_BTV = model(ids[:, :-1], None, None, PackedDocuments(documents)).detach()
    together, alone = gradients(model, ids[:, :-1], ids[:, 1:], weights, PackedDocuments(documents)), []
    total = 0.0
    for row, places in enumerate(documents):
        for document in range(int(places.max()) + 1):
            (at,) = torch.where(places == document)
            first, end = int(at[0]), int(at[-1]) + 1
            part = ids[row : row + 1, first : end + 1]
            alone.append(gradients(model, part[:, :-1], part[:, 1:], weights[row : row + 1, first:end]))
            torch.testing.assert_close(
                logits_BTV[row, first:end], model(part[:, :-1])[0].detach(), atol=1e-5, rtol=1e-5
            )
            total += float(weights[row, first:end].sum())
    assert total == pytest.approx(len(alone), abs=1e-4)  # `card`: each conversation weighs 1, so none of it is lost
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in alone), atol=2e-5, rtol=1e-5)
    without = model(ids[:, :-1]).detach()
    assert (without - logits_BTV)[documents == 1].abs().max() > 1e-2  # what a missing mask would do


def test_a_conversation_changes_no_other(packed: ConversationRows) -> None:
    """Oracle: the same logits to the last bit where other conversations, or the padding, hold other tokens."""
    model = decoder.build(packed._recipe.model, seed=2)
    ids, _, documents = read_full_rows(packed)
    ids = ids[:, :-1]
    before = model(ids, None, None, PackedDocuments(documents))
    noise = torch.randint(ids.max() + 1, ids.shape, generator=torch.Generator().manual_seed(0))
    for document in range(-1, int(documents.max()) + 1):
        others = torch.where(documents == document, noise, ids)
        after = model(others, None, None, PackedDocuments(documents))
        same = documents != document
        assert torch.equal(after[same], before[same])
        assert document not in documents or not torch.equal(after[~same], before[~same])


def test_positions_restart(packed: ConversationRows) -> None:
    """Oracle: counting from 0 in each conversation; one moved to another place of the row keeps its logits."""
    model = decoder.build(packed._recipe.model, seed=3)
    ids, _, documents = read_full_rows(packed)
    positions, mask = decoder.packed(documents)
    for row, places in enumerate(documents.tolist()):
        lengths = [len(list(run)) for _, run in itertools.groupby(places)]
        assert positions[row].tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(mask, (documents[:, :, None] == documents[:, None, :]).tril())
    row = ids[:1, :-1]
    order = torch.argsort(-documents[0], stable=True)  # the last conversation first, the padding at the end
    before = model(row, None, None, PackedDocuments(documents[:1]))
    after = model(row[:, order], None, None, PackedDocuments(documents[:1, order]))
    torch.testing.assert_close(after[0], before[0, order], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, conversations with very unequal numbers of targets, and a base with its tokenizer."""
    folder = tmp_path_factory.mktemp("sft")
    made = conversations.made(200, seed=8, longest=3)
    for place, messages in enumerate(made):
        for message in messages[1:] if place % 3 == 0 else []:
            message["weight"] = int(message is messages[-1])  # masks that are zero for the most part
    path = conversations.write(folder / "made.jsonl", made)
    (folder / "tiny.toml").write_text(conversations.TINY.replace("SOURCE", str(path)))
    conversations.tokenizer().save(folder / "tokenizer")
    shape = conversations.recipe(path).model
    export(decoder.build(shape, seed=7).state_dict(), shape, folder / "tokenizer", folder / "base")
    return folder


def rows_of(folder: Path, *overrides: str) -> ConversationRows:
    return conversations.rows(folder / "made.jsonl", folder / "-".join(["here", *overrides]), *overrides)


def plain_steps(rows: ConversationRows, parts: int = 1) -> list[dict[str, float]]:
    """Loss and gradient norm of each step in a plain PyTorch loop; with `parts`, the mistake of a mean of means."""
    recipe = rows._recipe
    model = decoder.build(recipe.model, seed=7)
    optimizer = build_optimizer(model, recipe.optimizer)
    position, records = 0, []
    for step in range(recipe.train.steps):
        ids = rows.row_ids(position)
        position = rows.next_position(position)
        losses = []
        for part in range(parts):
            batch = rows.read(ids[part::parts])
            documents = None if batch.document_ids is None else PackedDocuments(torch.from_numpy(batch.document_ids))
            logits = model(torch.from_numpy(batch.input_ids), None, None, documents).flatten(0, 1)
            nll = F.cross_entropy(logits, torch.from_numpy(batch.target_ids).flatten(), reduction="none")
            weights = torch.from_numpy(batch.weights).flatten()
            z = logits[weights > 0].logsumexp(-1)
            loss = (weights * nll).sum() / weights.sum()
            ((loss + recipe.train.z_loss * z.square().mean()) / parts).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"loss": float(np.mean(losses)), "grad_norm": norm.item()})
    return records


def card_loss(folder: Path, rows: ConversationRows) -> float:
    """The mean over held-out conversations of the mean over each one's assistant turns, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    held_out = {tuple(rows.read([row_id], "val").token_ids[0]) for row_id in rows.val_row_ids()}
    means = []
    for line in (folder / "made.jsonl").read_text().splitlines():
        ids: list[int] = []
        is_counted: list[bool] = []
        for message in json.loads(line)["messages"]:
            turn = [f"<|im_start|>{message['role']}\n", message["content"], "<|im_end|>", "\n"]
            encoded = [token for text in turn for token in theirs(text).input_ids]
            ids += encoded
            is_counted += [message["role"] == "assistant" and message.get("weight", 1) == 1] * len(encoded)
        ids, is_counted = ids[:129], is_counted[:129]
        if tuple(ids + [1] * (129 - len(ids))) not in held_out:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        means.append(nll[torch.tensor(is_counted[1:])].mean().item())
    assert len(means) == len(held_out) > 5
    return float(np.mean(means))


def train(folder: Path, name: str, ranks: int, *flags: object) -> Path:
    """sft/train.py through the launcher; the run's folder."""
    run = folder / name
    arguments = ["--recipe", folder / "tiny.toml", "--base", folder / "base", "--run-dir", run]
    command = runs.deepspeed_command(
        ranks, *arguments, "--data-root", folder / name / ".." / f"{name}-data", *flags, script=PROGRAM
    )
    done = runs.run(command, cwd=folder, timeout_s=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


CASES = {
    "one rank, eight rows": (1, 8, "zero1", []),
    "two ranks, four rows": (2, 4, "zero1", []),
    "two ranks, packed, card": (2, 2, "zero2", ["sft.packing=true", "sft.mask=card"]),
    "three ranks, last": (3, 2, "zero3", ["sft.mask=last"]),
}
SLOW = {"three ranks, last"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_every_topology_takes_the_same_steps(folder: Path, case: str) -> None:
    """Oracle: a plain PyTorch loop over the same rows; held out, transformers' own loss of the base."""
    ranks, micro_batch, zero, overrides = CASES[case]
    settings = [part for override in overrides for part in ("--set", override)]
    config = runs.ROOT / "ds_configs" / f"{zero}.json"
    run = train(folder, case.replace(", ", "-").replace(" ", "_"), ranks, "--micro-batch", micro_batch,
                "--ds-config", config, *settings)  # fmt: skip
    rows = rows_of(folder, *overrides)
    found = runs.records(run)
    assert tolerances.excess(found, plain_steps(rows), "fp32") < 1
    position = 0
    for record in found:
        ids = rows.row_ids(position)
        position = rows.next_position(position)
        assert {key: record[key] for key in ("conversations", "real", "supervised", "padded")} == rows.describe(ids)
    first = runs.records(run, "val")[0]
    assert first["step"] == 0 and first["tokens"] == 0
    assert first["card_loss"] == pytest.approx(card_loss(folder, rows), rel=1e-5)


def test_resuming_is_exact_and_keeps_its_base(folder: Path, tmp_path: Path) -> None:
    """Oracle: losses, ledgers and weights of a run that was not interrupted; then the refusal of another base."""
    whole = train(folder, "whole", 2)
    train(folder, "halves", 2, "--max-steps", 2)
    train(folder, "halves", 2, "--max-steps", 2)  # nothing to do
    assert [one["step"] for one in runs.records(folder / "halves")] == [1, 2]
    halves = train(folder, "halves", 2)
    records = [[(one["loss"], one["grad_norm"], one["ledger"]) for one in runs.records(run)] for run in (whole, halves)]
    assert records[0] == records[1] and len(records[0]) == 6
    done = [json.loads((run / "done.json").read_text()) for run in (whole, halves)]
    assert done[0] == done[1]
    assert json.loads((whole / "env.json").read_text())["rows"]["supervised_share"] > 0
    shape = conversations.recipe(folder / "made.jsonl").model
    export(decoder.build(shape, seed=8).state_dict(), shape, folder / "tokenizer", tmp_path / "other")
    arguments = ["--recipe", folder / "tiny.toml", "--base", tmp_path / "other", "--run-dir", whole]
    command = runs.deepspeed_command(1, *arguments, "--data-root", folder / "whole-data", script=PROGRAM)
    refused = runs.run(command, cwd=folder)
    assert refused.returncode != 0
    assert "was trained with base_sha256" in refused.stderr and "Traceback" not in refused.stderr


def test_a_mean_of_means_would_be_found(folder: Path) -> None:
    """A mutation: where each of two ranks divides by its own weights, these rows give other losses and norms."""
    rows = rows_of(folder)
    targets = [int((rows.read([row_id]).weights > 0).sum()) for row_id in rows.row_ids(0)]
    assert max(targets) > 5 * min(targets)
    assert tolerances.excess(plain_steps(rows, parts=2), plain_steps(rows), "fp32") > 10 * tolerances.MUTATION_FACTOR


def test_overfitted_answers_come_back_and_end(tmp_path: Path) -> None:
    """Oracle: the eight conversations themselves: every answer word for word, then <|im_end|>, greedily."""
    path = tmp_path / "made.jsonl"
    recipe = conversations.recipe(path, "sft.packing=true", "data.val_fraction=0.3", "train.global_batch_tokens=512")
    chatml, split = ChatML(conversations.tokenizer()), {"train": [], "val": []}
    for talk in conversations.made(60, seed=4, longest=2):
        if len(chatml.encode(talk).ids) <= 129 and talk[-1]["role"] == "assistant":
            split[writer.split_of(json.dumps(talk), 0, recipe.data)].append(talk)
    learned, held_out = split["train"][:8], split["val"][:1]
    conversations.write(path, learned + held_out)
    rows = ConversationRows(recipe, conversations.prepare(recipe, tmp_path))
    assert len(rows._splits["train"]) == 8
    shape = recipe.model.model_copy(update={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    model = decoder.build(shape, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    position = 0
    for _ in range(120):
        batch = rows.read(rows.row_ids(position))
        position = rows.next_position(position)
        ids, documents = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.document_ids)
        sums = model(ids[:, :-1], ids[:, 1:], torch.from_numpy(batch.weights), PackedDocuments(documents))
        (sums.objective / sums.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    answers = 0
    for messages in learned:
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = chatml.prompt(messages[:place])
                new = generate(model, prompt, 120, GREEDY, stop_ids=[chatml.end_id])
                assert new[-1] == chatml.end_id
                assert chatml.tokenizer.decode(new[:-1]) == message["content"]
                answers += 1
    assert answers >= 8
