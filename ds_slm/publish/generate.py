"""Sampling from a decoder, one token at a time, with a KV cache.

    ids --Reader--> logits of the last token --Chooser: penalty, temperature, top-k, top-p--> token --> ids --> ...

Filters are applied in transformers' order. Each call has its own random generator on the CPU: the same seed gives the
same text on any device, as far as the logits are the same. Ids that stand for nothing in the tokenizer
(`Tokenizer.unused_ids`) are never drawn, and no penalty keeps a text from its end.

Beyond the context limit the window slides: the older half is forgotten and the newer half is read again, so positions
stay within what was trained. Known gap: one sequence at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.errors import CheckpointError
from ds_slm.model.decoder import Decoder, KVCache
from ds_slm.publish.sampling import GREEDY, UNFILTERED, Sampling

__all__ = ["GREEDY", "Chooser", "Reader", "Sampling", "generate", "sampler", "tokens"]


class Reader:
    """A decoder and what it has read, kept as keys and values, so that only new ids of a sequence are read."""

    def __init__(self, model: Decoder, capacity: int | None = None) -> None:
        """For sequences of at most `capacity` ids, by default the number of the model's positions."""
        weight = next(model.parameters())
        self.model = model
        self.limit = model.shape.max_position_embeddings
        self._cache = KVCache(model.shape, 1, capacity or self.limit, weight.dtype, weight.device)
        self._device = weight.device
        self._read: list[int] = []

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits of the token after at least one id, logits_V in fp32 on the CPU.

        Raises CheckpointError if they are not finite.
        """
        ids = list(ids)
        same = _common(self._read, ids[:-1])
        self._read, self._cache.length = self._read[:same], same
        logits_B1V = self.model(torch.tensor([ids[same:]], device=self._device), sight=self._cache)
        self._read = ids

        logits_V = logits_B1V[0, -1].float().cpu()
        if not logits_V.isfinite().all():
            raise CheckpointError(
                "the model gives logits that are not finite: its weights are damaged, or its training diverged. "
                "`ds-slm verify RUN` names checkpoints that are whole."
            )
        return logits_V


def _common(one: list[int], other: list[int]) -> int:
    """The number of ids in the common beginning of two sequences."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])


class Chooser:
    """Draws tokens from their logits, with its own random generator."""

    def __init__(self, sampling: Sampling, stop_ids: Collection[int] = (), unused_ids: Collection[int] = ()) -> None:
        """A text ends with the first of the `stop_ids`, which no penalty touches; `unused_ids` are never drawn."""
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self._unused = torch.tensor(sorted(unused_ids), dtype=torch.long)
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor, known: Sequence[int]) -> int:
        """The next token of a text whose ids are known. Changes the logits."""
        sampling = self.sampling
        logits_V[self._unused] = -torch.inf

        if (penalty := sampling.repetition_penalty) != 1.0:
            seen = torch.tensor(sorted(set(known) - self.stop_ids), dtype=torch.long)
            logits = logits_V[seen]
            logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
        if sampling.temperature == 0:
            return int(logits_V.argmax())

        sorted_V, order_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
        if sampling.top_k > 0:
            sorted_V[sampling.top_k :] = -torch.inf
        probabilities_V = sorted_V.softmax(-1)
        before_V = probabilities_V.cumsum(-1) - probabilities_V  # of all likelier tokens: 0 for the likeliest
        probabilities_V[before_V >= sampling.top_p] = 0.0
        probabilities_V[0].clamp_min_(torch.finfo(torch.float32).tiny)

        return int(order_V[torch.multinomial(probabilities_V, 1, generator=self._generator)])


def tokens(
    reader: Reader, ids: Sequence[int], chooser: Chooser, make_room: Callable[[list[int]], list[int]]
) -> Iterator[int]:
    """Continue a sequence of at least one id, up to a stop id, which is yielded too.

    Args:
        reader: ids that it has read already are not read again.
        ids: the prompt; if it is longer than the context, only its newest ids are read.
        chooser: draws the tokens.
        make_room: called when the context is full: from all ids to the ids to read from now on; none ends the text.
    """
    known, window = list(ids), list(ids)[-reader.limit :]
    while window:
        token = chooser.choose(reader.read(window), known)
        yield token
        if token in chooser.stop_ids:
            return

        known.append(token)
        window = [*window, token]
        if len(window) > reader.limit:
            window = make_room(known)


def generate(
    model: Decoder,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = UNFILTERED,
    *,
    stop_ids: Collection[int] = (),
    unused_ids: Collection[int] = (),
) -> list[int]:
    """Continue a sequence of at least one id.

    Args:
        model: a decoder; it is run in evaluation mode.
        ids: the prompt; only its newest max_position_embeddings ids are read.
        max_new_tokens: longest continuation.
        sampling: how each token is drawn.
        stop_ids: the continuation ends with the first of these.
        unused_ids: never drawn.

    Returns:
        The new ids, including the stop id.
    """
    limit = model.shape.max_position_embeddings
    reader = Reader(model, min(limit, len(ids) + max_new_tokens))
    chooser = Chooser(sampling, stop_ids, unused_ids)

    was_training = model.training
    model.eval()
    try:
        new = tokens(reader, ids, chooser, make_room=lambda known: known[-max(limit // 2, 1) :])
        return list(islice(new, max_new_tokens))
    finally:
        model.train(was_training)


def sampler(
    tokenizer_folder: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    temperature: float = 0.8,
    encode: Callable[[Tokenizer, str], list[int]] = lambda tokenizer, prompt: tokenizer.encode(prompt),
    end_token: str | None = None,
) -> Callable[[nn.Module], dict[str, str]]:
    """A function that continues each prompt with a model, always with the same seed.

    `encode` turns a prompt into ids. `end_token` ends a text and stays visible in it; by default the EOS ends it,
    invisibly.

    Safe to call on every rank, even if ranks round differently: it always generates `max_new_tokens` and cuts the text
    at its end afterwards, so the number of forwards does not depend on the samples.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    encoded = {prompt: encode(tokenizer, prompt) or [tokenizer.eos_id] for prompt in prompts}
    end_id = tokenizer.eos_id if end_token is None else tokenizer.token_id(end_token)
    sampling = Sampling(temperature, top_p=0.95)

    def sample(model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Decoder)
        unused_ids = tokenizer.unused_ids(model.shape.vocab_size)
        texts = {}
        for prompt, ids in encoded.items():
            new_ids = generate(model, ids, max_new_tokens, sampling, unused_ids=unused_ids)
            end = new_ids.index(end_id) if end_id in new_ids else None
            ending = end_token or "" if end is not None else ""
            texts[prompt] = tokenizer.decode(new_ids[:end], skip_special=True) + ending
        return texts

    return sample
