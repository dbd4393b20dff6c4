"""A model to talk with: its chat template's ids, and the tokens that end an answer.

tokenizer folder --> our chat template: sft.chatml --> Speaker
                 --> another template: transformers --> Speaker
                 --> none, it is a base: its text is continued as it is, if that was asked for
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ds_slm.data.tokenizers.chat_template import chat_template, is_ours
from ds_slm.data.tokenizers.tokenizer import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG,
    IM_END,
    Tokenizer,
    end_ids,
    load_tokenizer,
)
from ds_slm.errors import ConfigError, DataError
from ds_slm.publish.chat import Message, Speaker
from ds_slm.publish.models import OpenModel
from sft.chatml import ChatML

Render = Callable[[Sequence[Message]], list[int]]


def speaker_of(opened: OpenModel, path: Path, plain: bool, device: torch.device) -> Speaker:
    """A model to talk with; if `plain`, each text is continued as it is.

    Raises:
        CheckpointError: its weights do not fit its shape.
        ConfigError: it is a base, and `plain` was not asked for; the message names it by `path`.
        DataError: it has no tokenizer, or its chat template is not UTF-8.
    """
    folder = opened.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    ends = _ends(folder, tokenizer)
    if plain:
        return Speaker(opened.decoder(device), tokenizer, _plain(tokenizer), ends)

    render = _template(folder, tokenizer)
    if render is None:
        raise ConfigError(
            f"{path} is a base: it has no {CHAT_TEMPLATE_FILE}, so nobody taught it to answer. `ds-slm chat {path} "
            f"--continue` continues your text, `ds-slm sft RECIPE --base {path}` makes an assistant of it."
        )
    if tokenizer.has_token(IM_END):
        ends |= {tokenizer.token_id(IM_END)}
    return Speaker(opened.decoder(device), tokenizer, render, ends)


def _plain(tokenizer: Tokenizer) -> Render:
    """Renders only the last message's text, with the ids of transformers."""

    def render(messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode_with_control_tokens([messages[-1]["content"]], add_special_tokens=True)[0]

    return render


def _template(folder: Path, tokenizer: Tokenizer) -> Render | None:
    """Renders a conversation as ids; None if there is no chat template."""
    template = chat_template(folder)
    if template is None:
        return None
    return ChatML(tokenizer).prompt if is_ours(template) else _theirs(folder)


def _theirs(folder: Path) -> Render:
    """Renders a conversation by another chat template than ours, with transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def render(messages: Sequence[Message]) -> list[int]:
        try:
            return list(tokenizer.apply_chat_template([*messages], add_generation_prompt=True, return_dict=False))
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(f"the chat template in {folder} refuses this conversation ({error}).") from error

    return render


def _ends(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The EOS, and other ids that end a text according to a Hugging Face folder."""
    named = (number for number in end_ids(folder / GENERATION_CONFIG) if isinstance(number, int))
    return frozenset({tokenizer.eos_id, *named})
