"""Log-probabilities of continuations: a context is computed once, and its continuations are branches of it.

    items: [[Request, ...], ...] --> rows: context | continuation 1 | continuation 2 | ... --> batches of about the same
    number of tokens --> the model's forward --> TokenScores --> [[Score, ...], ...]

A benchmark's item asks for several continuations of one context. Their sequences begin with the same tokens, so a row
holds the shared tokens once; each continuation then sees them and itself, at the positions it would have alone
(`decoder.branched`). The head runs only at scored tokens, and batches are measured in tokens, not in rows.

A sequence that is longer than the model's context loses its oldest tokens, as in lm-evaluation-harness. A continuation
that is longer than the context by itself loses its oldest tokens too, and is counted; the harness stops there.

Known gap: a model of transformers whose layers do not take such a mask computes a context again for each continuation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ds_slm.model.decoder import Continuations, Decoder
from ds_slm.model.loss import TokenScores

BATCH_TOKENS = {"cpu": 512, "cuda": 65536}
"""Tokens of a batch, including padding. Small batches hold little padding, and stay in a CPU's cache between layers."""
LEAST_SHARED = 0.25
"""Continuations share a row if this part of the longest sequence is common to all; otherwise the mask costs more."""


class Request(NamedTuple):
    """One continuation of one context."""

    context_ids: Sequence[int]
    continuation_ids: Sequence[int]


class Score(NamedTuple):
    """What a model says of a continuation."""

    log_probability: float
    """The sum over all its tokens, in nats: a float64 sum of the model's fp32 values."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""
    cut_tokens: int
    """Tokens of the continuation that did not fit into the model's context: they are not scored."""


@dataclass
class Counts:
    """Counts of what was scored, and of what did not fit into the model's context."""

    tokens: int = 0
    """Tokens of all requests."""
    cut_contexts: int = 0
    """Requests whose context lost its oldest tokens."""
    cut_continuations: int = 0
    """Requests whose continuation alone is longer than the model's context: its oldest tokens are not scored."""

    def add(self, requests: Sequence[Request], scores: Sequence[Score], max_length: int) -> None:
        """Count an item."""
        for request, one in zip(requests, scores, strict=True):
            length = len(request.context_ids) + len(request.continuation_ids)
            self.tokens += length
            self.cut_contexts += length > max_length + 1
            self.cut_continuations += one.cut_tokens > 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Window(NamedTuple):
    """The part of a request that fits into the model's context."""

    read: list[int]
    targets: list[int]
    """The tokens that are scored: the newest of these tokens, each one place later."""


class Row(NamedTuple):
    """One row of a batch, and the requests to which its scored tokens belong."""

    ids: list[int]
    branch_ids: list[int]
    places: list[int]
    """The tokens after which a target is scored, in ascending order."""
    targets: list[int]
    requests: list[int]
    """The request of each target, by its number among all."""
    has_branches: bool


class Batch(NamedTuple):
    """Some rows as tensors."""

    ids_BT: Tensor
    continuations: Continuations
    requests_N: Tensor


class Scorer(Protocol):
    """A model that scores batches."""

    max_length: int
    """Tokens of the longest sequence."""
    branches: bool
    """Whether its rows may have branches."""
    device: torch.device
    at_a_time: int
    """Number of batches that are scored together."""
    batch_tokens: int
    """Tokens of a batch."""

    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens, of `at_a_time` batches or fewer."""
        ...


class DecoderScorer:
    """Our own decoder as a scorer."""

    branches = True
    at_a_time = 1

    def __init__(self, model: Decoder) -> None:
        self.model = model.eval()
        self.max_length = model.shape.max_position_embeddings
        self.device = model.head_weight_VD.device
        self.batch_tokens = BATCH_TOKENS[self.device.type]

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """The scores of each batch's tokens."""
        return [self.model(batch.ids_BT, continuations=batch.continuations) for batch in batches]


