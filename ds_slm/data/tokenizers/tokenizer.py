"""How text becomes ids, and how a tokenizer is kept: always as a Hugging Face tokenizer folder.

    recipe --build_tokenizer--> Tokenizer --save--> folder --load_tokenizer--> Tokenizer

bpe     byte-level BPE trained on the sources. Special tokens get exactly the recipe's ids, all other ids follow in
        the order of their merges, which is the order in which text is joined.
cl100k  tiktoken's ranks. Every id stands in the BPE vocabulary, unused ids as fillers that no text can give (none is a
        single pre-token), so that ids survive saving.
hf      a local folder, a tokenizer.json, a SentencePiece tokenizer.model, or a hub id.

Text is text: an added token's literal inside a document is encoded as ordinary text, whether it is marked special or
not; only added tokens of white space, which some tokenizers have for indents, are part of how text is cut. In
conversations (`control_text`) the literal of an added token that is not special, such as <think>, gives its id, as it
does in the chat template's text. Loaded with transformers, the saved folder parses control tokens by default, as
chat templates need.

Ids depend on the text alone: settings that are random, or depend on the tokenizer's last use, are switched off, also in
the saved folder and in the hash (`_switch_off`). Older versions left them on: their hash is accepted too.

Known gaps: an hf tokenizer's chat template is not carried over.
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from ds_slm.data.sources.hub import reason_of
from ds_slm.data.sources.stand_ins import stand_in_at
from ds_slm.data.tokenizers.bpe_training import train_bpe
from ds_slm.data.tokenizers.byte_level import CL100K_PATTERN, GPT2_PATTERN, bulk_encoder, by_rank, byte_letters, filler
from ds_slm.data.tokenizers.control_text import ControlText
from ds_slm.data.tokenizers.sentencepiece import read_sentencepiece
from ds_slm.errors import DataError
from ds_slm.files import read_json, sha256_of_json
from ds_slm.recipe.data_sections import Source
from ds_slm.recipe.data_sections import Tokenizer as Section
from ds_slm.recipe.schema import Recipe

if TYPE_CHECKING:
    import tokenizers

CL100K_RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
GENERATION_CONFIG = "generation_config.json"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
"""ChatML's control tokens, which stand around every turn of a conversation."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers looks for a tokenizer's chat template."""
CL100K_SPECIAL_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    IM_START: 100264,
    IM_END: 100265,
    "<|endofprompt|>": 100276,
}
CL100K_VOCAB_SIZE = 100277
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that are read directly: transformers' own loading rebuilds some tokenizers, not always with the same ids."""


