"""The same steps whatever the topology: losses and gradient norms through the real `deepspeed` command.

Every CPU runs bf16 in both of its forms (`PRODUCTS`), so what passes here does not depend on the kind of CPU. The
oracle is a plain PyTorch loop in fp32: the same model and rows, one process, torch's AdamW, no DeepSpeed.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ds_slm.data.rows import PretrainRows
from ds_slm.data.shards.prepare import prepare
from ds_slm.engine.layer_norms import layer_of
from ds_slm.engine.optim import build_optimizer
from ds_slm.model import decoder, kernels
from ds_slm.recipe import loading
from ds_slm.recipe.schedule import learning_rate
from tests.support import runs, tolerances

PROGRAM = runs.ROOT / "tests" / "support" / "programs" / "cases.py"

COVERING = {
    1: ["zero1-fp32", "zero2-fp32-gc", "zero3-bf16-gc", "zero1-bf16"],
    2: ["zero1-fp32-gc", "zero3-fp32", "zero2-bf16", "zero1-bf16-gc", "zero1-fp32-compiled", "zero2-bf16-gc-compiled"],
    3: ["zero2-fp32", "zero3-fp32-gc", "zero1-bf16", "zero1-fp32"],
}
"""World size -> cases: every pair of world size, stage, precision and checkpointing comes up."""
PRODUCTS = {1: "upcast", 2: "native", 3: "upcast"}
"""World size -> how the CPU multiplies bf16."""
EVERYTHING = [
    "-".join(parts).rstrip("-")
    for parts in itertools.product(("zero1", "zero2", "zero3"), ("fp32", "bf16"), ("", "gc"))
] + ["zero1-fp32-compiled", "zero2-fp32-gc-compiled", "zero1-bf16-compiled", "zero2-bf16-gc-compiled"]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_recipe(tmp_path_factory.mktemp("equivalence"))


@pytest.fixture(scope="module")
def reference(recipe_path: Path) -> list[dict]:
    """Loss and gradient norm of each step in a plain PyTorch loop."""
    recipe = loading.load(str(recipe_path))
    data = prepare(recipe, recipe_path.parent / "data" / recipe_path.stem, report=lambda line: None)
    rows, model = PretrainRows(recipe, data), decoder.build(recipe.model, recipe.train.seed)
    optimizer = build_optimizer(model, recipe.optimizer)
    position, records = 0, []
    for step in range(recipe.train.steps):
        batch = rows.read(rows.row_ids(position))
        position = rows.next_position(position)
        logits = model(torch.from_numpy(batch.input_ids)).flatten(0, 1)
        targets = torch.from_numpy(batch.target_ids).flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        (loss + recipe.train.z_loss * logits.logsumexp(-1).square().mean()).backward()
        layers = norms_by_layer("grad_norm", {name: one.grad for name, one in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        layers |= norms_by_layer("weight_norm", dict(model.named_parameters()))
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "layers": layers})
    return records


def norms_by_layer(what: str, tensors: dict[str, Any]) -> dict[str, float]:
    """The norm of each layer's tensors together."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        key = f"{what}/{layer_of(name)}"
        squares[key] = squares.get(key, 0.0) + float(tensor.detach().double().square().sum())
    return {key: math.sqrt(one) for key, one in squares.items()}


def products(form: str) -> dict[str, str]:
    """The environment in which a CPU multiplies bf16 in this form."""
    return {kernels.PRODUCTS_VARIABLE: form}


def launch(recipe_path: Path, out: Path, world_size: int, cases: list[str]) -> None:
    """Run the cases on this number of ranks."""
    described = []
    for case in cases:
        zero, precision, *rest = case.split("-")
        settings = [
            f"zero={zero[-1]}",
            f"set=train.precision={precision}",
            "max_steps=20",
            "set=run.layers_every_steps=4",
        ]
        settings += ["set=train.gradient_checkpointing=true"] * ("gc" in rest) + ["compiled=1"] * ("compiled" in rest)
        settings += [f"broken={r}" for r in rest if r not in ("gc", "compiled")]
        described.append(f"{case}:{','.join(settings)}")
    command = runs.deepspeed_command(world_size, "--recipe", recipe_path, "--out", out, *described, script=PROGRAM)
    done = runs.run(command, cwd=out.parent, timeout_s=600, **products(PRODUCTS[world_size]))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


