r"""A tokenizer in llama.cpp's terms: the conditions under which it gives the same ids, and the fields of the file.

    tokenizer.json --refuse what llama.cpp would read differently--> Vocabulary: tokens, types, merges or scores

llama.cpp knows pre-tokenizers by name. Two of its kinds are written:

    gpt2    byte-level BPE by merges, with text cut by one of PRE_TOKENIZERS
    llama   SentencePiece BPE with byte fallback. It joins the neighbours whose union has the best score; if scores are
            equal, the leftmost. The scores are the order of the merges, so merges must be grouped by their results

Source: src/llama-vocab.cpp and src/unicode.cpp of ggml-org/llama.cpp. Known gaps: other patterns, normalisers, and
tokens that remove the white space beside them.
"""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf

from ds_slm.data.tokenizers.byte_level import CL100K_PATTERN, GPT2_PATTERN, filler
from ds_slm.data.tokenizers.chat_template import chat_template, is_ours, unmarked
from ds_slm.data.tokenizers.sentencepiece import SPACE
from ds_slm.data.tokenizers.tokenizer import GENERATION_CONFIG, IM_END, Tokenizer, end_ids, load_tokenizer
from ds_slm.errors import DataError

PRE_TOKENIZERS = {GPT2_PATTERN: ("gpt-2", False), CL100K_PATTERN: ("llama-bpe", True)}
"""Pattern -> llama.cpp's name for it, and whether it then takes a piece that is a token as it is (ignore_merges)."""

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Our chat template as most published models write it, because Ollama recognises a template by its similarity to known
ones."""


@dataclass(frozen=True)
class Vocabulary:
    """Everything a GGUF file says of a tokenizer."""

    model: str
    """gpt2 or llama."""
    pre: str
    """llama.cpp's name for the pre-tokenizer."""
    tokens: list[str]
    """Tokens by id, one for each row of the embedding."""
    types: list[gguf.TokenType]
    merges: list[str]
    """gpt2: pairs in the order in which they are joined."""
    scores: list[float]
    """llama: the score of each token."""
    ids: dict[str, int]
    """Ids by role, under llama.cpp's names: bos, eos, padding, eot if it ends turns, unknown."""
    flags: dict[str, bool]
    """Flags such as add_bos_token."""
    unused_ids: list[int]
    """Ids that stand for nothing, never to be generated."""
    chat_template: str | None
    """The template of an assistant: ours in its plainest form, any other unchanged."""

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Put it into a file's header."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)

        for role, number in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
        for flag, is_on in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{flag}", is_on)
        writer.add_array("tokenizer.ggml.suppress_tokens", self.unused_ids)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer's folder, for a model with `vocab_size` ids.

    Raises:
        DataError: llama.cpp could give other ids, with every reason; or the chat template is not UTF-8.
    """
    tokenizer = load_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    is_sentencepiece = bool(content["model"].get("byte_fallback"))

    # First what both kinds have in common, then what differs.
    before, behind = ([], []) if content["post_processor"] is None else _added_around(tokenizer)
    if content["model"]["type"] == "BPE":
        problems = [*_common_problems(content, tokenizer, before, behind)]
        problems += _sentencepiece_problems(content) if is_sentencepiece else _byte_level_problems(content)
    else:
        problems = [f"its model is {content['model']['type']}, expected BPE."]
    if problems:
        raise DataError(
            [
                "llama.cpp would not give this tokenizer's ids, so there can be no GGUF file (export without --gguf):",
                *problems,
            ]
        )

    template = chat_template(folder)
    by_id = {number: token for token, number in _all_tokens(content).items()}
    ids = {
        "bos": before[0] if before else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
    }
    if template is not None and (end := _end_of_turn(template, folder, tokenizer)) is not None:
        ids["eot"] = end
    # Whatever a tokenizer puts before a text, a conversation begins like its template. If the template writes the BOS,
    # llama.cpp does not write a second one.
    begins_with_it = template is None or "bos_token" in template or any(by_id[one] in template for one in before)
    flags = {"add_bos_token": bool(before) and begins_with_it, "add_eos_token": bool(behind)}

    tokens = [by_id.get(number, filler(number)) for number in range(vocab_size)]
    unused_ids = tokenizer.unused_ids(vocab_size)
    if is_sentencepiece:
        model, pre = "llama", "default"
        flags["add_space_prefix"] = len(_space_steps(content)) == 2
    else:
        model, (pre, _) = "gpt2", PRE_TOKENIZERS[str(_pattern(content))]
    return Vocabulary(
        model, pre, tokens,
        types=_types(content, tokenizer, unused_ids, vocab_size),
        merges=[] if is_sentencepiece else [" ".join(pair) for pair in _merges(content)],
        scores=_scores(content, tokens) if is_sentencepiece else [],
        ids=ids, flags=flags, unused_ids=unused_ids,
        chat_template=None if template is None else CHATML if is_ours(template) else unmarked(template),
    )  # fmt: skip


def _end_of_turn(template: str, folder: Path, tokenizer: Tokenizer) -> int | None:
    """The id that ends an answer; None if it is not stated, and llama.cpp looks for a name that it knows.

    Raises:
        DataError: our template's token is missing.
    """
    if is_ours(template) or (IM_END in template and tokenizer.has_token(IM_END)):
        return tokenizer.token_id(IM_END)
    others = [number for number in end_ids(folder / GENERATION_CONFIG) if number != tokenizer.eos_id]
    return others[0] if len(others) == 1 else None


def _all_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in order; a file may hold each as a pair or as one text."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _types(
    content: Mapping[str, Any], tokenizer: Tokenizer, unused_ids: list[int], vocab_size: int
) -> list[gguf.TokenType]:
    """The type of each id."""
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * vocab_size
    if content["model"].get("byte_fallback"):
        for byte in range(256):
            types[content["model"]["vocab"][_byte_piece(byte)]] = kinds.BYTE
    for token in content["added_tokens"]:
        is_text = token["content"] in tokenizer.plain_added_tokens
        types[token["id"]] = kinds.USER_DEFINED if is_text else kinds.CONTROL
    for number in unused_ids:
        types[number] = kinds.UNUSED
    return types


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the exported tokenizer puts before and after a text."""
    plain, around = (
        tokenizer.encode_with_control_tokens(["a"], add_special_tokens=added)[0] for added in (False, True)
    )
    begin = next(place for place in range(len(around)) if around[place : place + len(plain)] == plain)
    return around[:begin], around[begin + len(plain) :]


