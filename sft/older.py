"""Conversations that an older version has prepared: used where they have the chat template's ids, else refused.

    older ids = header, content and newline each encoded alone, literals of added tokens as letters

Most tokenizers give the same ids either way, but for contents that begin with white space. Tokenizers that put a space
before each text do not, and neither do those whose added tokens stand in the conversations.
"""

from collections.abc import Iterable, Mapping, Sequence

from ds_slm.data.tokenizers.tokenizer import Tokenizer
from ds_slm.errors import DataError
from sft.chatml import ChatML
from sft.probe import refuse_other_encoding

CONTENT = "The cat, 3 of them: e.g. (one)\n\nand two."
"""Ordinary text, to see whether contents may be encoded alone."""
SAMPLE = 256
"""Conversations of a split that are looked at for added tokens."""


def refuse_other_ids(tokenizer: Tokenizer, conversations: Mapping[str, Iterable[Sequence[int]]]) -> None:
    """Refuse what an older version has prepared with ids that the exported chat template does not give.

    Args:
        tokenizer: the one they were made with.
        conversations: ids of some of them, by the folder they stand in.

    Raises:
        DataError: with an example and the way out, for each folder.
    """
    if tokenizer.cuts_alone:
        return
    refuse_other_encoding(tokenizer)

    # Ordinary text with other ids concerns every folder, an added token only the folders that hold it.
    chatml = ChatML(tokenizer)
    talk = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": CONTENT}]
    alone, whole = _encoded_alone(chatml, talk), chatml.encode(talk).ids.tolist()
    reasons = dict.fromkeys(conversations, f"for {CONTENT!r} {alone} where the template gives {whole}")
    if alone == whole:
        reasons = {folder: _spelled(tokenizer, some) for folder, some in conversations.items()}

    problems = [
        f"{folder} was prepared by an older version, which gave conversations other ids in this tokenizer than the "
        f"exported chat template does ({reason}): remove {folder} and prepare again."
        for folder, reason in reasons.items()
        if reason
    ]
    if problems:
        raise DataError(problems)


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
