"""Sampling from a decoder, one token at a time, with a KV cache.

    ids --> prefill --> logits of the last token --> penalty, temperature, top-k, top-p --> token --> cache --> ...

The order of the filters is that of transformers. Randomness comes from a generator of the call's own on the CPU: the
same seed gives the same text on any device, as far as the logits are the same. Ids that stand for nothing in the
tokenizer (`Tokenizer.unused_ids`) are never drawn.

Beyond the context limit the window slides: the older half is forgotten and the newer half is read again, so positions
stay within what was trained. Known gap: one sequence at a time.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.model.decoder import Decoder, KVCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits. By default from all of them, as they are."""

    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids already present."""
    seed: int = 0


GREEDY = Sampling(temperature=0)


@torch.no_grad()
def generate(
    model: Decoder,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
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
        The new ids, the stop id included.
    """
    limit = model.shape.max_position_embeddings
    weight = next(model.parameters())
    capacity = min(limit, len(ids) + max_new_tokens)
    cache = KVCache(model.shape, 1, capacity, weight.dtype, weight.device)

    generator = torch.Generator().manual_seed(sampling.seed)
    known, unread = list(ids), list(ids)[-limit:]
    unused = torch.tensor(sorted(unused_ids), dtype=torch.long)

    was_training = model.training
    model.eval()
    try:
        while len(known) < len(ids) + max_new_tokens:
            logits_B1V = model(torch.tensor([unread], device=weight.device), cache=cache)
            logits_V = logits_B1V[0, -1].float().cpu()
            logits_V[unused] = -torch.inf
            token = _choose(logits_V, known, sampling, generator)
            known.append(token)
            if token in stop_ids:
                break

            unread = [token]
            # A full cache is emptied, and the newer half of the text is read again.
            if cache.length == limit:
                cache.length, unread = 0, known[-max(limit // 2, 1) :]
    finally:
        model.train(was_training)

    return known[len(ids) :]


def _choose(logits_V: Tensor, known: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    penalty = sampling.repetition_penalty
    if penalty != 1.0:
        seen = torch.tensor(sorted(set(known)))
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)

    if sampling.temperature == 0:
        return int(logits_V.argmax())

    sorted_V, order_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k > 0:
        sorted_V[sampling.top_k :] = -torch.inf

    probabilities_V = sorted_V.softmax(-1)
    before_V = probabilities_V.cumsum(-1) - probabilities_V  # probability of all likelier tokens: 0 for the likeliest
    probabilities_V[before_V >= sampling.top_p] = 0.0
    probabilities_V[0].clamp_min_(torch.finfo(torch.float32).tiny)

    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def sampler(
    tokenizer_folder: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    temperature: float = 0.8,
    encode: Callable[[Tokenizer, str], list[int]] = lambda tokenizer, prompt: tokenizer.encode(prompt),
    end_token: str | None = None,
) -> Callable[[nn.Module], dict[str, str]]:
    """A function that continues each prompt with a model, always with the same seed.

    `encode` turns a prompt into ids; `end_token` ends a text, and stays visible in it; by default the EOS, invisible.

    Safe to call on every rank, also where ranks round differently: it always generates `max_new_tokens` and cuts the
    text at its end afterwards, so the number of forwards does not depend on what was sampled.
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
