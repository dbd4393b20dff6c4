"""Conversations that an older version has prepared: used if they have the chat template's ids, else refused.

    older ids = header, content and newline each encoded alone, literals of added tokens as letters

Most tokenizers give the same ids either way, except for contents that begin with white space. Tokenizers that put a
space before each text do not, nor do tokenizers whose added tokens stand in the conversations.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ds_slm.data.shards.journal import SPLITS
from ds_slm.data.shards.prepared import Prepared
from ds_slm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ds_slm.errors import DataError
from sft.chatml import ChatML
from sft.encode import ENCODING
from sft.probe import refuse_other_encoding
from sft.shards import IDS, Conversations

CONTENT = "The cat, 3 of them: e.g. (one)\n\nand two."
"""Ordinary text, to find out whether contents may be encoded alone."""
SAMPLE = 256
"""Conversations of a split that are checked for added tokens."""


def refuse_older_ids(prepared: Prepared) -> None:
    """Refuse data that an older version prepared with ids that the exported chat template does not give.

    Raises:
        DataError: with an example and the way out, for each folder.
    """
    older = [name for name, manifest in prepared.manifests.items() if not ENCODING.items() <= manifest.items()]
    tokenizer = load_tokenizer(prepared.tokenizer_folder) if older else None
    if tokenizer is None or tokenizer.cuts_alone:
        return
    refuse_other_encoding(tokenizer)

    # If ordinary text has other ids, every folder is affected; an added token affects only folders that hold it.
    chatml = ChatML(tokenizer)
    talk = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": CONTENT}]
    alone, whole = _encoded_alone(chatml, talk), chatml.encode(talk).ids.tolist()
    reasons = dict.fromkeys(older, f"for {CONTENT!r} {alone} where the template gives {whole}")
    if alone == whole:
        reasons = {name: _spelled(tokenizer, _sample(prepared, name)) for name in older}

    problems = [
        f"{folder} was prepared by an older version, which gave conversations other ids in this tokenizer than the "
        f"exported chat template does ({reason}): remove {folder} and prepare again."
        for folder, reason in ((prepared.folder / name, reason) for name, reason in reasons.items())
        if reason
    ]
    if problems:
        raise DataError(problems)


def _sample(prepared: Prepared, name: str) -> Iterator[list[int]]:
    """The ids of conversations of one source, spread evenly over each split."""
    part = replace(prepared, manifests={name: prepared.manifests[name]})
    for split in SPLITS:
        found = Conversations(part.tokens(split))
        for number in range(0, len(found), max(len(found) // SAMPLE, 1)):
            yield (found[number] & IDS).tolist()


def _encoded_alone(chatml: ChatML, messages: list[dict[str, str]]) -> list[int]:
    """The ids that older versions gave a conversation."""
    encode, ids = chatml.tokenizer.encode, []
    for turn in messages:
        header, content = encode(turn["role"] + "\n"), encode(turn["content"])
        ids += [chatml.start_id, *header, *content, chatml.end_id, *encode("\n")]
    return ids


def _spelled(tokenizer: Tokenizer, conversations: Iterable[Sequence[int]]) -> str:
    """Which added token stands in conversations as letters; nothing where none does."""
    tokens = {tokenizer.token_id(token): token for token in tokenizer.plain_added_tokens if token.strip()}
    if not tokens:
        return ""
    control_text = tokenizer.control_text(())
    for ids in conversations:
        if not tokens.keys() & set(ids):
            text = tokenizer.decode(ids)
            found = [number for number in control_text.encode_batch([text])[0][0] if number in tokens]
            if found:
                return f"the letters of {tokens[found[0]]!r} where the template gives its id {found[0]}"
    return ""