def _common_problems(
    content: Mapping[str, Any], tokenizer: Tokenizer, before: list[int], behind: list[int]
) -> Iterator[str]:
    model = content["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        yield "it marks the parts of a word, which neither kind of BPE in llama.cpp does."

    if len(before) > 1 or behind not in ([], [tokenizer.eos_id]):
        yield (
            f"it puts the ids {before} before a text and {behind} behind it, expected at most one before, and "
            "nothing or EOS behind."
        )
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            yield f"its token {token['content']!r} depends on what stands beside it (lstrip, rstrip or single_word)."


# ---- byte-level BPE


def _pattern(content: Mapping[str, Any]) -> str | None:
    """The pattern by which a byte-level tokenizer cuts text; None for another pre-tokenizer."""
    pre = content["pre_tokenizer"] or {}
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _byte_level_problems(content: Mapping[str, Any]) -> Iterator[str]:
    if content["normalizer"] is not None:
        yield f"it normalises text ({content['normalizer']['type']}), which llama.cpp does not for byte-level BPE."

    pattern = _pattern(content)
    if pattern not in PRE_TOKENIZERS:
        found = json.dumps(content["pre_tokenizer"])
        yield (
            f"it cuts text by {found[:300]}, expected GPT-2's or cl100k's pattern, then a ByteLevel that adds no space."
        )
        return

    name, takes_whole = PRE_TOKENIZERS[pattern]
    if takes_whole != bool(content["model"].get("ignore_merges")) and (unreached := _unreached(content)):
        yield (
            f"its merges do not lead to {unreached!r}, and with the pattern {name} llama.cpp takes such a token "
            f"{'always' if takes_whole else 'never'}."
        )


def _unreached(content: Mapping[str, Any]) -> str | None:
    """A token whose own text does not give it by merges alone; None if there is none."""
    from tokenizers import models

    model = models.BPE(vocab=content["model"]["vocab"], merges=_merges(content))
    others = {token["content"] for token in content["added_tokens"]}
    for token, number in content["model"]["vocab"].items():
        if token in others or token == filler(number):
            continue
        if [one.id for one in model.tokenize(token)] != [number]:
            return token
    return None


# ---- SentencePiece BPE


def _byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _space_steps(content: Mapping[str, Any]) -> list[Any]:
    """The steps of the normaliser, which change spaces."""
    normalizer = content["normalizer"] or {"type": "Sequence", "normalizers": []}
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _sentencepiece_problems(content: Mapping[str, Any]) -> Iterator[str]:
    model, steps = content["model"], _space_steps(content)
    written = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if steps not in (written, [{"type": "Prepend", "prepend": SPACE}, *written]) or content["pre_tokenizer"]:
        yield f"it does not write spaces as SentencePiece does, as {SPACE}, at most with one more before a text."
    for token in content["added_tokens"]:
        if token["normalized"]:
            yield f"its token {token['content']!r} is looked for in text whose spaces are written already."

    vocab = model["vocab"]
    if missing := [byte for byte in range(256) if _byte_piece(byte) not in vocab]:
        yield f"it has no token for the byte {missing[0]}."
    if model.get("ignore_merges"):
        yield "it takes a text that is a token as it is."

    # As scores, the merges must hold every way to make a token from two, and all ways for one token must be together.
    # Merges that make a control token may be among them.
    merges = _merges(content)
    results = [token for token, _ in groupby(left + right for left, right in merges)]
    others = {token["content"] for token in content["added_tokens"]}
    must, may = _ways(vocab.keys() - others), _ways(vocab.keys())
    if len(results) != len(set(results)) or not must <= set(merges) <= may:
        yield "its merges are not those of scores, which SentencePiece joins by."


def _ways(tokens: Set[str]) -> set[tuple[str, str]]:
    """Every way to make one of these tokens from two of them."""
    return {
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    }


def _scores(content: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """The scores of tokens: the earlier a token is made, the better its score."""
    order = {token: place for place, token in enumerate(dict.fromkeys(map("".join, _merges(content))))}
    return [-float(order.get(token, len(order))) for token in tokens]