class Tokenizer:
    """Text to ids and back, with the ids that end and pad documents."""

    def __init__(
        self, backend: "tokenizers.Tokenizer", eos_token: str, pad_token: str, bos_token: str | None = None
    ) -> None:
        """Raises DataError, which names both, if the vocabulary lacks the EOS or the pad token."""
        self.switched_off = _leftovers(backend)
        """Settings that would have made ids depend on more than the text, for people."""
        self.older_sha256 = _sha256(backend) if self.switched_off else None
        """The hash that older versions gave it, with these settings left on; None if there are none."""
        _switch_off(backend)

        self._backend = backend
        self._encoder = _text_encoder(backend)
        self.eos_token, self.pad_token = eos_token, pad_token

        problems = [
            f"the tokenizer has no {token!r}: set tokenizer.{field}_token to one of its tokens."
            for field, token in (("eos", eos_token), ("pad", pad_token))
            if backend.token_to_id(token) is None
        ]
        if problems:
            raise DataError(problems)

        self.eos_id, self.pad_id = self.token_id(eos_token), self.token_id(pad_token)
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        """The id of the token that begins a text in tokenizers made by others; no document is trained with it."""
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of one text; nothing is added at its ends."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, on all cores; best for batches of many more texts than there are cores."""
        if self._bulk:
            return self._bulk(texts)
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_control_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids that transformers' tokenizer gives: the literal of a control token is that token.

        Args:
            texts: the texts to encode.
            add_special_tokens: whether to add the tokens that a tokenizer made by others puts around a text.
        """
        found = self._parsing_encoder.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    @cached_property
    def _parsing_encoder(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Backend

        return Backend.from_str(self._backend.to_str())  # a copy parses control tokens: that setting is not stored

    @property
    def cuts_alone(self) -> bool:
        """Whether text between two control tokens always has the ids that `encode` gives it."""
        return self._bulk is not None and not self.plain_added_tokens

    @cached_property
    def plain_added_tokens(self) -> list[str]:
        """The added tokens that are not special: their literals in a conversation give their ids.

        An EOS, a pad or a ChatML token is never among them, whatever its file says.
        """
        control = {self.eos_token, self.pad_token, IM_START, IM_END}
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special and token.content not in control]

    def control_text(self, tokens: Sequence[str]) -> ControlText:
        """Encodes text that holds these control tokens. Raises DataError for tokens that it would not cut out."""
        return ControlText(self._backend, tokens, self.plain_added_tokens)

    @cached_property
    def _bulk(self) -> Callable[[Sequence[str]], list[list[int]]] | None:
        return bulk_encoder(self._encoder)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of these ids."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def has_token(self, token: str) -> bool:
        """Whether a token stands in the vocabulary."""
        return self._backend.token_to_id(token) is not None

    def token_id(self, token: str) -> int:
        """The id of a token, spelled as in the vocabulary. Raises DataError if there is none."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise DataError(f"the tokenizer has no token {token!r}: add it to tokenizer.special_tokens.")
        return token_id

    def unused_ids(self, vocab_size: int) -> list[int]:
        """The ids below a model's vocabulary size that stand for nothing: ids without a token, and fillers."""
        used = {number for token, number in self._backend.get_vocab().items() if token != filler(number)}
        return [number for number in range(vocab_size) if number not in used]

    @cached_property
    def sha256(self) -> str:
        """Hash of tokenizer.json's content, whatever its layout, without the settings that are switched off."""
        return _sha256(self._backend)

    @cached_property
    def text_sha256(self) -> str:
        """Hash of everything that decides a text's ids: without tokens that tokenizers made by others put around it."""
        return sha256_of_json({**json.loads(self._backend.to_str()), "post_processor": None})

    def has_sha256(self, sha256: str) -> bool:
        """Whether a recorded hash, of this version or an older one, is this tokenizer's."""
        return sha256 in (self.sha256, self.older_sha256)

    @property
    def _adds_prefix_space(self) -> bool:
        """The pre-tokenizer's setting: older versions of transformers would replace it by the folder's config."""
        pre_tokenizer = json.loads(self._backend.to_str())["pre_tokenizer"] or {}
        return bool(pre_tokenizer.get("add_prefix_space", False))

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoTokenizer.from_pretrained` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": self._adds_prefix_space,
        }
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _leftovers(backend: "tokenizers.Tokenizer") -> list[str]:
    """Settings of a tokenizer that are random, or were left by its last use."""
    found = []
    if dropout := getattr(backend.model, "dropout", None):
        found.append(f"BPE dropout of {dropout:g}, which joins letters at random")
    if getattr(backend.model, "nbest_size", None) or getattr(backend.model, "alpha", None):
        found.append("sampling of a text's ids")
    if backend.truncation:
        found.append("truncation")
    if backend.padding:
        found.append("padding")
    return found


def _switch_off(backend: "tokenizers.Tokenizer") -> None:
    """Switch off all `_leftovers`. Settings that are already off do not change, because they are part of the hash."""
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    if getattr(backend.model, "nbest_size", None) or getattr(backend.model, "alpha", None):
        backend.model.nbest_size = backend.model.alpha = None
    backend.no_truncation()
    backend.no_padding()


def _text_encoder(backend: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """The same tokenizer, but with added tokens' literals as text, unless they are white space."""
    from tokenizers import Tokenizer as Backend

    if any(not token.special and token.content.strip() for token in backend.get_added_tokens_decoder().values()):
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["special"] |= bool(token["content"].strip())
        backend = Backend.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return backend


def _sha256(backend: "tokenizers.Tokenizer") -> str:
    return sha256_of_json(json.loads(backend.to_str()))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a folder that `Tokenizer.save`, or transformers, has written.

    tokenizer_config.json names the EOS, else the one id in generation_config.json or config.json is the EOS. The EOS is
    the pad token if no other is named.

    Raises:
        DataError: the folder is missing, holds no tokenizer, or does not say which token ends a document.
    """
    import tokenizers

    for path in (folder / "tokenizer_config.json", folder / "tokenizer.json"):
        if path.is_file() and (what := stand_in_at(path)):
            raise DataError(f"{path} cannot be read ({what}).")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        backend = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        named = {role: _content(config.get(f"{role}_token")) for role in ("eos", "pad", "bos")}
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{folder} holds no whole tokenizer ({error}): prepare it again.") from error
    eos_token = named["eos"] or _eos_by_id(folder, backend)
    return Tokenizer(backend, eos_token, named["pad"] or eos_token, named["bos"])


def _content(token: Any) -> str | None:
    content = token["content"] if isinstance(token, dict) else token  # transformers writes either
    if not isinstance(content, str | None):
        raise ValueError(f"its EOS or padding token is {content!r}")
    return content


def end_ids(path: Path) -> list[Any]:
    """The ids that end a text by a model's configuration: one, several, or none."""
    ids = (read_json(path) or {}).get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _eos_by_id(folder: Path, backend: "tokenizers.Tokenizer") -> str:
    """The EOS of a model whose tokenizer does not name it."""
    found = end_ids(folder / GENERATION_CONFIG) or end_ids(folder / "config.json")
    tokens = [backend.id_to_token(number) if isinstance(number, int) else None for number in found]
    if len(tokens) == 1 and tokens[0] is not None:
        return tokens[0]
    got = ", ".join(f"{number} ({token!r})" for number, token in zip(found, tokens, strict=True))
    raise DataError(
        f"{folder / 'tokenizer_config.json'} names no eos_token, and the model's configuration gives "
        f"{f'the ids {got}' if found else 'none either'}; expected one token that ends a document: add it there, as "
        '"eos_token": "...".'
    )


def build_tokenizer(
    recipe: Recipe,
    documents: Callable[[Source], Iterator[str]],
    report: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """The recipe's tokenizer.

    Args:
        recipe: the recipe that describes it.
        documents: the training text of a source.
        report: takes a line for each thing that a user may not expect.

    Raises:
        DataError: files are missing, the text is too little for the vocabulary, or ids are not the recipe's.
    """
    section = recipe.tokenizer
    if section.kind == "bpe":
        backend = _trained_bpe(recipe, documents, report)
    elif section.kind == "cl100k":
        backend = _cl100k(section)
    elif section.kind == "hf":
        backend = _existing(section, report)
    else:
        assert_never(section.kind)
    tokenizer = Tokenizer(backend, section.eos_token, section.pad_token)
    for setting in tokenizer.switched_off:
        report(f"tokenizer: switched off: {setting}")
    _check_ids(tokenizer, section)
    return tokenizer


def existing_tokenizer(folder: Path, section: Section) -> Tokenizer:
    """The tokenizer of a folder. Raises DataError if it is not the recipe's."""
    tokenizer = load_tokenizer(folder)
    _check_ids(tokenizer, section)
    return tokenizer


def _check_ids(tokenizer: Tokenizer, section: Section) -> None:
    problems = []
    if tokenizer.vocab_size != section.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} ids and tokenizer.vocab_size is {section.vocab_size}: "
            + ("give it more text, or ask for fewer ids." if section.kind == "bpe" else "make the recipe say the same.")
        )
    for token, token_id in section.special_tokens.items():
        if (found := tokenizer._backend.token_to_id(token)) != token_id:
            problems.append(f"tokenizer.special_tokens: {token!r} should be {token_id} and is {found}.")
    if problems:
        raise DataError(problems)


def _trained_bpe(
    recipe: Recipe, documents: Callable[[Source], Iterator[str]], report: Callable[[str], None]
) -> "tokenizers.Tokenizer":
    section = recipe.tokenizer
    specials = section.special_tokens
    texts = (
        text
        for source in recipe.data.source
        for text in islice(documents(source), section.documents_per_weight * source.weight)
    )
    learned, long_runs = train_bpe(texts, section.vocab_size - len(specials), section.min_frequency)
    if long_runs.count:
        report(f"warning: tokenizer: {long_runs}")

    # Special tokens have the recipe's ids, learned ones the ids that are left.
    taken = set(specials.values())
    free_ids = (number for number in range(section.vocab_size) if number not in taken)
    vocab = {token: next(free_ids) for token in learned}
    return by_rank(vocab, specials, specials, GPT2_PATTERN)


def _cl100k(section: Section) -> "tokenizers.Tokenizer":
    letters = byte_letters()
    ranks = {"".join(letters[byte] for byte in token): rank for token, rank in _cl100k_ranks(section).items()}
    named = {number: token for token, number in CL100K_SPECIAL_TOKENS.items()}
    others = {named.get(number) or filler(number): number for number in range(len(ranks), CL100K_VOCAB_SIZE)}
    return by_rank(ranks, others, CL100K_SPECIAL_TOKENS, CL100K_PATTERN, ignore_merges=True)


def _cl100k_ranks(section: Section) -> dict[bytes, int]:
    """Token bytes -> rank, from the user's file or through tiktoken, which downloads and caches them."""
    if section.path is None:
        import tiktoken

        try:
            return tiktoken.get_encoding("cl100k_base")._mergeable_ranks
        except Exception as error:  # requests' own kinds
            raise DataError(
                f"tiktoken cannot download cl100k's ranks ({error}): set tokenizer.path to a copy of "
                "cl100k_base.tiktoken, or TIKTOKEN_CACHE_DIR to a cache that has it."
            ) from error

    path = Path(section.path)
    if not path.is_file():
        raise DataError(f"tokenizer.path = {section.path!r} does not exist: name a copy of cl100k_base.tiktoken.")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != CL100K_RANKS_SHA256:
        raise DataError(f"{path} has sha256 {found}, cl100k's ranks have {CL100K_RANKS_SHA256}: get an intact copy.")
    return {b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def _existing(section: Section, report: Callable[[str], None]) -> "tokenizers.Tokenizer":
    """A ready-made tokenizer, without the tokens that it adds to a text: only an EOS is added to a document."""
    backend = _read_existing(section)
    if added := backend.num_special_tokens_to_add(is_pair=False):
        backend.post_processor = None
        report(f"tokenizer: switched off: {added} tokens around each text, which no document is trained with")
    return backend


def _read_existing(section: Section) -> "tokenizers.Tokenizer":
    import tokenizers

    assert section.path is not None  # the recipe was checked
    path = Path(section.path)
    try:
        if not path.exists():
            from huggingface_hub import snapshot_download

            path = Path(snapshot_download(section.path, allow_patterns=list(TOKENIZER_FILES)))
        files = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES]
        found = next((file for file in files if file.is_file()), None)
        if found and (what := stand_in_at(found)):
            raise DataError(f"tokenizer.path: {found} cannot be read ({what}).")
        if found and found.suffix == ".json":
            return tokenizers.Tokenizer.from_file(str(found))
        if found and found.suffix == ".model":
            return read_sentencepiece(found)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(section.path).backend_tokenizer
    except DataError:
        raise
    except Exception as error:  # the Rust side raises bare Exception, the hub's libraries their own kinds
        raise DataError(
            f"tokenizer.path = {section.path!r} gives no tokenizer ({reason_of(error)}): name a local folder, "
            "a tokenizer.json, a tokenizer.model or a hub id."
        ) from error
