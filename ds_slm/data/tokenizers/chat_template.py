"""The chat template of a tokenizer's folder: ours, another's, or none.

folder --chat_template--> text, as transformers takes it --is_ours--> whether it writes our ChatML
"""

import re
from pathlib import Path

from ds_slm.data.tokenizers.tokenizer import CHAT_TEMPLATE_FILE
from ds_slm.errors import DataError
from ds_slm.files import read_json

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Ours: the encoding of `sft.chatml` for transformers, with the trained part of `assistant` marked."""


def chat_template(folder: Path) -> str | None:
    """The template of a tokenizer's folder; None if there is none.

    The file takes precedence over tokenizer_config.json, where older folders have one text, or several named ones.

    Raises:
        DataError: the file is not UTF-8.
    """
    file = folder / CHAT_TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 ({error}): expected a chat template; get an intact copy.") from error
    found = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def is_ours(template: str) -> bool:
    """Whether it is our template, as training or as an export writes it."""
    return unmarked(template) == unmarked(CHAT_TEMPLATE)


def unmarked(template: str) -> str:
    """A chat template without the marks around the trained part, which only transformers knows; the text is the same.

    Empty comments replace the marks, because they trim the white space around them in the same way.
    """
    return re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", template)