def score(
    scorer: Scorer,
    items: Sequence[Sequence[Request]],
    report: Callable[[int], None] = lambda rows: None,
    batch_tokens: int | None = None,
) -> list[list[Score]]:
    """The scores of every request of every item.

    Args:
        scorer: the model.
        items: requests that belong together; requests of an item share a row if they begin with the same tokens.
        report: takes the number of rows that a batch had, once it is done.
        batch_tokens: tokens of a batch; None takes the scorer's. Figures do not depend on it.
    """
    if not any(items):
        return [[] for _ in items]

    requests = [request for item in items for request in item]
    batch_tokens = batch_tokens or scorer.batch_tokens
    rows = [row for row in _rows(items, scorer.max_length, scorer.branches, batch_tokens) if row.targets]
    sums = torch.zeros(len(requests), dtype=torch.float64)
    misses = torch.zeros(len(requests), dtype=torch.int64)

    waiting = batches(rows, batch_tokens)
    while chosen := list(islice(waiting, scorer.at_a_time)):
        made = [to_batch(one, scorer.device) for one in chosen]
        for batch, scores in zip(made, scorer(made), strict=True):
            sums.index_add_(0, batch.requests_N, scores.log_probability_N.double().cpu())
            misses.index_add_(0, batch.requests_N, (~scores.is_greedy_N).long().cpu())
        report(sum(map(len, chosen)))

    found = iter(zip(sums.tolist(), misses.tolist(), strict=True))
    return [
        [
            Score(total, missed == 0, max(0, len(request.continuation_ids) - scorer.max_length))
            for request, (total, missed) in zip(item, found)  # noqa: B905 - `found` goes on with the next item
        ]
        for item in items
    ]


def _rows(
    items: Sequence[Sequence[Request]], max_length: int, branches: bool, row_tokens: int = 2**20
) -> Iterator[Row]:
    """The rows of all items, one or more for each: the context, and after it at most `row_tokens`, or one branch."""
    first = 0
    for item in items:
        windows = [_window(request, max_length) for request in item]
        shared = _common_prefix([window.read for window in windows])
        longest = max((len(window.read) for window in windows), default=0)
        same = all(len(window.read) == shared for window in windows)

        if same:
            yield _joined_row(windows, shared, first)
        elif branches and shared >= LEAST_SHARED * longest:
            yield from _joined_rows(windows, shared, first, row_tokens)
        else:
            for number, window in enumerate(windows, first):
                yield _joined_row([window], len(window.read), number)
        first += len(item)


def _joined_rows(windows: Sequence[Window], shared: int, first: int, row_tokens: int) -> Iterator[Row]:
    """Rows, each with all branches that fit into it: a row's mask grows with the square of its length."""
    begin, length = 0, 0
    for number, window in enumerate(windows):
        own = len(window.read) - shared
        if number > begin and length + own > row_tokens:
            yield _joined_row(windows[begin:number], shared, first + begin)
            begin, length = number, 0
        length += own
    yield _joined_row(windows[begin:], shared, first + begin)


def _window(request: Request, max_length: int) -> Window:
    whole = [*request.context_ids, *request.continuation_ids][-(max_length + 1) :]
    scored = min(len(request.continuation_ids), len(whole) - 1)
    return Window(whole[:-1], whole[len(whole) - scored :])


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def _joined_row(windows: Sequence[Window], shared: int, first: int) -> Row:
    """One row of sequences whose first `shared` tokens are the same; `first` is the number of the first request."""
    ids, branch_ids = windows[0].read[:shared], [0] * shared
    scored: list[tuple[int, int, int]] = []

    for branch, (read, targets) in enumerate(windows, 1):
        begin = len(ids)
        ids += read[shared:]
        branch_ids += [branch] * (len(read) - shared)
        for place, target in enumerate(targets, len(read) - len(targets)):
            scored.append((place if place < shared else begin + place - shared, target, first + branch - 1))

    scored.sort(key=lambda one: one[0])
    places, targets, requests = (list(column) for column in zip(*scored, strict=True)) if scored else ([], [], [])
    return Row(ids, branch_ids, places, targets, requests, has_branches=len(ids) > shared)


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Batches of rows of similar length, the longest first; rows with branches are separate from plain ones."""
    longest_first = sorted(rows, key=lambda row: (row.has_branches, -len(row.ids)))
    chosen: list[Row] = []
    for row in longest_first:
        full = chosen and (len(chosen) + 1) * len(chosen[0].ids) > batch_tokens
        if full or (chosen and row.has_branches != chosen[0].has_branches):
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen


def to_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Rows as tensors, filled up on the right, because causal attention does not see what follows."""
    T = max(len(row.ids) for row in rows)
    ids_BT = torch.tensor([row.ids + [0] * (T - len(row.ids)) for row in rows])
    places = [index * T + place for index, row in enumerate(rows) for place in row.places]

    branch_ids_BT = None
    if rows[0].has_branches:
        branch_ids_BT = torch.tensor([row.branch_ids + [-1] * (T - len(row.ids)) for row in rows]).to(device)

    targets_N = torch.tensor([target for row in rows for target in row.targets])
    continuations = Continuations(branch_ids_BT, torch.tensor(places).to(device), targets_N.to(device))
    requests_N = torch.tensor([request for row in rows for request in row.requests])
    return Batch(ids_BT.to(device), continuations, requests_N)