class Compared(NamedTuple):
    """A case beside the run it must equal."""

    excess: float
    """The largest difference of a loss or gradient norm, in tolerances."""
    same_rows: bool
    layers_excess: float
    """The same of a layer's norms; the gradients' share the global norm's rounding."""


def launch_and_compare(out: Path, world_size: int, cases: list[str], reference: list[dict]) -> dict[str, Compared]:
    """Run the cases on this number of ranks, and compare each with the oracle of its precision."""
    launch(out.parent / "tiny.toml", out, world_size, cases)
    one_process = runs.records(out.parent / f"reference-bf16-{PRODUCTS[world_size]}")

    # bf16 is compared with the first bf16 run: rounding moves every loss by more than the topologies differ
    compared = {}
    for case in cases:
        precision = case.split("-")[1]
        expected = reference if precision == "fp32" else one_process
        found = runs.records(out / case)
        ledgers = [[record["ledger"] for record in records] for records in (found, one_process)]
        compared[case] = Compared(
            tolerances.excess(found, expected, precision),
            ledgers[0] == ledgers[1],
            layers_excess(out / case, reference) if precision == "fp32" else 0.0,
        )
    return compared


def layers_excess(run: Path, reference: list[dict]) -> float:
    """The worst difference of a layer's norm from the plain loop's, in tolerances of a gradient norm."""
    found = runs.records(run, "layers")
    assert [record["step"] for record in found] == [4, 8, 12, 16, 20]
    worst = 0.0
    for record in found:
        expected = reference[record["step"] - 1]["layers"]
        assert record.keys() - {"kind", "step"} == expected.keys()
        worst = max(worst, *(abs(record[layer] / norm - 1) for layer, norm in expected.items()))
    return worst / tolerances.TOPOLOGIES["fp32"].grad_norm


@pytest.fixture(scope="module")
def reference_bf16(recipe_path: Path) -> None:
    """One process, no gradient checkpointing, launched without the launcher: once for each form of products."""
    for form in tolerances.PRODUCTS:
        out = recipe_path.parent / f"reference-bf16-{form}"
        flags = ["--recipe", recipe_path, "--run-dir", out, "--data-root", recipe_path.parent / "data"]
        command = [str(runs.BIN / "python"), str(runs.ROOT / "ds_slm" / "pretrain.py"), *map(str, flags)]
        command += ["--set", "train.precision=bf16", "--micro-batch", "7"]
        done = runs.run(command, cwd=recipe_path.parent, **products(form))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.usefixtures("reference_bf16")
def test_every_topology_takes_the_same_steps(recipe_path: Path, reference: list[dict], world_size: int) -> None:
    """Oracle: the plain PyTorch loop (fp32), one bf16 process (bf16)."""
    found = launch_and_compare(recipe_path.parent / f"world{world_size}", world_size, COVERING[world_size], reference)
    assert max(one.excess for one in found.values()) < 1, found
    assert all(one.same_rows for one in found.values()), found
    assert max(one.layers_excess for one in found.values()) < 1, found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.usefixtures("reference_bf16")
def test_every_topology_takes_the_same_steps_all(recipe_path: Path, reference: list[dict], world_size: int) -> None:
    """The whole matrix; oracles as above."""
    found = launch_and_compare(recipe_path.parent / f"all{world_size}", world_size, EVERYTHING, reference)
    assert max(one.excess for one in found.values()) < 1, found
    assert all(one.same_rows for one in found.values()), found
    assert max(one.layers_excess for one in found.values()) < 1, found


@pytest.mark.usefixtures("reference_bf16")
def test_a_mean_of_means_is_found(recipe_path: Path, reference: list[dict]) -> None:
    """A mutation: where each rank divides by its own share, seven rows on two ranks must give other steps."""
    out = recipe_path.parent / "broken"
    launch(recipe_path, out, 2, ["zero1-fp32-mean_of_means", "zero1-bf16-mean_of_means"])
    expected = {"fp32": reference, "bf16": runs.records(recipe_path.parent / f"reference-bf16-{PRODUCTS[2]}")}
    for precision, whole in expected.items():
        broken = runs.records(out / f"zero1-{precision}-mean_of_means")
        assert tolerances.excess(broken, whole, precision) > tolerances.MUTATION_FACTOR, precision
