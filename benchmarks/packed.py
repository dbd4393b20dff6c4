"""Packed rows compared with plain ones: tokens a second of one forward and backward pass, in the same model and batch.

    conversations of 100 to 600 tokens --sft/packing.py--> rows
    --> packed with and without a mask: the same gradient? if not, nothing is timed, exit code 2
    --> each side in turn, ROUNDS times --> a table
    sides: plain rows (pretraining); packed, as a run computes them; packed, with a mask over T x T

python benchmarks/packed.py [--recipe slm-10m] [--rows 4] [--rounds 5] [--lengths 100 600] [--compiled] [--threads 1]

It runs on a GPU if there is one; otherwise on a CPU, where it counts CPU seconds divided by the threads, so that other
programs on the machine matter less. The precision is the recipe's if the device multiplies in it, otherwise fp32. Sides
take turns, and times of the same round are compared.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_slm.data.rows import Rows
from ds_slm.errors import DeviceError, run_program
from ds_slm.model import decoder, kernels
from ds_slm.model.documents import PackedDocuments
from ds_slm.model.kernels import DTYPES
from ds_slm.recipe import loading
from ds_slm.recipe.schema import Recipe
from ds_slm.run import measure
from sft.packing import rows_of_epoch

WARM_ROUNDS = 1
LEAST_COSINE = {torch.float32: 0.9999999, torch.bfloat16: 0.995, torch.float16: 0.999}
"""Least cosine of the whole gradients with and without a mask."""
SIDES = ("plain rows", "packed", "packed, mask")


@dataclass(frozen=True)
class Bench:
    """A model, and how long its passes take."""

    model: decoder.Decoder
    device: torch.device
    ids_BT: Tensor
    rows: Rows

    def pass_s(self, side: str) -> float:
        """Seconds of one forward and backward pass; its gradients are kept."""
        self.model.zero_grad()
        packed: dict[str, Any] = {}
        if side != "plain rows" and self.rows.document_ids is not None:
            ids_BT = torch.from_numpy(self.rows.document_ids).to(self.device)
            packed = {"sight": PackedDocuments(ids_BT, self.rows.document_count)}
        mask = patch.object(kernels, "packed_form", lambda *_: kernels.PackedForm("mask"))

        begin_s = self._now_s()
        with mask if side == "packed, mask" else nullcontext():
            sums = self.model(self.ids_BT[:, :-1], self.ids_BT[:, 1:], **packed)
        (sums.objective / self.rows.weights.size).backward()
        return self._now_s() - begin_s

    def cosine(self) -> float:
        """The cosine of the whole gradients of packed rows with and without a mask."""
        found: list[list[Tensor]] = []
        for side in SIDES[1:]:
            self.pass_s(side)
            found.append([one.grad.clone() for one in self.model.parameters() if one.grad is not None])

        def product(ours: list[Tensor], theirs: list[Tensor]) -> float:  # sums of millions need fp64
            return sum((a.double() * b.double()).sum().item() for a, b in zip(ours, theirs, strict=True))

        ours, masked = found
        return product(ours, masked) / math.sqrt(product(ours, ours) * product(masked, masked))

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()


def packed_rows(recipe: Recipe, rows: int, lengths: tuple[int, int]) -> Rows:
    """Rows full of documents with uniformly drawn lengths, packed as fine-tuning packs them."""
    T = recipe.data.seq_len
    drawn = np.random.default_rng(0).integers(lengths[0], lengths[1] + 1, size=64 * rows * T // sum(lengths))
    document_ids = np.full((rows, T + 1), -1, dtype=np.int32)
    for row, items in zip(document_ids, rows_of_epoch(drawn, T + 1, seed=0, epoch=0), strict=False):
        names = np.repeat(np.arange(len(items)), drawn[items])
        row[: len(names)] = names
    token_ids = np.random.default_rng(1).integers(recipe.model.vocab_size, size=(rows, T + 1))
    return Rows(token_ids, np.ones((rows, T), np.float32), np.ascontiguousarray(document_ids[:, :-1]))


def measure_sides(one_pass_s: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """Side -> seconds of each round; the sides take turns to begin."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(WARM_ROUNDS + rounds):
        for side in SIDES[:: -1 if number % 2 else 1]:
            seconds = one_pass_s(side)
            if number >= WARM_ROUNDS:
                found[side].append(seconds)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="slm-10m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 600))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = loading.load(args.recipe)
    dtype = DTYPES[recipe.train.precision]
    if not kernels.multiplies(device.type, dtype):
        dtype = torch.float32
    model = decoder.build(recipe.model, 0).to(device, dtype).train()
    if args.compiled:
        model.compile_parts()

    rows = packed_rows(recipe, args.rows, tuple(args.lengths))
    bench = Bench(model, device, torch.from_numpy(rows.token_ids).to(device), rows)
    cosine = bench.cosine()
    if cosine < LEAST_COSINE[dtype]:
        raise DeviceError(
            f"the gradient with and without a mask has a cosine of {cosine:.9f}; expected {LEAST_COSINE[dtype]}: the "
            "attention of packed rows is wrong on this device, and nothing was timed."
        )
    found = measure_sides(bench.pass_s, args.rounds)

    tokens = rows.weights.size
    how = kernels.effective_kernels(device, dtype, recipe.model.head_dim)["attention"]
    print(
        f"{recipe.card.name}, {args.rows} rows of {recipe.data.seq_len} tokens, {rows.document_count} documents, "
        f"{'compiled' if args.compiled else 'eager'}, {args.threads} threads, {measure.device_name(device)}, "
        f"{str(dtype).removeprefix('torch.')}, torch {torch.__version__}, {datetime.date.today()}\n"
        f"packed: {how}; cosine with the mask's gradient {cosine:.9f}\n"
        f"{'side':<14}{'tokens/s':>10}{'of plain rows':>15}{'least':>8}{'most':>8}"
    )
    for side, seconds in found.items():
        ratios = [plain / own for plain, own in zip(found["plain rows"], seconds, strict=True)]
        speed, ratio = tokens / statistics.median(seconds), statistics.median(ratios)
        print(f"{side:<14}{speed:>10,.0f}{ratio:>15.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}")
    print(json.dumps({side: [round(one, 4) for one in seconds] for side, seconds in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
